"""Any image encoder of transformers', run as a whole for its pooled feature: ResNet, ConvNeXt, ViT, DINOv2, Swin.

Its layers are not known here, so it cannot be prompted and is a complementary encoder only; the same architectures from
timm can be more.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mope_deploy.errors import ConfigError
from mope_deploy.files import reason
from mope_deploy.model.backbones.base import FrozenEncoder
from mope_deploy.model.backbones.exported.dry import check_traceable
from mope_deploy.model.backbones.sources import LoadedEncoder, quiet_transformers, unloadable
from mope_deploy.model.backbones.transformers_encoder import TransformersEncoder
from mope_deploy.model.config import EncoderSpec
from mope_deploy.model.network import hub, offline_reason
from mope_deploy.preprocess import ImageSpec

__all__ = ["PooledVisionEncoder"]

_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers, as transformers stores them


class PooledVisionEncoder(TransformersEncoder):
    """An image encoder of transformers' whose layers are not prompted.

    Args:
        encoder: transformers' module.
        processor: its image processor, stored beside it.
        feature_width: width of its pooled feature.
    """

    family = "another transformers image encoder"
    modality = "image"
    input_names = ("pixel_values",)

    def __init__(self, encoder: nn.Module, processor: Any, *, feature_width: int) -> None:
        super().__init__(encoder, feature_width=feature_width)
        self.processor = processor

    @classmethod
    def accepts(cls, module: Any) -> bool:
        """One of transformers' that reads pictures."""
        config = getattr(module, "config", None)
        return hasattr(config, "model_type") and getattr(module, "main_input_name", None) == "pixel_values"

    @classmethod
    def wrap(cls, loaded: LoadedEncoder, spec: EncoderSpec) -> FrozenEncoder:
        """The encoder with its preprocessing; it is run once, on a black picture.

        Raises:
            ConfigError: if there is no image processor beside the encoder, it does something that cannot be done on a
                device, or the encoder gives no vector for a picture or cannot be exported.
        """
        processor = _processor(loaded.location, spec.source)
        try:
            preprocess = _image_spec(processor, spec.source)
        except (AttributeError, TypeError, ValueError) as error:  # values of any type: the library checks none
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"the image processor of {spec.source} cannot be used: {reason(error)}") from error
        encoder: Any = loaded.module.eval()
        try:
            with torch.no_grad():
                y = _pooled(encoder, torch.zeros(1, 3, preprocess.height, preprocess.width))
        except Exception as error:  # whatever a model of another kind misses: a text, several frames, a mask
            raise ConfigError(
                f"{spec.source} gives no vector for a picture: {type(error).__name__}: {reason(error)}",
                received=type(encoder).__name__,
                expected="an image encoder",
            ) from error
        example = torch.zeros(2, 3, preprocess.height, preprocess.width)
        check_traceable(
            encoder, lambda pixel_values: _pooled(encoder, pixel_values), {"pixel_values": example}, spec.source
        )
        return FrozenEncoder(cls(encoder, processor, feature_width=y.shape[1]), preprocess)

    def embed(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """The pooled feature already: there are no layers to come. pixel_values (B, 3, H, W) → (B, feature_width)."""
        return _pooled(self.encoder, inputs["pixel_values"]), None

    def finish(self, x: Tensor, shared: Tensor | None) -> Tensor:
        """What :meth:`embed` made. (B, feature_width) → (B, feature_width)."""
        return x

    def save_source(self, folder: Path) -> None:
        super().save_source(folder)
        self.processor.save_pretrained(folder)


def _pooled(encoder: Any, pixel_values: Tensor) -> Tensor:
    """The library's pooled output, else the first token of the last layer. (B, 3, H, W) → (B, feature_width)."""
    out = encoder(pixel_values=pixel_values)
    pooled = getattr(out, "pooler_output", None)
    if pooled is not None:
        return pooled.flatten(1)  # convolutional ones keep two axes of size 1
    states = out.last_hidden_state
    if states.ndim != 3:
        raise ValueError(f"last hidden states of {states.ndim} axes and no pooled output")
    return states[:, 0]


def _processor(location: str, source: str) -> Any:
    from transformers import AutoImageProcessor

    try:
        with quiet_transformers(), hub(local=Path(location).is_dir()):
            return AutoImageProcessor.from_pretrained(location)
    except Exception as error:  # OSError for a missing file, ValueError for an unknown class
        if offline_reason(error) is not None:
            raise unloadable(source, error) from error
        raise ConfigError(
            f"no usable image processor beside {source}: {type(error).__name__}: {reason(error)}",
            todo="put its preprocessor_config.json into the encoder's folder",
        ) from error


def _image_spec(processor: Any, source: str) -> ImageSpec:
    """The processor's steps in our own terms: resize, perhaps a centre crop, scale to 0 … 1, normalise.

    Raises:
        ConfigError: for any other steps.
    """
    size = {key: value for key, value in dict(processor.size or {}).items() if value is not None}
    crop = {key: value for key, value in dict(getattr(processor, "crop_size", None) or {}).items() if value is not None}
    edge = size.get("shortest_edge")
    if getattr(processor, "do_center_crop", False) and edge and crop:
        target, resized, mode = (crop["height"], crop["width"]), (edge, edge), "center"
    elif getattr(processor, "crop_pct", None) and edge:  # ConvNeXt's: a crop below 384 pixels, none from there on
        scaled = int(edge / processor.crop_pct) if edge < 384 else edge
        target, resized, mode = (edge, edge), (scaled, scaled), "center" if edge < 384 else "squash"
    elif set(size) == {"height", "width"} and not getattr(processor, "do_center_crop", False):
        target = resized = (size["height"], size["width"])
        mode = "squash"
    else:
        raise ConfigError(
            f"the image processor of {source} cannot be done on a device",
            received=f"size {size}, crop {crop or 'none'}",
            expected="height and width, or shortest_edge with a centre crop",
        )
    usual = processor.do_resize and processor.do_rescale and abs(processor.rescale_factor - 1 / 255) < 1e-6
    if not usual or int(processor.resample) not in _FILTERS:
        raise ConfigError(
            f"the image processor of {source} cannot be done on a device",
            received=f"resize {processor.do_resize}, rescale {processor.rescale_factor}, filter {processor.resample}",
            expected="a resize by a Pillow filter and a scale of 1/255",
        )
    values = {
        "height": target[0],
        "width": target[1],
        "resize_height": resized[0],
        "resize_width": resized[1],
        "crop_mode": mode,
        "interpolation": _FILTERS[int(processor.resample)],
        "mean": list(processor.image_mean) if processor.do_normalize else [0.0, 0.0, 0.0],
        "std": list(processor.image_std) if processor.do_normalize else [1.0, 1.0, 1.0],
    }
    return ImageSpec.from_dict(values, where=f"the image processor of {source}")
