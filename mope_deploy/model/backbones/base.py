"""What MoPE needs from a frozen encoder of any family: its layers one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

__all__ = ["Backbone"]


@runtime_checkable
class Backbone(Protocol):
    """One frozen encoder, run layer by layer so that each layer can have prompts of its own.

    Attributes:
        modality: ``"image"`` or ``"text"``.
        width: D, width of its hidden states.
        depth: number of layers.
        feature_width: width of the pooled feature that :meth:`finish` returns.
        input_names: the inputs it reads, by name.
        encoder: the library's own module, whose weights the fingerprint covers.
    """

    modality: str
    width: int
    depth: int
    feature_width: int
    input_names: tuple[str, ...]
    encoder: nn.Module

    def embed(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Tokens x (B, N, D) before the first layer, and which of them are real (B, N), or None if all are."""
        ...

    def layer(self, index: int, x: Tensor, prompts: Tensor | None, mask: Tensor | None) -> Tensor:
        """Layer ``index`` on [x ; prompts]; the prompts' own outputs are dropped. (B, N, D), (B, P, D) → (B, N, D)."""
        ...

    def pool(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """What a router reads: the class token, or the mean of the real tokens. (B, N, D) → (B, D)."""
        ...

    def finish(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The encoder's pooled feature after its last layer. (B, N, D) → (B, feature_width)."""
        ...

    def save_source(self, folder: str) -> None:
        """Write the encoder's architecture and weights where a ``dir:`` source reads them."""
        ...

    # What a frozen nn.Module offers besides; spelled out because a protocol cannot inherit from a class.
    def requires_grad_(self, requires_grad: bool = True) -> nn.Module: ...
    def eval(self) -> nn.Module: ...
