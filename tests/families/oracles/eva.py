"""A timm Eva by loops: one angle per patch, none for prefix tokens and prompts, which are simply not rotated here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.oracle import Array, Weights, attention, gelu, layer_norm


class EvaOracle:
    """One sample through an Eva; see :mod:`tests.families.oracles`."""

    def __init__(self, weights: Weights, encoder: Any) -> None:
        self.w = weights
        self.grid = encoder.patch_embed.grid_size
        self.heads = encoder.blocks[0].attn.num_heads
        self.pooling = encoder.global_pool
        self.rope = encoder.rope
        self.eps = encoder.blocks[0].norm1.eps
        self.prefix_tokens = [
            weights[name][0, i]
            for name in ("cls_token", "reg_token")
            if name in weights
            for i in range(len(weights[name][0]))
        ]
        self.prefix = len(self.prefix_tokens)

    def embed(self, sample: Mapping[str, Array]) -> Array:
        w = self.w
        kernel = w["patch_embed.proj.weight"]
        height, width = kernel.shape[2:]
        patches = []
        for row in range(self.grid[0]):
            for column in range(self.grid[1]):
                window = sample["pixel_values"][
                    :, row * height : (row + 1) * height, column * width : (column + 1) * width
                ]
                patches.append((kernel * window).sum(axis=(1, 2, 3)) + w["patch_embed.proj.bias"])
        x = np.array([*self.prefix_tokens, *patches])
        return x + w["pos_embed"][0] if "pos_embed" in w else x

    def angle(self, layer: int, head: int, patch: int, pair: int, pairs: int) -> float:
        """By how much one pair of features of one patch is turned."""
        row, column = divmod(patch, self.grid[1])
        kind = type(self.rope).__name__
        if kind == "RotaryEmbeddingMixed":  # RoPE-ViT: frequencies of each layer and head are learned
            x, y = self.w["rope.freqs"][:, layer, head, pair]
            return column * x + row * y
        # The first half of the pairs turns by the row, the second by the column.
        along, size, place = (row, self.grid[0], 0) if pair < pairs // 2 else (column, self.grid[1], 1)
        exponent = (pair % (pairs // 2)) / (pairs // 2)
        if kind == "RotaryEmbeddingDinoV3":
            centred = 2 * (along + 0.5) / size - 1
            return 2 * math.pi * centred / self.rope.temperature**exponent
        assert kind == "RotaryEmbeddingCat"
        return along / size * self.rope.ref_feat_shape[place] / self.rope.temperature**exponent

    def rotated(self, layer: int, rows: Array) -> Array:
        """Queries or keys (tokens, D) with every patch's turned; what stands before and behind the patches stays."""
        out = rows.copy()
        size = rows.shape[1] // self.heads
        pairs = size // 2
        half = self.rope.rotate_half if hasattr(self.rope, "rotate_half") else False
        for head in range(self.heads):
            for patch in range(self.grid[0] * self.grid[1]):
                for pair in range(pairs):
                    first, second = (pair, pair + pairs) if half else (2 * pair, 2 * pair + 1)
                    a, b = head * size + first, head * size + second
                    angle = self.angle(layer, head, patch, pair, pairs)
                    token = self.prefix + patch
                    out[token, a] = rows[token, a] * math.cos(angle) - rows[token, b] * math.sin(angle)
                    out[token, b] = rows[token, b] * math.cos(angle) + rows[token, a] * math.sin(angle)
        return out

    def layer(self, i: int, x: Array, prompts: Array | None) -> Array:
        w, b = self.w, f"blocks.{i}."
        tokens = x if prompts is None else np.concatenate([x, prompts])
        normed = layer_norm(tokens, w[b + "norm1.weight"], w[b + "norm1.bias"], self.eps)
        q, k, v = self.qkv(normed, b + "attn.")
        mixed = attention(self.rotated(i, q)[: len(x)], self.rotated(i, k), v, self.heads)
        mixed = mixed @ w[b + "attn.proj.weight"].T + w[b + "attn.proj.bias"]
        x = x + mixed * w.get(b + "gamma_1", 1.0)
        normed = layer_norm(x, w[b + "norm2.weight"], w[b + "norm2.bias"], self.eps)
        return x + self.mlp(normed, b + "mlp.") * w.get(b + "gamma_2", 1.0)

    def qkv(self, x: Array, a: str) -> tuple[Array, Array, Array]:
        w = self.w
        if a + "q_proj.weight" in w:
            return tuple(x @ w[f"{a}{n}_proj.weight"].T + w.get(f"{a}{n}_proj.bias", 0.0) for n in "qkv")  # type: ignore[return-value]
        q, k, v = np.split(x @ w[a + "qkv.weight"].T + w.get(a + "qkv.bias", 0.0), 3, axis=-1)
        return q + w.get(a + "q_bias", 0.0), k, v + w.get(a + "v_bias", 0.0)

    def mlp(self, x: Array, m: str) -> Array:
        w = self.w
        if m + "fc1_g.weight" in w:
            gate = x @ w[m + "fc1_g.weight"].T + w[m + "fc1_g.bias"]
            hidden = gate / (1 + np.exp(-gate)) * (x @ w[m + "fc1_x.weight"].T + w[m + "fc1_x.bias"])
            hidden = layer_norm(hidden, w[m + "norm.weight"], w[m + "norm.bias"], self.eps)
        else:
            hidden = gelu(x @ w[m + "fc1.weight"].T + w[m + "fc1.bias"])
        return hidden @ w[m + "fc2.weight"].T + w[m + "fc2.bias"]

    def pool(self, x: Array) -> Array:
        return x[0]

    def finish(self, x: Array) -> Array:
        w = self.w
        if "norm.weight" in w:
            x = layer_norm(x, w["norm.weight"], w["norm.bias"], self.eps)
        feature = x[0] if self.pooling == "token" else x[self.prefix :].mean(axis=0)
        if "fc_norm.weight" in w:
            feature = layer_norm(feature, w["fc_norm.weight"], w["fc_norm.bias"], self.eps)
        return feature
