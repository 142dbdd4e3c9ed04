"""The mapper: makes one prompt token of the main encoder's width from y (2312.03734, section 3.2).

Linear(D_y → D_y/2) + GELU, then one Linear + GELU for each width of the main encoder: one in all for most, one a stage
where patches are merged. No normalisation over the batch anywhere, so
a sample's prompt never depends on its batch-mates and a batch of one trains.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

__all__ = ["Mapper"]


class Mapper(nn.Module):
    """y (B, D_y) → one mapped prompt token (B, D) for each width D of the layers it serves.

    Args:
        width_y: D_y.
        bottleneck: width between the two layers; the paper's is D_y/2.
        widths: D of every layer; repeats share their projection.
    """

    def __init__(self, *, width_y: int, bottleneck: int, widths: Iterable[int]) -> None:
        super().__init__()
        self.widths = tuple(dict.fromkeys(widths))
        self.down = nn.Linear(width_y, bottleneck)
        # A single projection keeps its plain name, mappers.….up.weight; several are named by their width.
        self.up: nn.Module
        if len(self.widths) == 1:
            self.up = nn.Linear(bottleneck, self.widths[0])
        else:
            self.up = nn.ModuleDict({str(width): nn.Linear(bottleneck, width) for width in self.widths})

    def forward(self, y: Tensor) -> dict[int, Tensor]:
        """The mapped prompt token in every width. y (B, D_y) → {D: (B, D)}."""
        y = nn.functional.gelu(self.down(y))
        ups = self.up if isinstance(self.up, nn.ModuleDict) else {str(self.widths[0]): self.up}
        return {width: nn.functional.gelu(ups[str(width)](y)) for width in self.widths}
