"""The loss of each kind of task, as the mean over a batch.

Letters: B batch · C labels.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from mope_deploy.task import MultiLabel, SingleLabel

__all__ = ["LOSSES"]


LOSSES: dict[type, Callable[[Tensor, Tensor], Tensor]] = {
    SingleLabel: F.cross_entropy,
    MultiLabel: lambda logits, targets: F.binary_cross_entropy_with_logits(logits, targets.float()),
}
"""By the task's class: logits float32 (B, C) and targets as the task's ``encode`` makes them, to a scalar."""
