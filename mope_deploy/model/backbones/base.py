"""What MoPE needs from a frozen encoder of any family: its layers one at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mope_deploy.model.backbones.prefix import Made, Projection

__all__ = ["Backbone", "masked_mean"]


class Backbone(nn.Module, ABC):
    """One frozen encoder, run layer by layer so that each layer can have prompts of its own.

    Attributes:
        modality: ``"image"``, ``"text"``, ``"audio"`` or ``"video"``.
        input_names: the inputs it reads, by name.
        encoder: the library's own module, whose weights the fingerprint covers.
        width: D, width of the hidden states that its first layer reads; 0 without layers.
        depth: number of layers that can be prompted; 0 for an encoder that is only ever run as a whole.
        feature_width: width of the pooled feature that :meth:`finish` returns.
        has_prefix_form: whether :meth:`prefix_layer` and :meth:`projection` exist for its layers.
    """

    modality: str
    input_names: tuple[str, ...]
    has_prefix_form: bool = False

    def __init__(self, encoder: nn.Module, *, width: int, depth: int, feature_width: int) -> None:
        super().__init__()
        self.encoder: Any = encoder
        self.width, self.depth, self.feature_width = width, depth, feature_width

    @property
    def widths(self) -> tuple[int, ...]:
        """D of every layer: of the tokens it reads and of its prompts. They differ where an encoder merges patches."""
        return (self.width,) * self.depth

    @abstractmethod
    def embed(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Tokens x (B, N, D) before the first layer, and what its layers share besides.

        The second is opaque to callers, who hand it on as ``mask``: which tokens are real (B, N) for texts, rotary
        angles for some image encoders, None where layers need x alone.
        """

    @abstractmethod
    def layer(self, index: int, x: Tensor, prompts: Tensor | None, mask: Tensor | None) -> Tensor:
        """Layer ``index`` on [x ; prompts], without the prompts' own outputs. (B, N, D), (B, P, D) → (B, N, D).

        What comes out is what the next layer reads: where patches are merged in between, N and D change here.
        """

    def prefix_layer(
        self, index: int, x: Tensor, prompts: Tensor | None, mask: Tensor | None, kv: Made | None = None
    ) -> Tensor:
        """:meth:`layer` in prefix form: equal up to rounding, see :mod:`mope_deploy.model.backbones.prefix`.

        Args:
            index: of the layer.
            x: (B, N, D).
            prompts: tokens (B, P, D) whose keys and values the layer's own product makes, or None.
            mask: from :meth:`embed`.
            kv: keys and values of further prompts, as :meth:`projection` makes them, or None.
        """
        raise AssertionError(f"{type(self).__name__} has no prefix form")

    def projection(self, index: int) -> Projection:
        """How layer ``index`` makes keys and values of prompts."""
        raise AssertionError(f"{type(self).__name__} has no prefix form")

    def separate(self, index: int) -> None:
        """Give layer ``index`` a weight each for queries, keys and values where it has one for all, in place.

        For export: :meth:`prefix_layer` then needs no slices of a joint product, which are copies in a graph. Nothing
        else of the layer works afterwards.
        """

    def run_layer(self, index: int, x: Tensor, prompts: Tensor | None, mask: Tensor | None, *, form: str) -> Tensor:
        """:meth:`layer`, in prefix form if ``form`` is ``"prefix"``, there are prompts, and the encoder has that."""
        if form == "prefix" and self.has_prefix_form and prompts is not None:
            return self.prefix_layer(index, x, prompts, mask)
        return self.layer(index, x, prompts, mask)

    @abstractmethod
    def pool(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """What a router reads: the class token, or the mean of the real tokens. (B, N, D) → (B, D)."""

    @abstractmethod
    def finish(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The encoder's pooled feature after its last layer. (B, N, D) → (B, feature_width)."""

    @abstractmethod
    def save_source(self, folder: Path) -> None:
        """Write the encoder's architecture and weights where a ``dir:`` source reads them."""


def masked_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of the real tokens, at least one of each sample. x (B, N, D), mask (B, N) or None for all → (B, D)."""
    if mask is None:
        return x.mean(dim=1)
    weights = mask.to(x.dtype)  # (B, N)
    return (x * weights.unsqueeze(-1)).sum(dim=1) / weights.sum(dim=1, keepdim=True)
