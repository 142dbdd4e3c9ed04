"""The importance loss: keeps every expert in use (2403.10568, section 3.4)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["importance_loss"]


def importance_loss(soft_routing: Tensor, threshold: float = 0.1) -> Tensor:
    """CV² of the experts' importance, averaged over layers.

    I_k = Σ_batch r_k and CV² = var(I)/mean(I)², counted only where CV² > γ. The variance is the population's, so one
    expert gives 0. Under data parallelism I is summed across processes, gradients included: every process gets the
    loss of the whole batch.

    Args:
        soft_routing: r (B, layers, K) before any top-k selection, rows sum to 1.
        threshold: γ ≥ 0; layers with CV² at or below it count as 0.

    Returns:
        A scalar ≥ 0 in float32. At B < K it is positive even for perfectly balanced one-hot routing: K/B − 1.
    """
    importance = soft_routing.float().sum(dim=0)  # (layers, K)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        importance = _SumAcrossProcesses.apply(importance)
    variance = importance.var(dim=-1, unbiased=False)
    cv2 = variance / importance.mean(dim=-1).square()  # (layers,)
    return torch.where(cv2 > threshold, cv2, torch.zeros_like(cv2)).mean()


class _SumAcrossProcesses(torch.autograd.Function):
    """Σ over processes; every process's loss depends on every process's tensor, so gradients are summed as well."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total
