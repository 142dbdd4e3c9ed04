"""Which tokens are real and which may be attended to. Prompts always may.

Letters: B batch · N tokens · P prompts.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["blocked", "masked_mean", "prompts_seen", "prompts_unmasked"]


def blocked(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The additive attention mask of every query: 0 for real keys, the most negative number for others.

    (B, N) int64, 1 = real → (B, 1, 1, N).
    """
    return (1 - mask[:, None, None, :]).to(dtype) * torch.finfo(dtype).min


def prompts_unmasked(mask: Tensor, P: int) -> Tensor:
    """Which of [x ; prompts] may be attended to, from which of x may. (B, N) int64 → (B, N + P) int64."""
    return mask if P == 0 else torch.cat([mask, mask.new_ones(mask.shape[0], P)], dim=1)


def prompts_seen(bias: Tensor, P: int) -> Tensor:
    """An additive mask or bias of N keys, and 0 for P prompts behind them. (…, N) → (…, N + P)."""
    return torch.cat([bias, bias.new_zeros(*bias.shape[:-1], P)], dim=-1)


def masked_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of the real tokens, at least one of each sample. x (B, N, D), mask (B, N) or None for all → (B, D)."""
    if mask is None:
        return x.mean(dim=1)
    weights = mask.to(x.dtype)  # (B, N)
    return (x * weights.unsqueeze(-1)).sum(dim=1) / weights.sum(dim=1, keepdim=True)
