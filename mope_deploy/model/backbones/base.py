"""What MoPE needs from a frozen encoder of any family: its feature, and its layers one at a time to prompt them.

Letters: B batch · N tokens · D width of a layer · P prompts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mope_deploy.model.backbones.exported.tracing import traced_as
from mope_deploy.model.backbones.prefix import PrefixKV, Projection
from mope_deploy.model.backbones.sources import LoadedEncoder
from mope_deploy.model.config import EncoderSpec
from mope_deploy.model.tensors import fingerprint
from mope_deploy.preprocess import AudioSpec, ImageSpec, TextSpec, VideoSpec

__all__ = ["Encoder", "Form", "FrozenEncoder", "LayeredEncoder"]

Form = Literal["prefix", "token"]


@dataclass(frozen=True)
class FrozenEncoder:
    """A wrapped encoder together with what its raw inputs must become.

    Attributes:
        backbone: the encoder behind the common interface, its parameters frozen.
        preprocess: how raw samples of its modality become its inputs.
        tokenizer: the JSON text of a ``tokenizer.json`` for a text encoder, else None.
    """

    backbone: Any
    preprocess: ImageSpec | TextSpec | AudioSpec | VideoSpec
    tokenizer: str | None = None


class Encoder(nn.Module, ABC):
    """One frozen encoder of a family.

    Attributes:
        family: what messages call the family.
        modality: ``"image"``, ``"text"``, ``"audio"`` or ``"video"``.
        input_names: the inputs it reads, by name.
        encoder: the library's own module, whose weights the fingerprint covers.
        feature_width: width of the pooled feature that :meth:`finish` returns.
        depth: number of layers that can be prompted; 0 for an encoder that is only ever run as a whole.
        has_prefix_form: whether these layers have a prefix form.
    """

    family: ClassVar[str]
    modality: ClassVar[str]
    input_names: tuple[str, ...]
    has_prefix_form: bool = False

    def __init__(self, encoder: nn.Module, *, feature_width: int) -> None:
        super().__init__()
        self.encoder: Any = encoder
        self.feature_width = feature_width
        self._hashed: tuple[object, str] | None = None

    @classmethod
    @abstractmethod
    def accepts(cls, module: Any) -> bool:
        """Whether ``module``, a library's encoder, is of this family."""

    @classmethod
    @abstractmethod
    def wrap(cls, loaded: LoadedEncoder, spec: EncoderSpec) -> FrozenEncoder:
        """The encoder with its preprocessing.

        Raises:
            ConfigError: if it lacks what it needs besides weights, or cannot be used as ``spec`` asks.
        """

    @property
    def depth(self) -> int:
        return 0

    @property
    def widths(self) -> tuple[int, ...]:
        """D of every layer: of the tokens it reads and of its prompts. They differ where an encoder merges patches."""
        return ()

    @abstractmethod
    def embed(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Tokens x (B, N, D) before the first layer, and what its layers share besides.

        The second is opaque to callers, who hand it on as ``shared``: which tokens are real (B, N) for texts, rotary
        angles or a bias for some image encoders, None where layers need x alone.
        """

    @abstractmethod
    def finish(self, x: Tensor, shared: Tensor | None) -> Tensor:
        """The encoder's pooled feature after its last layer. (B, N, D) → (B, feature_width)."""

    def fingerprint(self) -> str:
        """The library's tensors as :func:`mope_deploy.model.tensors.fingerprint`; hashed again only when they change.

        A training saves two checkpoints an epoch, and a large encoder takes seconds.
        """
        tensors = self.encoder.state_dict()
        # _version counts what was written into a tensor in place.
        state = [(name, t.data_ptr(), t._version, t.dtype, t.shape, t.device) for name, t in tensors.items()]
        if self._hashed is None or self._hashed[0] != state:
            self._hashed = state, fingerprint(tensors)
        return self._hashed[1]

    @abstractmethod
    def save_source(self, folder: Path) -> None:
        """Write the encoder's architecture and weights where a ``dir:`` source reads them."""

    def run_layer(self, index: int, x: Tensor, prompts: Tensor | None, shared: Tensor | None, *, form: str) -> Tensor:
        """Layer ``index`` in the form that is asked for, or in token form where it has no other."""
        raise AssertionError(f"{type(self).__name__} has no layers")


class LayeredEncoder(Encoder):
    """An encoder whose layers are run one by one, so that each can have prompts of its own.

    Attributes:
        width: D, width of the hidden states that its first layer reads.
        has_prefix_form: whether :meth:`prefix_layer` and :meth:`projection` exist for its layers.
    """

    has_prefix_form = True

    def __init__(self, encoder: nn.Module, *, width: int, feature_width: int | None = None) -> None:
        super().__init__(encoder, feature_width=width if feature_width is None else feature_width)
        self.width = width

    @property
    @abstractmethod
    def layers(self) -> Sequence[Any]:
        """The library's own layers in their order."""

    @property
    def depth(self) -> int:
        return len(self.layers)

    @property
    def widths(self) -> tuple[int, ...]:
        return (self.width,) * self.depth

    def layer(self, index: int, x: Tensor, prompts: Tensor | None, shared: Tensor | None) -> Tensor:
        """Layer ``index`` on [x ; prompts], without the prompts' own outputs. (B, N, D), (B, P, D) → (B, N, D).

        The token form, which defines what a prompt does. What comes out is what the next layer reads: where patches are
        merged in between, N and D change here.
        """
        N, P = x.shape[1], 0 if prompts is None else prompts.shape[1]
        rows = x if prompts is None else torch.cat([x, prompts], dim=1)  # (B, N + P, D)
        out = self.token_layer(index, rows, shared, P)
        return out if prompts is None else out[:, :N]

    def token_layer(self, index: int, rows: Tensor, shared: Tensor | None, P: int) -> Tensor:
        """The library's own layer ``index`` on rows (B, N + P, D), of which the last P are prompts → (B, ≥ N, D)."""
        return self.layers[index](rows)

    def prefix_layer(
        self, index: int, x: Tensor, prompts: Tensor | None, shared: Tensor | None, kv: PrefixKV | None = None
    ) -> Tensor:
        """:meth:`layer` in prefix form: equal up to rounding, see :mod:`mope_deploy.model.backbones.prefix`.

        Args:
            index: of the layer.
            x: (B, N, D).
            prompts: tokens (B, P, D) whose keys and values the layer's own product makes, or None.
            shared: from :meth:`embed`.
            kv: keys and values of further prompts, as :meth:`projection` makes them, or None.
        """
        P = (0 if prompts is None else prompts.shape[1]) + (0 if kv is None else kv.total)
        layer, shared = self.layers[index], self.shared_by(index, x, shared, P)
        return traced_as(layer, self.prefix_form, layer, x, prompts, kv, shared)

    def shared_by(self, index: int, x: Tensor, shared: Tensor | None, P: int) -> Any:
        """``shared`` as :meth:`prefix_form` of layer ``index`` reads it, where there are P prompts in all."""
        return shared

    def prefix_form(self, layer: Any, x: Tensor, prompts: Tensor | None, kv: PrefixKV | None, shared: Any) -> Tensor:
        """What :meth:`prefix_layer` computes with the library's ``layer``."""
        raise AssertionError(f"{type(self).__name__} has no prefix form")

    def projection(self, index: int) -> Projection:
        """How layer ``index`` makes keys and values of prompts."""
        raise AssertionError(f"{type(self).__name__} has no prefix form")

    def separate(self, index: int) -> None:
        """Give layer ``index`` a weight each for queries, keys and values where it has one for all, in place.

        For export: :meth:`prefix_layer` then needs no slices of a joint product, which are copies in a graph. Nothing
        else of the layer works afterwards.
        """

    def run_layer(self, index: int, x: Tensor, prompts: Tensor | None, shared: Tensor | None, *, form: str) -> Tensor:
        """:meth:`layer`, in prefix form if ``form`` is ``"prefix"``, there are prompts, and the encoder has that."""
        if form == "prefix" and self.has_prefix_form and prompts is not None:
            return self.prefix_layer(index, x, prompts, shared)
        return self.layer(index, x, prompts, shared)

    @abstractmethod
    def pool(self, x: Tensor, shared: Tensor | None) -> Tensor:
        """What a router reads: the class token, or the mean of the real tokens. (B, N, D) → (B, D)."""
