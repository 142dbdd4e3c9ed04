"""A weight each for queries, keys and values: slices of a joint product are copies in a graph."""

from __future__ import annotations

from typing import Any

from torch import nn

from mope_deploy.model.backbones.timm_attention import qkv_bias

__all__ = ["separate"]


def separate(attention: Any) -> None:
    """Give one of timm's attentions three weights in place of a joint one, in place, where it has that.

    What the library makes of such a module is undefined from then on;
    :func:`mope_deploy.model.backbones.timm_attention.queries_keys_values` reads both kinds. The new weights are
    views of the old one.
    """
    if attention.qkv is None:
        return
    weights, bias = attention.qkv.weight.detach().chunk(3), qkv_bias(attention)
    biases = (None,) * 3 if bias is None else bias.detach().chunk(3)
    attention.qkv = None
    for name, own, offset in zip(("q_proj", "k_proj", "v_proj"), weights, biases, strict=True):
        linear = nn.Linear(own.shape[1], own.shape[0], bias=offset is not None, device="meta")
        linear.weight = nn.Parameter(own, requires_grad=False)
        if offset is not None:
            linear.bias = nn.Parameter(offset, requires_grad=False)
        setattr(attention, name, linear)
