"""The prompt experts of one layer: K prompts of L tokens, mixed by the router (2403.10568, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["PromptExperts"]


class PromptExperts(nn.Module):
    """K prompt experts E (K, L, D).

    Args:
        experts: K.
        prompt_length: L, tokens of each expert.
        width: D of the main encoder.
    """

    def __init__(self, *, experts: int, prompt_length: int, width: int) -> None:
        super().__init__()
        self.prompts = nn.Parameter(torch.empty(experts, prompt_length, width))

    def forward(self, weights: Tensor) -> Tensor:
        """The dynamic prompt Σ_k r_k E_k of every sample. weights r (B, K) → (B, L, D)."""
        K, L, D = self.prompts.shape
        return (weights @ self.prompts.view(K, L * D)).view(-1, L, D)
