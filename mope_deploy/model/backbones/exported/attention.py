"""Attention in a graph: written out, and without the splits that older operator sets lack."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["attention_written_out", "sliced_qkv"]


def attention_written_out(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(q kᵀ / √d + bias) v. What the exporter makes of PyTorch's own operator looks up shapes to turn keys.

    q (B, heads, N, d), k and v (B, heads, N + P, d) → (B, heads, N, d).
    """
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    return torch.softmax(scores if bias is None else scores + bias, dim=-1) @ v


def sliced_qkv(qkv: Tensor, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`mope_deploy.model.backbones.prefix.split_qkv` by slices: older opsets have no split into parts."""
    inner = qkv.shape[-1] // 3
    return qkv[:, :tokens, :inner], qkv[..., inner : 2 * inner], qkv[..., 2 * inner :]
