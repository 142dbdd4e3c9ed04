"""Prefix form of timm's attentions: ``Attention`` of its ViTs, ``EvaAttention`` and ``AttentionRope`` of its Evas.

The attention is written out on the library's own weights, as the library's forward pass makes a query of every row.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import apply_rot_embed_cat
from torch import Tensor, nn

from mope_deploy.model.backbones.prefix import PrefixKV, Projection, joined, mixed_values, split_heads, split_qkv

__all__ = ["prefix_attention", "projection", "qkv_bias", "queries_keys_values"]


def prefix_attention(
    attention: Any, x: Tensor, prompts: Tensor | None, kv: PrefixKV | None, angles: Tensor | None = None
) -> Tensor:
    """Attention of tokens to themselves, to prompts, and to prompts whose keys and values were made before.

    Args:
        attention: timm's module.
        x: normed tokens (B, N, D).
        prompts: normed prompts (B, P, D) or None.
        kv: keys and values (B, P', inner) or None.
        angles: rotary angles of the patches, [sin, cos] (patches, 2 d), with an axis of heads where each has its own.

    Returns:
        (B, N, D).
    """
    N = x.shape[1]
    q, k, v = queries_keys_values(attention, x, prompts)
    k, v = joined(k, kv, 0), joined(v, kv, 1)
    q, k, v = (split_heads(each, attention.num_heads) for each in (q, k, v))  # (B, heads, …, d)
    q, k = attention.q_norm(q), attention.k_norm(k)
    if angles is not None:
        q, k = (_rotated(attention, each, N, angles).type_as(v) for each in (q, k))
    mixed = mixed_values(q, k, v)  # (B, heads, N, d)
    mixed = attention.norm(mixed.transpose(1, 2).flatten(2))
    if attention.gate is not None:
        mixed = mixed * attention.gate(x).sigmoid()
    return attention.proj(mixed)


def projection(block: Any) -> Projection:
    """How a block of timm's makes keys and values of prompts."""
    attention = block.attn
    norm = None if isinstance(block.norm1, nn.Identity) else block.norm1
    if attention.qkv is None:
        return Projection.of(norm, attention.k_proj, attention.v_proj)
    weight, bias = attention.qkv.weight, qkv_bias(attention)
    inner = len(weight) // 3
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    # A prompt makes no query in the graph, where ``exported/separate.py`` gave each of the three its own.
    return Projection(norm, weight[inner:], bias[inner:], product=2 * inner)


def queries_keys_values(attention: Any, x: Tensor, prompts: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Of normed tokens (B, N, D) and normed prompts (B, P, D): q (B, N, inner), k and v (B, N + P, inner)."""
    rows = x if prompts is None else torch.cat([x, prompts], dim=1)  # (B, N + P, D)
    if attention.qkv is None:
        return attention.q_proj(x), attention.k_proj(rows), attention.v_proj(rows)
    N = x.shape[1]
    if getattr(attention, "q_bias", None) is None:
        return split_qkv(attention.qkv(rows), N)
    return split_qkv(attention.qkv(rows) + qkv_bias(attention), N)


def qkv_bias(attention: Any) -> Tensor | None:
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
