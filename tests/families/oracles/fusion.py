"""MoPE around two encoder oracles, in float64, by loops over layer, expert and token (2403.10568, section 3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.oracle import Array, Weights, gelu, router


def mope(
    weights: Weights, config: Any, main: Any, complementary: Any, depths: tuple[int, int], sample: Mapping[str, Array]
) -> tuple[Array, Array]:
    """Logits (C,) and routing (layers, K) of one sample.

    Args:
        weights: every tensor of the model by its state-dict name, routing embeddings included.
        config: the model's configuration, read for its plain values only.
        main: oracle of the main encoder.
        complementary: oracle of the one complementary encoder.
        depths: layers of both, in this order.
        sample: inputs without batch axis and without padding.
    """
    (spec,) = config.complementary
    y_name = spec.modality
    y = complementary.embed(sample)
    for i in range(depths[1]):
        y = complementary.layer(i, y, weights.get(f"complementary.{y_name}.prompts.{i}.tokens"))
    y = complementary.finish(y)
    x = main.embed(sample)
    routing = []
    for i in range(depths[0]):
        r = router(weights, f"layers.{i}.router.", main.pool(x), y, config, y_name=y_name)
        routing.append(r)
        experts = weights[f"layers.{i}.experts.prompts"]
        prompts = list(weights[f"layers.{i}.static.tokens"])
        for token in range(experts.shape[1]):
            prompts.append(sum(r[k] * experts[k, token] for k in range(len(r))))
        prompts.append(mapper(weights, y_name, y, width=experts.shape[2]))
        x = main.layer(i, x, np.array(prompts))
    logits = weights["head.classifier.weight"] @ main.finish(x) + weights["head.classifier.bias"]
    return logits, np.array(routing)


def mapper(w: Weights, y_name: str, y: Array, *, width: int) -> Array:
    """The mapped prompt token of one layer."""
    prefix = f"mappers.{y_name}."
    down = gelu(w[prefix + "down.weight"] @ y + w[prefix + "down.bias"])
    # Where widths differ from layer to layer, each has its own projection.
    up = prefix + "up." if prefix + "up.weight" in w else f"{prefix}up.{width}."
    return gelu(w[up + "weight"] @ down + w[up + "bias"])
