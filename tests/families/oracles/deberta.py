"""A transformers DeBERTa-v2 by loops: disentangled attention (2006.03654, section 3), one score at a time.

score(i, j) = (q_i · k_j + q_i · K^r[δ(i, j)] + k_j · Q^r[δ(j, i)]) / sqrt(3 d); a prompt j has the first term alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.oracle import Array, Weights, gelu, layer_norm


class DebertaOracle:
    """One sample through a DeBERTa-v2 or -v3; see :mod:`tests.families.oracles`."""

    def __init__(self, weights: Weights, encoder: Any) -> None:
        self.w = weights
        config = encoder.config
        self.heads, self.eps = config.num_attention_heads, config.layer_norm_eps
        self.buckets = getattr(config, "position_buckets", -1)
        self.farthest = config.max_relative_positions
        if self.farthest < 1:
            self.farthest = config.max_position_embeddings
        self.span = self.buckets if self.buckets > 0 else self.farthest
        self.shared = getattr(config, "share_att_key", False)
        relative = weights["encoder.rel_embeddings.weight"]
        self.relative = self.norm("encoder.LayerNorm", relative) if "encoder.LayerNorm.weight" in weights else relative

    def linear(self, name: str, x: Array) -> Array:
        return x @ self.w[name + ".weight"].T + self.w[name + ".bias"]

    def norm(self, name: str, x: Array) -> Array:
        return layer_norm(x, self.w[name + ".weight"], self.w[name + ".bias"], self.eps)

    def bucket(self, distance: int) -> int:
        """A distance, exact up to half of the buckets and logarithmic beyond."""
        middle = self.buckets // 2
        if self.buckets <= 0 or abs(distance) <= middle:
            return distance
        step = math.log(abs(distance) / middle) / math.log((self.farthest - 1) / middle) * (middle - 1)
        return int(math.copysign(middle + math.ceil(step), distance))

    def clip(self, index: int) -> int:
        return min(max(index, 0), 2 * self.span - 1)

    def embed(self, sample: Mapping[str, Array]) -> Array:
        w, t = self.w, "embeddings."
        ids = sample["input_ids"].astype(int)
        x = w[t + "word_embeddings.weight"][ids]
        if t + "position_embeddings.weight" in w:
            x = x + w[t + "position_embeddings.weight"][: len(ids)]
        if t + "token_type_embeddings.weight" in w:
            x = x + w[t + "token_type_embeddings.weight"][0]
        return self.norm(t + "LayerNorm", x)

    def layer(self, i: int, x: Array, prompts: Array | None) -> Array:
        a, b = f"encoder.layer.{i}.attention.self.", f"encoder.layer.{i}."
        tokens = x if prompts is None else np.concatenate([x, prompts])
        q, k, v = (self.linear(f"{a}{part}_proj", tokens) for part in ("query", "key", "value"))
        position_keys = self.linear(a + ("key_proj" if self.shared else "pos_key_proj"), self.relative)
        position_queries = self.linear(a + ("query_proj" if self.shared else "pos_query_proj"), self.relative)
        size = q.shape[1] // self.heads
        mixed = np.zeros_like(x)
        for h in range(self.heads):
            part = slice(h * size, (h + 1) * size)
            for row in range(len(x)):
                scores = []
                for column in range(len(tokens)):
                    score = float(q[row, part] @ k[column, part])
                    if column < len(x):
                        to_position = self.clip(self.bucket(row - column) + self.span)
                        from_position = self.clip(self.span - self.bucket(column - row))
                        score += float(q[row, part] @ position_keys[to_position, part])
                        score += float(k[column, part] @ position_queries[from_position, part])
                    scores.append(score / math.sqrt(3 * size))
                exponents = np.exp(np.array(scores) - max(scores))
                mixed[row, part] = exponents @ v[:, part] / exponents.sum()
        h_ = self.norm(b + "attention.output.LayerNorm", x + self.linear(b + "attention.output.dense", mixed))
        hidden = gelu(self.linear(b + "intermediate.dense", h_))
        out = self.norm(b + "output.LayerNorm", h_ + self.linear(b + "output.dense", hidden))
        return self.convolved(x, out) if i == 0 and "encoder.conv.conv.weight" in self.w else out

    def convolved(self, x: Array, out: Array) -> Array:
        """v2-xlarge: a convolution over the text's embeddings, added to the first layer's output."""
        kernel, bias = self.w["encoder.conv.conv.weight"], self.w["encoder.conv.conv.bias"]  # (D, D, taps)
        taps = kernel.shape[2]
        sums = []
        for position in range(len(x)):
            total = bias.copy()
            for tap in range(taps):
                neighbour = position + tap - taps // 2
                if 0 <= neighbour < len(x):
                    total += kernel[:, :, tap] @ x[neighbour]
            sums.append(np.tanh(total))
        return self.norm("encoder.conv.LayerNorm", out + np.array(sums))

    def pool(self, x: Array) -> Array:
        return x[0]

    def finish(self, x: Array) -> Array:
        return x[0]
