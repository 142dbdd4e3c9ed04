"""The prompts of one layer: static P_s, dynamic P_d and mapped P_m (2403.10568, section 3.2)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mope_deploy.model.experts import PromptExperts
from mope_deploy.model.mapper import Mapper
from mope_deploy.model.router import Router, Routing

__all__ = ["LayerPrompts", "StaticPrompt"]


class StaticPrompt(nn.Module):
    """P_s: L tokens that are the same for every sample.

    Args:
        prompt_length: L.
        width: D of the encoder they condition.
    """

    def __init__(self, *, prompt_length: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(prompt_length, width))

    def forward(self, batch: int) -> Tensor:
        """The prompt of every sample, as a view: (B, L, D)."""
        return self.tokens.unsqueeze(0).expand(batch, -1, -1)


class LayerPrompts(nn.Module):
    """Everything that conditions one layer of the main encoder.

    Args:
        static: P_s, or None to switch it off.
        experts: E for the dynamic prompt P_d, or None; needs ``router`` exactly if given.
        router: mixes the experts.
        mappers: this layer's own mapper per complementary modality; empty where a shared one (or none) is used.
        dropout: probability of the dropout on all prompts, in training only.
    """

    def __init__(
        self,
        *,
        static: StaticPrompt | None,
        experts: PromptExperts | None,
        router: Router | None,
        mappers: Mapping[str, Mapper],
        dropout: float,
    ) -> None:
        super().__init__()
        assert (experts is None) == (router is None)
        self.static, self.experts, self.router = static, experts, router
        self.mappers = nn.ModuleDict(mappers)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, pooled_x: Tensor, y: Mapping[str, Tensor], mapped: Tensor | None
    ) -> tuple[Tensor | None, Routing | None]:
        """The layer's prompts [P_s ; P_d ; P_m] and how they were routed.

        Args:
            pooled_x: what the router reads of x, (B, D).
            y: complementary features, {modality: (B, D_y)}.
            mapped: tokens of mappers shared by all layers (B, M, D), or None.

        Returns:
            Prompts (B, P, D) or None if every kind is off, and the routing or None without dynamic prompts.
        """
        parts: list[Tensor] = []
        routing = None
        if self.static is not None:
            parts.append(self.static(pooled_x.shape[0]))
        if self.experts is not None and self.router is not None:
            routing = self.router(pooled_x, y)
            parts.append(self.experts(routing.weights))
        if mapped is not None:
            parts.append(mapped)
        parts += [mapper(y[name])[pooled_x.shape[1]].unsqueeze(1) for name, mapper in self.mappers.items()]
        return (self.dropout(torch.cat(parts, dim=1)) if parts else None), routing
