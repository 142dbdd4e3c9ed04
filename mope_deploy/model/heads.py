"""The head: one linear layer on the final pooled x alone (2403.10568, section 4.1).

No prompt token and no y reaches it, so whatever y contributes must come through the prompts.
"""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["ClassificationHead"]


class ClassificationHead(nn.Module):
    """Pooled feature (B, D) → logits (B, C).

    Args:
        width: width of the main encoder's pooled feature.
        classes: C.
    """

    def __init__(self, *, width: int, classes: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(width, classes)

    def forward(self, feature: Tensor) -> Tensor:
        """Logits of a batch. feature (B, D) → (B, C)."""
        return self.classifier(feature)
