"""MoPE and the two encoder families once more, in float64, by loops over batch, layer, expert and token.

Written from the papers' equations and the encoders' definitions; shares no code with the library. Padded tokens are
left out instead of masked, and attention is computed one query at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Weights = Mapping[str, Array]

_erf = np.vectorize(math.erf)


def mope(
    weights: Weights, config: object, sizes: Mapping[str, int], inputs: Mapping[str, Array]
) -> tuple[Array, Array]:
    """Logits (B, C) and routing (B, layers, K) of a whole batch, one sample after the other.

    Args:
        weights: every tensor of the model by its state-dict name, routing embeddings included.
        config: the model's configuration, read for its plain values only.
        sizes: depth and heads of both encoders, patch size.
        inputs: pixel_values, input_ids, attention_mask.
    """
    logits, routing = [], []
    for b in range(len(inputs["pixel_values"])):
        length = int(inputs["attention_mask"][b].sum())
        y = bert(weights, sizes, inputs["input_ids"][b][:length].astype(int), config)
        sample_logits, sample_routing = vit_with_prompts(weights, sizes, inputs["pixel_values"][b], y, config)
        logits.append(sample_logits)
        routing.append(sample_routing)
    return np.array(logits), np.array(routing)


def vit_with_prompts(
    w: Weights, sizes: Mapping[str, int], image: Array, y: Array, config: object
) -> tuple[Array, Array]:
    """One sample through the prompted ViT and the head."""
    e = "main.encoder."
    p = sizes["patch"]
    kernel = w[e + "patch_embed.proj.weight"].reshape(len(w[e + "patch_embed.proj.bias"]), -1)
    tokens = [w[e + "cls_token"][0, 0]]
    for row in range(image.shape[1] // p):
        for column in range(image.shape[2] // p):
            patch = image[:, row * p : (row + 1) * p, column * p : (column + 1) * p].reshape(-1)
            tokens.append(kernel @ patch + w[e + "patch_embed.proj.bias"])
    x = np.array(tokens) + w[e + "pos_embed"][0]
    routing = []
    for i in range(sizes["vit_depth"]):
        prompts = []
        if config.static:
            prompts += list(w[f"layers.{i}.static.tokens"])
        if config.dynamic:
            r = router(w, f"layers.{i}.router.", x[0], y, config)
            routing.append(r)
            experts = w[f"layers.{i}.experts.prompts"]
            for token in range(experts.shape[1]):
                prompts.append(sum(r[k] * experts[k, token] for k in range(len(r))))
        if config.mapped:
            prefix = f"layers.{i}.mappers.text." if config.mapper_per_layer else "mappers.text."
            down = gelu(w[prefix + "down.weight"] @ y + w[prefix + "down.bias"])
            prompts.append(gelu(w[prefix + "up.weight"] @ down + w[prefix + "up.bias"]))
        everything = np.array(list(x) + prompts)
        b = f"{e}blocks.{i}."
        normed = layer_norm(everything, w[b + "norm1.weight"], w[b + "norm1.bias"], 1e-6)
        qkv = normed @ w[b + "attn.qkv.weight"].T + w[b + "attn.qkv.bias"]
        q, k, v = np.split(qkv, 3, axis=-1)
        mixed = attention(q[: len(x)], k, v, sizes["vit_heads"])
        x = x + mixed @ w[b + "attn.proj.weight"].T + w[b + "attn.proj.bias"]
        normed = layer_norm(x, w[b + "norm2.weight"], w[b + "norm2.bias"], 1e-6)
        hidden = gelu(normed @ w[b + "mlp.fc1.weight"].T + w[b + "mlp.fc1.bias"])
        x = x + hidden @ w[b + "mlp.fc2.weight"].T + w[b + "mlp.fc2.bias"]
    feature = layer_norm(x, w[e + "norm.weight"], w[e + "norm.bias"], 1e-6)[0]
    logits = w["head.classifier.weight"] @ feature + w["head.classifier.bias"]
    return logits, np.array(routing)


def router(w: Weights, prefix: str, pooled_x: Array, y: Array, config: object, *, y_name: str = "text") -> Array:
    """r (K,) of one sample."""
    q = []
    if config.d_x:
        q += list(w[prefix + "project_x.weight"] @ pooled_x)
    q += list(w[f"{prefix}project_y.{y_name}.weight"] @ y)
    q = np.array(q)
    scores = []
    for u in w[prefix + "embeddings"]:
        score = float(q @ u)
        if config.similarity == "cosine":
            score /= math.sqrt(float(q @ q)) * math.sqrt(float(u @ u))
        scores.append(score / config.temperature)
    exponents = [math.exp(score - max(scores)) for score in scores]
    r = np.array([value / sum(exponents) for value in exponents])
    if config.top_k:
        kept = sorted(range(len(r)), key=lambda index: -r[index])[: config.top_k]
        r = np.array([r[index] if index in kept else 0.0 for index in range(len(r))])
        r = r / r.sum()
    return r


def bert(w: Weights, sizes: Mapping[str, int], ids: NDArray[np.int_], config: object) -> Array:
    """y of one text without padding."""
    e = "complementary.text.backbone.encoder."
    t = e + "embeddings."
    x = np.array(
        [
            w[t + "word_embeddings.weight"][token]
            + w[t + "position_embeddings.weight"][position]
            + w[t + "token_type_embeddings.weight"][0]
            for position, token in enumerate(ids)
        ]
    )
    x = layer_norm(x, w[t + "LayerNorm.weight"], w[t + "LayerNorm.bias"], 1e-12)
    for i in range(sizes["bert_depth"]):
        prompts = w.get(f"complementary.text.prompts.{i}.tokens")
        everything = x if prompts is None else np.concatenate([x, prompts])
        b = f"{e}encoder.layer.{i}."
        q, k, v = (
            everything @ w[f"{b}attention.self.{part}.weight"].T + w[f"{b}attention.self.{part}.bias"]
            for part in ("query", "key", "value")
        )
        mixed = attention(q[: len(x)], k, v, sizes["bert_heads"])
        mixed = mixed @ w[b + "attention.output.dense.weight"].T + w[b + "attention.output.dense.bias"]
        n = b + "attention.output.LayerNorm."
        x = layer_norm(x + mixed, w[n + "weight"], w[n + "bias"], 1e-12)
        hidden = gelu(x @ w[b + "intermediate.dense.weight"].T + w[b + "intermediate.dense.bias"])
        hidden = hidden @ w[b + "output.dense.weight"].T + w[b + "output.dense.bias"]
        x = layer_norm(x + hidden, w[b + "output.LayerNorm.weight"], w[b + "output.LayerNorm.bias"], 1e-12)
    y = x[0]
    if config.y_norm == "standardise":
        y = (y - w["complementary.text.y_mean"]) / w["complementary.text.y_std"]
    return y


def attention(q: Array, k: Array, v: Array, heads: int) -> Array:
    """Softmax attention, one head and one query at a time."""
    size = q.shape[1] // heads
    out = np.zeros_like(q)
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        for row in range(len(q)):
            scores = [float(q[row, part] @ key) / math.sqrt(size) for key in k[:, part]]
            exponents = [math.exp(score - max(scores)) for score in scores]
            for weight, value in zip(exponents, v[:, part], strict=True):
                out[row, part] += weight / sum(exponents) * value
    return out


def layer_norm(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    """LayerNorm over the last axis."""
    mean = x.mean(axis=-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(axis=-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + eps) * weight + bias


def gelu(x: Array) -> Array:
    """The exact GELU."""
    return 0.5 * x * (1 + _erf(x / math.sqrt(2)))
