"""A timm Beit by loops: a ViT whose scores have a bias for each pair of places, and none where a prompt takes part."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.oracle import Array, Weights, gelu, layer_norm


class BeitOracle:
    """One sample through a Beit; see :mod:`tests.families.oracles`."""

    def __init__(self, weights: Weights, encoder: Any) -> None:
        self.w = weights
        self.grid = encoder.patch_embed.grid_size
        self.heads = encoder.blocks[0].attn.num_heads

    def embed(self, sample: Mapping[str, Array]) -> Array:
        w = self.w
        kernel = w["patch_embed.proj.weight"]
        height, width = kernel.shape[2:]
        tokens = [w["cls_token"][0, 0]]
        for row in range(self.grid[0]):
            for column in range(self.grid[1]):
                top, left = row * height, column * width
                patch = sample["pixel_values"][:, top : top + height, left : left + width]
                tokens.append((kernel * patch).sum(axis=(1, 2, 3)) + w["patch_embed.proj.bias"])
        return np.array(tokens)

    def bias(self, table: Array, query: int, key: int) -> Array:
        """Of every head for two tokens; token 0 is the class token."""
        rows, columns = self.grid
        if query == 0 or key == 0:  # the last three entries: class to patch, patch to class, class to class
            return table[-1 if query == key else -3 if query == 0 else -2]
        (a, b), (c, d) = divmod(query - 1, columns), divmod(key - 1, columns)
        return table[(a - c + rows - 1) * (2 * columns - 1) + b - d + columns - 1]

    def layer(self, i: int, x: Array, prompts: Array | None) -> Array:
        w, b = self.w, f"blocks.{i}."
        tokens = x if prompts is None else np.concatenate([x, prompts])
        normed = layer_norm(tokens, w[b + "norm1.weight"], w[b + "norm1.bias"], 1e-6)
        q, k, v = np.split(normed @ w[b + "attn.qkv.weight"].T, 3, axis=-1)
        q, v = q + w[b + "attn.q_bias"], v + w[b + "attn.v_bias"]
        table = w[b + "attn.relative_position_bias_table"]
        size = x.shape[1] // self.heads
        mixed = np.zeros_like(x)
        for h in range(self.heads):
            part = slice(h * size, (h + 1) * size)
            for query in range(len(x)):
                scores = [float(q[query, part] @ key) / math.sqrt(size) for key in k[:, part]]
                for key in range(len(x)):
                    scores[key] += self.bias(table, query, key)[h]
                exponents = [math.exp(score - max(scores)) for score in scores]
                for weight, value in zip(exponents, v[:, part], strict=True):
                    mixed[query, part] += weight / sum(exponents) * value
        mixed = mixed @ w[b + "attn.proj.weight"].T + w[b + "attn.proj.bias"]
        x = x + mixed * w[b + "gamma_1"]
        normed = layer_norm(x, w[b + "norm2.weight"], w[b + "norm2.bias"], 1e-6)
        hidden = gelu(normed @ w[b + "mlp.fc1.weight"].T + w[b + "mlp.fc1.bias"])
        return x + (hidden @ w[b + "mlp.fc2.weight"].T + w[b + "mlp.fc2.bias"]) * w[b + "gamma_2"]

    def pool(self, x: Array) -> Array:
        return x[0]

    def finish(self, x: Array) -> Array:
        return layer_norm(x[1:].mean(axis=0), self.w["fc_norm.weight"], self.w["fc_norm.bias"], 1e-6)
