"""A timm Swin Transformer by loops over windows, heads and queries, on coordinates instead of rolled pictures.

The shifted window that a token belongs to, and which other tokens of it were its neighbours before the shift, follow
from coordinates alone. Windows may hang over the edge: what is missing there counts as a token of value zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.oracle import Array, Weights, gelu, layer_norm


class SwinOracle:
    """One sample through a Swin Transformer; see :mod:`tests.families.oracles`."""

    def __init__(self, weights: Weights, encoder: Any) -> None:
        self.w = weights
        self.patch = encoder.patch_embed.patch_size[0]
        self.blocks: list[tuple[str, Any]] = []
        self.merge_after: dict[int, str] = {}
        for s, stage in enumerate(encoder.layers):
            if s:
                self.merge_after[len(self.blocks) - 1] = f"layers.{s}.downsample."
            self.blocks += [(f"layers.{s}.blocks.{b}.", block) for b, block in enumerate(stage.blocks)]

    def embed(self, sample: Mapping[str, Array]) -> Array:
        w, p = self.w, self.patch
        image = sample["pixel_values"]
        kernel = w["patch_embed.proj.weight"]
        x = np.array(
            [
                (kernel * image[:, top : top + p, left : left + p]).sum(axis=(1, 2, 3)) + w["patch_embed.proj.bias"]
                for top in range(0, image.shape[1], p)
                for left in range(0, image.shape[2], p)
            ]
        )
        return layer_norm(x, w["patch_embed.norm.weight"], w["patch_embed.norm.bias"], 1e-5)

    def layer(self, i: int, x: Array, prompts: Array | None) -> Array:
        w, (b, block) = self.w, self.blocks[i]
        normed = layer_norm(x, w[b + "norm1.weight"], w[b + "norm1.bias"], 1e-5)
        extra = np.zeros((0, x.shape[1]))
        if prompts is not None:
            extra = layer_norm(prompts, w[b + "norm1.weight"], w[b + "norm1.bias"], 1e-5)
        x = x + self.attention(normed, extra, b + "attn.", block)
        normed = layer_norm(x, w[b + "norm2.weight"], w[b + "norm2.bias"], 1e-5)
        hidden = gelu(normed @ w[b + "mlp.fc1.weight"].T + w[b + "mlp.fc1.bias"])
        x = x + hidden @ w[b + "mlp.fc2.weight"].T + w[b + "mlp.fc2.bias"]
        return self.merge(x, block.input_resolution, self.merge_after[i]) if i in self.merge_after else x

    def attention(self, x: Array, prompts: Array, a: str, block: Any) -> Array:
        w, (H, W) = self.w, block.input_resolution
        (height, width), (down, right) = block.window_size, block.shift_size
        padded_h, padded_w = math.ceil(H / height) * height, math.ceil(W / width) * width
        heads = w[a + "relative_position_bias_table"].shape[1]
        table = w[a + "relative_position_bias_table"]

        def qkv(token: Array) -> list[Array]:
            return np.split(w[a + "qkv.weight"] @ token + w[a + "qkv.bias"], 3)

        # Where each place of the shifted and padded picture comes from; padding is behind the shift, and of value zero.
        rows = {}
        for r in range(padded_h):
            for c in range(padded_w):
                inside = r < H and c < W
                source = ((r + down) % H, (c + right) % W) if inside else None
                rows[r, c] = source, qkv(x[source[0] * W + source[1]] if source else np.zeros(x.shape[1]))
        extra = [qkv(prompt) for prompt in prompts]

        def region(r: int, c: int) -> tuple[int, int]:
            """Places of one shifted window were neighbours before if they are on the same side of both seams."""
            part = [0, 0]
            for axis, (at, size, window, shift) in enumerate(
                ((r, padded_h, height, down), (c, padded_w, width, right))
            ):
                part[axis] = 0 if at < size - window else 1 if at < size - shift else 2
            return part[0], part[1]

        out = np.zeros_like(x)
        d = x.shape[1] // heads
        for (r, c), (source, (q, _, _)) in rows.items():
            if source is None:
                continue
            top, left = r // height * height, c // width * width
            window = [(y, z) for y in range(top, top + height) for z in range(left, left + width)]
            for h in range(heads):
                part = slice(h * d, (h + 1) * d)
                scores, values = [], []
                for y, z in window:
                    _, (_, k, v) = rows[y, z]
                    bias = table[(r - y + height - 1) * (2 * width - 1) + c - z + width - 1, h]
                    far = (down or right) and region(r, c) != region(y, z)
                    scores.append(float(q[part] @ k[part]) / math.sqrt(d) + bias + (-100.0 if far else 0.0))
                    values.append(v[part])
                for _, k, v in extra:
                    scores.append(float(q[part] @ k[part]) / math.sqrt(d))
                    values.append(v[part])
                exponents = [math.exp(score - max(scores)) for score in scores]
                for weight, value in zip(exponents, values, strict=True):
                    out[source[0] * W + source[1], part] += weight / sum(exponents) * value
        return out @ w[a + "proj.weight"].T + w[a + "proj.bias"]

    def merge(self, x: Array, resolution: tuple[int, int], m: str) -> Array:
        w, (H, W) = self.w, resolution
        picture = np.zeros((H + H % 2, W + W % 2, x.shape[1]))
        picture[:H, :W] = x.reshape(H, W, -1)
        merged = np.array(
            [
                np.concatenate([picture[r, c], picture[r + 1, c], picture[r, c + 1], picture[r + 1, c + 1]])
                for r in range(0, H, 2)
                for c in range(0, W, 2)
            ]
        )
        return layer_norm(merged, w[m + "norm.weight"], w[m + "norm.bias"], 1e-5) @ w[m + "reduction.weight"].T

    def pool(self, x: Array) -> Array:
        return x.mean(axis=0)

    def finish(self, x: Array) -> Array:
        return layer_norm(x, self.w["norm.weight"], self.w["norm.bias"], 1e-5).mean(axis=0)
