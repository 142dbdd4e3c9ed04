"""A transformers MPNet by loops: one bias per pair of text tokens, looked up by the bucket of their distance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.oracle import Array, Weights, gelu, layer_norm


def bucket(distance: int) -> int:
    """Of 32: one for each of the first 8 distances to either side, then logarithmic up to 128 (T5, section 2.1)."""
    side = 16 if distance > 0 else 0  # the key is behind the query
    n = abs(distance)
    return side + (n if n < 8 else min(15, 8 + int(math.log(n / 8) / math.log(128 / 8) * 8)))


class MPNetOracle:
    """One sample through an MPNet; see :mod:`tests.families.oracles`."""

    def __init__(self, weights: Weights, encoder: Any) -> None:
        self.w = weights
        self.heads = encoder.config.num_attention_heads

    def linear(self, name: str, x: Array) -> Array:
        return x @ self.w[name + ".weight"].T + self.w[name + ".bias"]

    def norm(self, name: str, x: Array) -> Array:
        return layer_norm(x, self.w[name + ".weight"], self.w[name + ".bias"], 1e-12)

    def embed(self, sample: Mapping[str, Array]) -> Array:
        ids = sample["input_ids"].astype(int)
        # Two rows of the table stand for padding.
        positions = self.w["embeddings.position_embeddings.weight"][2 : 2 + len(ids)]
        return self.norm("embeddings.LayerNorm", self.w["embeddings.word_embeddings.weight"][ids] + positions)

    def layer(self, i: int, x: Array, prompts: Array | None) -> Array:
        b = f"encoder.layer.{i}."
        tokens = x if prompts is None else np.concatenate([x, prompts])
        q, k, v = (self.linear(f"{b}attention.attn.{part}", tokens) for part in "qkv")
        size = q.shape[1] // self.heads
        mixed = np.zeros_like(x)
        for h in range(self.heads):
            part = slice(h * size, (h + 1) * size)
            for row in range(len(x)):
                scores = []
                for column in range(len(tokens)):
                    score = float(q[row, part] @ k[column, part]) / math.sqrt(size)
                    if column < len(x):
                        score += self.w["encoder.relative_attention_bias.weight"][bucket(column - row), h]
                    scores.append(score)
                exponents = np.exp(np.array(scores) - max(scores))
                mixed[row, part] = exponents @ v[:, part] / exponents.sum()
        x = self.norm(b + "attention.LayerNorm", x + self.linear(b + "attention.attn.o", mixed))
        hidden = gelu(self.linear(b + "intermediate.dense", x))
        return self.norm(b + "output.LayerNorm", x + self.linear(b + "output.dense", hidden))

    def pool(self, x: Array) -> Array:
        return x[0]

    def finish(self, x: Array) -> Array:
        return x[0]
