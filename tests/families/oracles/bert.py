"""A transformers BERT, RoBERTa or ELECTRA by loops."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.oracle import Array, Weights, attention, gelu, layer_norm


class BertOracle:
    """One sample through a BERT; see :mod:`tests.families.oracles`."""

    def __init__(self, weights: Weights, encoder: Any) -> None:
        self.w = weights
        self.heads = encoder.config.num_attention_heads
        # RoBERTa's table of positions begins with rows for padding.
        self.first = encoder.config.pad_token_id + 1 if encoder.config.model_type == "roberta" else 0

    def embed(self, sample: Mapping[str, Array]) -> Array:
        w, t = self.w, "embeddings."
        ids = sample["input_ids"].astype(int)
        x = w[t + "word_embeddings.weight"][ids] + w[t + "position_embeddings.weight"][self.first :][: len(ids)]
        x = x + w[t + "token_type_embeddings.weight"][0]
        x = layer_norm(x, w[t + "LayerNorm.weight"], w[t + "LayerNorm.bias"], 1e-12)
        if "embeddings_project.weight" in w:  # ELECTRA
            x = x @ w["embeddings_project.weight"].T + w["embeddings_project.bias"]
        return x

    def layer(self, i: int, x: Array, prompts: Array | None) -> Array:
        w, b = self.w, f"encoder.layer.{i}."
        tokens = x if prompts is None else np.concatenate([x, prompts])
        q, k, v = (
            tokens @ w[f"{b}attention.self.{part}.weight"].T + w[f"{b}attention.self.{part}.bias"]
            for part in ("query", "key", "value")
        )
        mixed = attention(q[: len(x)], k, v, self.heads)
        mixed = mixed @ w[b + "attention.output.dense.weight"].T + w[b + "attention.output.dense.bias"]
        n = b + "attention.output.LayerNorm."
        x = layer_norm(x + mixed, w[n + "weight"], w[n + "bias"], 1e-12)
        hidden = gelu(x @ w[b + "intermediate.dense.weight"].T + w[b + "intermediate.dense.bias"])
        hidden = hidden @ w[b + "output.dense.weight"].T + w[b + "output.dense.bias"]
        return layer_norm(x + hidden, w[b + "output.LayerNorm.weight"], w[b + "output.LayerNorm.bias"], 1e-12)

    def pool(self, x: Array) -> Array:
        return x[0]

    def finish(self, x: Array) -> Array:
        return x[0]
