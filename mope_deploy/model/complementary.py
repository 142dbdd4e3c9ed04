"""A complementary modality Y: its frozen encoder, with static prompts of its own, and its pooled feature y."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mope_deploy.model.backbones.base import Encoder, Form
from mope_deploy.model.prompts import StaticPrompt

__all__ = ["ComplementaryEncoder"]


class ComplementaryEncoder(nn.Module):
    """A frozen encoder Y with static prompts of its own, giving its pooled feature y.

    Args:
        backbone: the frozen encoder.
        prompts: one static prompt per layer, or none at all.
        dropout: probability of the dropout on its prompts, in training only.
        standardise: whether y leaves as (y − mean) / deviation with statistics set by :meth:`fit_statistics`.
    """

    def __init__(self, backbone: Encoder, *, prompts: list[StaticPrompt], dropout: float, standardise: bool) -> None:
        super().__init__()
        self.backbone = backbone
        self.prompts = nn.ModuleList(prompts)
        self.dropout = nn.Dropout(dropout)
        self.standardise = standardise
        self.y_mean: Tensor
        self.y_std: Tensor
        if standardise:
            self.register_buffer("y_mean", torch.zeros(backbone.feature_width))
            self.register_buffer("y_std", torch.ones(backbone.feature_width))

    def forward(self, inputs: Mapping[str, Tensor], *, form: Form = "prefix") -> Tensor:
        """The pooled feature y of a batch, standardised if asked for: (B, D_y)."""
        x, shared = self.backbone.embed(inputs)
        for i in range(self.backbone.depth):
            prompts = self.dropout(self.prompts[i](x.shape[0])) if len(self.prompts) else None
            x = self.backbone.run_layer(i, x, prompts, shared, form=form)
        y = self.backbone.finish(x, shared)
        return (y - self.y_mean) / self.y_std if self.standardise else y

    @torch.no_grad()
    def fit_statistics(self, y: Tensor) -> None:
        """Set mean and deviation from features y (samples, D_y) that were *not* yet standardised."""
        assert self.standardise
        self.y_mean.copy_(y.mean(dim=0))
        # A constant feature carries nothing; dividing by its rounding noise would make it loud.
        self.y_std.copy_(y.std(dim=0, unbiased=False).clamp_min(1e-4))
