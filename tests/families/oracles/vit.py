"""A timm VisionTransformer by loops: prefix tokens of every kind, LayerScale, pooling by token, mean or map."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.oracle import Array, Weights, attention, gelu, layer_norm


class ViTOracle:
    """One sample through a ViT; see :mod:`tests.families.oracles`."""

    def __init__(self, weights: Weights, encoder: Any) -> None:
        self.w = weights
        self.heads = encoder.blocks[0].attn.num_heads
        self.pooling = encoder.global_pool

    def embed(self, sample: Mapping[str, Array]) -> Array:
        w = self.w
        kernel = w["patch_embed.proj.weight"]
        height, width = kernel.shape[2:]
        image = sample["pixel_values"]
        patches = []
        for top in range(0, image.shape[1], height):
            for left in range(0, image.shape[2], width):
                patch = image[:, top : top + height, left : left + width]
                patches.append((kernel * patch).sum(axis=(1, 2, 3)) + w.get("patch_embed.proj.bias", 0.0))
        prefix = [
            w[name][0, i]
            for name in ("cls_token", "dist_token", "reg_token")
            if name in w
            for i in range(len(w[name][0]))
        ]
        positions = w["pos_embed"][0]
        if len(positions) == len(patches):  # prefix tokens have no position
            return np.array([*prefix, *(np.array(patches) + positions)])
        return np.array(prefix + patches) + positions

    def layer(self, i: int, x: Array, prompts: Array | None) -> Array:
        w, b = self.w, f"blocks.{i}."
        tokens = x if prompts is None else np.concatenate([x, prompts])
        normed = layer_norm(tokens, w[b + "norm1.weight"], w[b + "norm1.bias"], 1e-6)
        q, k, v = np.split(normed @ w[b + "attn.qkv.weight"].T + w[b + "attn.qkv.bias"], 3, axis=-1)
        mixed = attention(q[: len(x)], k, v, self.heads) @ w[b + "attn.proj.weight"].T + w[b + "attn.proj.bias"]
        x = x + mixed * w.get(b + "ls1.gamma", 1.0)
        normed = layer_norm(x, w[b + "norm2.weight"], w[b + "norm2.bias"], 1e-6)
        hidden = gelu(normed @ w[b + "mlp.fc1.weight"].T + w[b + "mlp.fc1.bias"])
        return x + (hidden @ w[b + "mlp.fc2.weight"].T + w[b + "mlp.fc2.bias"]) * w.get(b + "ls2.gamma", 1.0)

    @property
    def prefix(self) -> int:
        return sum(len(self.w[name][0]) for name in ("cls_token", "dist_token", "reg_token") if name in self.w)

    def pool(self, x: Array) -> Array:
        return x[0] if "cls_token" in self.w else x[self.prefix :].mean(axis=0)

    def finish(self, x: Array) -> Array:
        w = self.w
        if "norm.weight" in w:
            x = layer_norm(x, w["norm.weight"], w["norm.bias"], 1e-6)
        if "dist_token" in w:
            return (x[0] + x[1]) / 2
        if self.pooling == "map":
            return self.attention_pool(x)
        feature = x[0] if self.pooling == "token" else x[self.prefix :].mean(axis=0)
        if "fc_norm.weight" in w:
            feature = layer_norm(feature, w["fc_norm.weight"], w["fc_norm.bias"], 1e-6)
        return feature

    def attention_pool(self, x: Array) -> Array:
        """SigLIP's: one learned query over all tokens, then an MLP beside it."""
        w, a = self.w, "attn_pool."
        q = w[a + "latent"][0] @ w[a + "q.weight"].T + w[a + "q.bias"]
        k, v = np.split(x @ w[a + "kv.weight"].T + w[a + "kv.bias"], 2, axis=-1)
        pooled = (attention(q, k, v, self.heads) @ w[a + "proj.weight"].T + w[a + "proj.bias"])[0]
        normed = layer_norm(pooled, w[a + "norm.weight"], w[a + "norm.bias"], 1e-6)
        hidden = gelu(normed @ w[a + "mlp.fc1.weight"].T + w[a + "mlp.fc1.bias"])
        return pooled + hidden @ w[a + "mlp.fc2.weight"].T + w[a + "mlp.fc2.bias"]
