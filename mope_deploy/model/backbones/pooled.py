"""Any other image encoder of timm's, run as a whole for its pooled feature: ConvNeXt, ResNet and the rest.

Without transformer layers there is nothing to prompt, so such an encoder can be a complementary one only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mope_deploy.errors import ConfigError
from mope_deploy.model.backbones.base import FrozenEncoder
from mope_deploy.model.backbones.exported.dry import check_traceable
from mope_deploy.model.backbones.sources import LoadedEncoder
from mope_deploy.model.backbones.timm_image import TimmEncoder
from mope_deploy.model.config import EncoderSpec

__all__ = ["PooledEncoder"]


class PooledEncoder(TimmEncoder):
    """An image encoder without layers of its own to prompt."""

    family = "another timm image encoder"

    def __init__(self, encoder: Any) -> None:
        super().__init__(encoder, feature_width=0)

    @classmethod
    def accepts(cls, module: Any) -> bool:
        """One of timm's: features first, then pooling."""
        return all(hasattr(module, name) for name in ("pretrained_cfg", "forward_features", "forward_head"))

    @classmethod
    def wrap(cls, loaded: LoadedEncoder, spec: EncoderSpec) -> FrozenEncoder:
        """The encoder with its preprocessing.

        Raises:
            ConfigError: if it does not give one vector a picture, or cannot be exported.
        """
        frozen: Any = super().wrap(loaded, spec)
        with torch.no_grad():
            y = loaded.module.eval()(torch.zeros(1, 3, frozen.preprocess.height, frozen.preprocess.width))
        if not isinstance(y, Tensor) or y.ndim != 2:
            raise ConfigError(
                f"{spec.source} does not pool its features to one vector",
                received=tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__,
                expected="(batch, width)",
            )
        frozen.backbone.feature_width = y.shape[1]
        example = torch.zeros(2, 3, frozen.preprocess.height, frozen.preprocess.width)
        check_traceable(
            loaded.module, lambda pixel_values: loaded.module(pixel_values), {"pixel_values": example}, spec.source
        )
        return frozen

    def embed(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """The last features, in whatever layout the encoder has. pixel_values (B, 3, H, W) → (B, …)."""
        return self.encoder.forward_features(inputs["pixel_values"]), None

    def finish(self, x: Tensor, shared: Tensor | None) -> Tensor:
        """timm's own pooling, without a classifier. (B, …) → (B, feature_width)."""
        return self.encoder.forward_head(x, pre_logits=True)
