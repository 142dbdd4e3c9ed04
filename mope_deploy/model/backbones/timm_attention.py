"""Prefix form of timm's attentions: ``Attention`` of its ViTs, ``EvaAttention`` and ``AttentionRope`` of its Evas.

The attention is written out on the library's own weights, as the library's forward pass makes a query of every row.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import apply_rot_embed_cat
from torch import Tensor, nn

from mope_deploy.model.backbones.prefix import Projection, joined, split_heads, thirds

__all__ = ["prefix_attention", "projection"]


def prefix_attention(
    attention: Any, rows: Tensor, tokens: int, kv: Tensor | None, angles: Tensor | None = None
) -> Tensor:
    """Attention of the first ``tokens`` rows to all rows and to prompts whose keys and values were made before.

    Args:
        attention: timm's module.
        rows: normed tokens and, behind them, normed prompts (B, N + P, D).
        tokens: N.
        kv: (B, 2, P', inner) or None.
        angles: rotary angles of the patches, [sin, cos] (patches, 2 d), with an axis of heads where each has its own.

    Returns:
        (B, N, D).
    """
    q, k, v = _qkv(attention, rows, tokens)
    k, v = joined(k, kv, 0), joined(v, kv, 1)
    q, k, v = (split_heads(each, attention.num_heads) for each in (q, k, v))  # (B, heads, …, d)
    q, k = attention.q_norm(q), attention.k_norm(k)
    if angles is not None:
        q, k = (_rotated(attention, each, tokens, angles).type_as(v) for each in (q, k))
    x = nn.functional.scaled_dot_product_attention(q, k, v)  # (B, heads, N, d)
    x = attention.norm(x.transpose(1, 2).flatten(2))
    if attention.gate is not None:
        x = x * attention.gate(rows[:, :tokens]).sigmoid()
    return attention.proj(x)


def projection(block: Any) -> Projection:
    """How a block of timm's makes keys and values of prompts."""
    attention = block.attn
    norm = None if isinstance(block.norm1, nn.Identity) else block.norm1
    if attention.qkv is None:
        return Projection.of(norm, attention.k_proj, attention.v_proj)
    product = len(attention.qkv.weight)
    inner = product // 3
    weight, bias = attention.qkv.weight, _bias(attention)
    bias = weight.new_zeros(product) if bias is None else bias
    return Projection(norm, weight[inner:], bias[inner:], product=product)


def _qkv(attention: Any, rows: Tensor, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, N, inner) of the tokens, k and v (B, N + P, inner) of all rows."""
    if getattr(attention, "qkv", None) is None:
        return attention.q_proj(rows[:, :tokens]), attention.k_proj(rows), attention.v_proj(rows)
    if getattr(attention, "q_bias", None) is None:
        return thirds(attention.qkv(rows), tokens)
    if attention.qkv_bias_separate:
        return thirds(attention.qkv(rows) + _bias(attention), tokens)
    return thirds(nn.functional.linear(rows, attention.qkv.weight, _bias(attention)), tokens)


def _bias(attention: Any) -> Tensor | None:
    """The bias (3 · inner,) of the joint product, which some of timm's attentions keep in parts."""
    if getattr(attention, "q_bias", None) is None:
        return attention.qkv.bias
    return torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])


def _rotated(attention: Any, x: Tensor, tokens: int, angles: Tensor) -> Tensor:
    """Queries or keys (B, heads, …, d) with the patches among them turned: not prefix tokens, not prompts."""
    first = attention.num_prefix_tokens
    half = getattr(attention, "rotate_half", False)
    turned = apply_rot_embed_cat(x[:, :, first:tokens], angles, half=half)
    return torch.cat([x[:, :, :first], turned, x[:, :, tokens:]], dim=2)
