"""What training minimises: the task's loss plus the importance loss (2403.10568, section 3.4)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mope_deploy.model import MoPE, importance_loss

__all__ = ["Objective"]


class Objective(nn.Module):
    """A model together with its loss, so that data parallelism and mixed precision wrap both.

    Args:
        model: the model to train.
        importance_weight: weight of the importance loss.
        importance_threshold: its γ.

    Attributes:
        trained: the parameters that train.
    """

    def __init__(self, model: MoPE, *, importance_weight: float, importance_threshold: float) -> None:
        super().__init__()
        self.model = model
        self.importance_weight, self.importance_threshold = importance_weight, importance_threshold
        self.trained = tuple(model.trained_parameters().values())

    def train(self, mode: bool = True) -> Objective:
        """As any module's; free where nothing changes, because the Trainer calls it in every step."""
        if self.training == self.model.training == mode:
            return self
        return super().train(mode)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As any module's, without going through the frozen tensors, which are the most by far."""
        if not set_to_none:
            super().zero_grad(set_to_none=False)
            return
        for parameter in self.trained:
            parameter.grad = None

    def forward(
        self, inputs: Mapping[str, Tensor], labels: Tensor, y: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Loss and logits of a batch.

        Args:
            inputs: the model's inputs.
            labels: class indices int64 (B,), or for multi-label float32 (B, C) of 0 and 1.
            y: features of the complementary encoders, if they were computed before.

        Returns:
            ``loss`` and ``importance``, float32 scalars, and ``logits`` float32 (B, C). In evaluation mode the loss is
            the task's alone: the importance loss says something about a training batch only.
        """
        out = self.model(inputs, y=y)
        logits = out.logits.float()  # (B, C)
        if self.model.config.multi_label:
            loss = nn.functional.binary_cross_entropy_with_logits(logits, labels)
        else:
            loss = nn.functional.cross_entropy(logits, labels)
        importance = torch.zeros((), device=logits.device)
        if self.training and out.soft_routing is not None and self.importance_weight > 0:
            importance = importance_loss(out.soft_routing, self.importance_threshold)
            loss = loss + self.importance_weight * importance
        return {"loss": loss, "logits": logits, "importance": importance.detach()}
