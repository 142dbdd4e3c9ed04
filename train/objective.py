"""What training minimises: the task's loss plus the importance loss (2403.10568, section 3.4)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mope_deploy.model import MoPE, importance_loss
from train.losses import LOSSES

__all__ = ["Objective"]


class Objective(nn.Module):
    """A model together with its loss, so that data parallelism and mixed precision wrap both.

    Args:
        model: the model to train.
        importance_weight: weight of the importance loss.
        importance_threshold: its γ.
    """

    def __init__(self, model: MoPE, *, importance_weight: float, importance_threshold: float) -> None:
        super().__init__()
        self.model = model
        self.importance_weight, self.importance_threshold = importance_weight, importance_threshold
        self._loss = LOSSES[type(model.task)]

    def forward(
        self, inputs: Mapping[str, Tensor], labels: Tensor, y: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Loss and logits of a batch.

        Args:
            inputs: the model's inputs.
            labels: as the model's task encodes them, (B,) or (B, C).
            y: features of the complementary encoders, if they were computed before.

        Returns:
            ``loss`` and ``importance``, float32 scalars, and ``logits`` float32 (B, C). In evaluation mode the loss is
            the task's alone: the importance loss says something about a training batch only.
        """
        out = self.model(inputs, y=y)
        logits = out.logits.float()  # (B, C)
        loss = self._loss(logits, labels)
        importance = torch.zeros((), device=logits.device)
        if self.training and out.soft_routing is not None and self.importance_weight > 0:
            importance = importance_loss(out.soft_routing, self.importance_threshold)
            loss = loss + self.importance_weight * importance
        return {"loss": loss, "logits": logits, "importance": importance.detach()}
