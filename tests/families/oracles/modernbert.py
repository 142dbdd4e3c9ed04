"""A transformers ModernBERT by loops: rotary positions and windows, one score at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.oracle import Array, Weights, gelu, layer_norm


class ModernBertOracle:
    """One sample through a ModernBERT; see :mod:`tests.families.oracles`."""

    def __init__(self, weights: Weights, encoder: Any) -> None:
        self.w = weights
        config = encoder.config
        self.heads, self.eps, self.window = config.num_attention_heads, config.norm_eps, config.local_attention // 2
        self.local = [kind == "sliding_attention" for kind in config.layer_types]
        self.theta = [config.rope_parameters[kind]["rope_theta"] for kind in config.layer_types]

    def norm(self, name: str, x: Array) -> Array:
        return layer_norm(x, self.w[name + ".weight"], 0.0, self.eps) if name + ".weight" in self.w else x

    def embed(self, sample: Mapping[str, Array]) -> Array:
        return self.norm("embeddings.norm", self.w["embeddings.tok_embeddings.weight"][sample["input_ids"].astype(int)])

    def layer(self, i: int, x: Array, prompts: Array | None) -> Array:
        b = f"layers.{i}."
        tokens = x if prompts is None else np.concatenate([x, prompts])
        q, k, v = np.split(self.norm(b + "attn_norm", tokens) @ self.w[b + "attn.Wqkv.weight"].T, 3, axis=-1)
        size = q.shape[1] // self.heads
        mixed = np.zeros_like(x)
        for h in range(self.heads):
            part = slice(h * size, (h + 1) * size)
            for row in range(len(x)):
                query = rotated(q[row, part], row, self.theta[i])
                scores, values = [], []
                for column in range(len(tokens)):
                    key = k[column, part]
                    if column < len(x):
                        if self.local[i] and abs(row - column) > self.window:
                            continue
                        key = rotated(key, column, self.theta[i])
                    scores.append(float(query @ key) / math.sqrt(size))
                    values.append(v[column, part])
                exponents = np.exp(np.array(scores) - max(scores))
                mixed[row, part] = exponents @ np.array(values) / exponents.sum()
        x = x + mixed @ self.w[b + "attn.Wo.weight"].T
        value, gate = np.split(self.norm(b + "mlp_norm", x) @ self.w[b + "mlp.Wi.weight"].T, 2, axis=-1)
        return x + (gelu(value) * gate) @ self.w[b + "mlp.Wo.weight"].T

    def pool(self, x: Array) -> Array:
        return x[0]

    def finish(self, x: Array) -> Array:
        return self.norm("final_norm", x)[0]


def rotated(x: Array, position: int, theta: float) -> Array:
    """One head of one token, turned in the planes (m, m + half) by its position (2104.09864)."""
    half = len(x) // 2
    out = x.copy()
    for m in range(half):
        angle = position * theta ** (-m / half)
        out[m] = x[m] * math.cos(angle) - x[m + half] * math.sin(angle)
        out[m + half] = x[m + half] * math.cos(angle) + x[m] * math.sin(angle)
    return out
