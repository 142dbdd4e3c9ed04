"""The loss of each kind of task, as the mean over a batch.

Letters: B batch · C labels.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from mope_deploy.task import MultiLabel, SingleLabel

__all__ = ["LOSSES"]


def _one_of_many(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy: logits float32 (B, C), targets int64 (B,) → ()."""
    return F.cross_entropy(logits, targets)


def _each_for_itself(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross entropy: logits float32 (B, C), targets bool (B, C) → ()."""
    return F.binary_cross_entropy_with_logits(logits, targets.float())


LOSSES: dict[type, Callable[[Tensor, Tensor], Tensor]] = {SingleLabel: _one_of_many, MultiLabel: _each_for_itself}
"""By the task's class; targets are as its ``encode`` makes them."""
