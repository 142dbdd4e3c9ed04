"""Any other image encoder of timm's, run as a whole for its pooled feature: ConvNeXt, ResNet and the rest.

Without transformer layers there is nothing to prompt, so such an encoder can be a complementary one only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mope_deploy.errors import ConfigError
from mope_deploy.model.backbones.sources import LoadedEncoder
from mope_deploy.model.backbones.timm_image import TimmBackbone, frozen_image
from mope_deploy.model.config import EncoderSpec

__all__ = ["PooledBackbone", "accepts", "wrap"]


def accepts(module: nn.Module) -> bool:
    """Whether ``module`` is one of timm's: features first, then pooling."""
    return hasattr(module, "pretrained_cfg") and hasattr(module, "forward_features") and hasattr(module, "forward_head")


def wrap(loaded: LoadedEncoder, spec: EncoderSpec) -> Any:
    """The frozen encoder with its preprocessing.

    Raises:
        ConfigError: if it does not give one vector a picture.
    """
    frozen = frozen_image(PooledBackbone(loaded), spec)
    encoder = loaded.module.eval()
    with torch.no_grad():
        y = encoder(torch.zeros(1, 3, frozen.preprocess.height, frozen.preprocess.width))
    if not isinstance(y, Tensor) or y.ndim != 2:
        raise ConfigError(
            f"{spec.source} does not pool its features to one vector",
            received=tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__,
            expected="(batch, width)",
        )
    frozen.backbone.feature_width = y.shape[1]
    return frozen


class PooledBackbone(TimmBackbone):
    """An image encoder without layers of its own to prompt."""

    def __init__(self, loaded: LoadedEncoder) -> None:
        super().__init__(loaded, width=0, depth=0, feature_width=0)

    def embed(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """The last features, in whatever layout the encoder has. pixel_values (B, 3, H, W) → (B, …)."""
        return self.encoder.forward_features(inputs["pixel_values"]), None

    def layer(self, index: int, x: Tensor, prompts: Tensor | None, mask: Tensor | None) -> Tensor:
        """There is none."""
        raise AssertionError("an encoder without layers")

    def pool(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """There is no layer for which a router could ask."""
        raise AssertionError("an encoder without layers")

    def finish(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """timm's own pooling, without a classifier. (B, …) → (B, feature_width)."""
        return self.encoder.forward_head(x, pre_logits=True)
