"""The mapper: makes one prompt token of the main encoder's width from y (2312.03734, section 3.2).

Linear(D_y → D_y/2) + GELU, then Linear + GELU to the main encoder's width. No normalisation over the batch anywhere, so
a sample's prompt never depends on its batch-mates and a batch of one trains.
"""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["Mapper"]


class Mapper(nn.Module):
    """y (B, D_y) → one mapped prompt token (B, D).

    Args:
        width_y: D_y.
        bottleneck: width between the two layers; the paper's is D_y/2.
        width: D of the main encoder.
    """

    def __init__(self, *, width_y: int, bottleneck: int, width: int) -> None:
        super().__init__()
        self.down = nn.Linear(width_y, bottleneck)
        self.up = nn.Linear(bottleneck, width)

    def forward(self, y: Tensor) -> Tensor:
        """The mapped prompt token. y (B, D_y) → (B, D)."""
        y = nn.functional.gelu(self.down(y))
        return nn.functional.gelu(self.up(y))
