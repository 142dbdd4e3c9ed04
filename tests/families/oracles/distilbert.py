"""A transformers DistilBERT by loops: BERT's layer under other names, no token types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.oracle import Array, Weights, attention, gelu, layer_norm


class DistilBertOracle:
    """One sample through a DistilBERT; see :mod:`tests.families.oracles`."""

    def __init__(self, weights: Weights, encoder: Any) -> None:
        self.w = weights
        self.heads = encoder.config.n_heads

    def linear(self, name: str, x: Array) -> Array:
        return x @ self.w[name + ".weight"].T + self.w[name + ".bias"]

    def norm(self, name: str, x: Array) -> Array:
        return layer_norm(x, self.w[name + ".weight"], self.w[name + ".bias"], 1e-12)

    def embed(self, sample: Mapping[str, Array]) -> Array:
        ids = sample["input_ids"].astype(int)
        positions = self.w["embeddings.position_embeddings.weight"][: len(ids)]
        return self.norm("embeddings.LayerNorm", self.w["embeddings.word_embeddings.weight"][ids] + positions)

    def layer(self, i: int, x: Array, prompts: Array | None) -> Array:
        b = f"transformer.layer.{i}."
        tokens = x if prompts is None else np.concatenate([x, prompts])
        q, k, v = (self.linear(f"{b}attention.{part}_lin", tokens) for part in "qkv")
        mixed = attention(q[: len(x)], k, v, self.heads)
        x = self.norm(b + "sa_layer_norm", x + self.linear(b + "attention.out_lin", mixed))
        hidden = gelu(self.linear(b + "ffn.lin1", x))
        return self.norm(b + "output_layer_norm", x + self.linear(b + "ffn.lin2", hidden))

    def pool(self, x: Array) -> Array:
        return x[0]

    def finish(self, x: Array) -> Array:
        return x[0]
