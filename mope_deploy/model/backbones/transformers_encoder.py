"""What transformers' encoders of every family share: how they are known, attend and are written to a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from mope_deploy.model.backbones.base import Encoder, LayeredEncoder
from mope_deploy.model.backbones.prefix import PrefixKV, Projection, attention
from mope_deploy.model.backbones.sources import save_transformers

__all__ = ["LayeredTransformers", "TransformersEncoder"]


class TransformersEncoder(Encoder):
    """An encoder of transformers'.

    Attributes:
        model_types: of the library's configurations that the family reads.
        preprocessor: what the encoder's ``preprocessor_config.json`` says.
    """

    model_types: ClassVar[tuple[str, ...]]
    preprocessor: Mapping[str, Any] = {}

    @classmethod
    def accepts(cls, module: Any) -> bool:
        return getattr(getattr(module, "config", None), "model_type", None) in cls.model_types

    def save_source(self, folder: Path) -> None:
        """Write config.json, model.safetensors and preprocessor_config.json in transformers' own form.

        The tokenizer is the checkpoint's.
        """
        save_transformers(self.encoder, folder, preprocessor=self.preprocessor)


class LayeredTransformers(TransformersEncoder, LayeredEncoder):
    """One whose layers can be prompted."""

    def __init__(self, encoder: Any) -> None:
        super().__init__(encoder, width=encoder.config.hidden_size)

    def linears(self, layer: Any) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        """The linear layers that make a layer's queries, keys and values."""
        raise AssertionError(f"{type(self).__name__} has no prefix form")

    def norm_before(self, layer: Any) -> nn.Module | None:
        """What a pre-norm layer applies to its tokens first; None in a post-norm one."""
        return None

    def projection(self, index: int) -> Projection:
        layer = self.layers[index]
        _, k, v = self.linears(layer)
        return Projection.of(self.norm_before(layer), k, v)

    def mixed(
        self, layer: Any, x: Tensor, prompts: Tensor | None, kv: PrefixKV | None, shared: Tensor | None
    ) -> Tensor:
        """A layer's attention, not yet through its output projection; x and prompts normed in a pre-norm layer.

        (B, N, D), (B, P, D), additive mask of the tokens' keys (B, 1 or heads, 1 or N, N) or None → (B, N, inner).
        """
        return attention(*self.linears(layer), self.encoder.config.num_attention_heads, x, prompts, kv, shared)
