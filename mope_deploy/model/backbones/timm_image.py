"""What timm's image encoders of every family share: their input, their preprocessing, and being written to a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save
from timm.data import resolve_data_config
from torch import nn

from mope_deploy.errors import ConfigError
from mope_deploy.model.backbones.base import Backbone
from mope_deploy.model.backbones.sources import LoadedEncoder
from mope_deploy.model.config import EncoderSpec
from mope_deploy.preprocess import ImageSpec

__all__ = ["TimmBackbone", "frozen_image"]

# Of timm's description of weights: its evaluation transform, and whether input_size is also the encoder's img_size.
_KEPT = ("input_size", "fixed_input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")


class TimmBackbone(Backbone):
    """An image encoder of timm's.

    Args:
        loaded: timm's module, without a classifier, and what was passed to timm besides the architecture's name; the
            module itself does not remember it.
        width: D of the first layer.
        depth: number of layers.
        feature_width: width of the pooled feature.
    """

    modality = "image"
    input_names = ("pixel_values",)

    def __init__(self, loaded: LoadedEncoder, *, width: int, depth: int, feature_width: int) -> None:
        super().__init__(loaded.module, width=width, depth=depth, feature_width=feature_width)
        self.model_args = dict(loaded.model_args)

    def save_source(self, folder: Path) -> None:
        """Write config.json and model.safetensors in the form that timm's ``local-dir:`` reads."""
        folder.mkdir(parents=True, exist_ok=True)
        cfg = dict(self.encoder.pretrained_cfg)
        config = {
            "architecture": cfg["architecture"],
            "num_classes": 0,
            "num_features": self.feature_width,
            "global_pool": getattr(self.encoder, "global_pool", None),
            "model_args": self.model_args,
            "pretrained_cfg": {key: cfg[key] for key in _KEPT if key in cfg} | {"num_classes": 0},
        }
        (folder / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n", encoding="utf-8")
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.encoder.state_dict().items()}
        (folder / "model.safetensors").write_bytes(save(tensors))


def frozen_image(backbone: TimmBackbone, spec: EncoderSpec) -> Any:
    """The frozen encoder with its preprocessing, which is timm's evaluation transform.

    Raises:
        ConfigError: for an encoder that leaves its features unpooled (``global_pool=''``).
    """
    from mope_deploy.model.backbones import FrozenEncoder

    if getattr(backbone.encoder, "global_pool", None) == "":
        raise ConfigError(f"{spec.source} does not pool", received="global_pool=''", expected="token, avg or map")
    return FrozenEncoder(backbone, ImageSpec.from_timm(_data_config(backbone.encoder)))


def _data_config(encoder: nn.Module) -> dict[str, Any]:
    """timm's evaluation transform, at the size the encoder was built for: ``img_size`` may override its tag's."""
    size = getattr(getattr(encoder, "patch_embed", None), "img_size", None)
    return resolve_data_config({"input_size": (3, *size)} if size else {}, model=encoder)
