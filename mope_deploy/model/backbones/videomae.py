"""transformers' VideoMAE: a clip of a fixed number of frames as tubes of patches, pre-norm, without a class token.

Its sine positions are added before the layers; prompts come behind the tubes and have none.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mope_deploy.errors import ConfigError
from mope_deploy.model.backbones.base import Backbone, masked_mean
from mope_deploy.model.backbones.prefix import Made, Projection, attention, inside
from mope_deploy.model.backbones.sources import LoadedEncoder, preprocessor_config, save_transformers
from mope_deploy.model.config import EncoderSpec
from mope_deploy.preprocess import ImageSpec, VideoSpec

__all__ = ["VideoMAEBackbone", "accepts", "wrap"]

_DEFAULT_SECONDS = 60.0
_MEAN, _STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)  # the library's defaults
_RESAMPLE = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # Pillow's numbers


def accepts(module: nn.Module) -> bool:
    """Whether ``module`` is an encoder of this family."""
    return getattr(getattr(module, "config", None), "model_type", None) == "videomae"


def wrap(loaded: LoadedEncoder, spec: EncoderSpec) -> Any:
    """The frozen encoder with its preprocessing: every frame as its own image processor makes it.

    Raises:
        ConfigError: for an image processor whose steps are not supported.
    """
    from mope_deploy.model.backbones import FrozenEncoder

    found = preprocessor_config(loaded.location)
    backbone = VideoMAEBackbone(loaded.module, preprocessor=found)
    seconds = _DEFAULT_SECONDS if spec.max_seconds is None else spec.max_seconds
    image = _image_spec(backbone.encoder.config, found, spec.source)
    return FrozenEncoder(backbone, VideoSpec(backbone.encoder.config.num_frames, "uniform", float(seconds), image))


def _image_spec(config: Any, found: Mapping[str, Any], source: str) -> ImageSpec:
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    resize = found.get("size") or {"shortest_edge": min(height, width)}
    resize = {"shortest_edge": resize} if isinstance(resize, int) else dict(resize)
    off = [key for key in ("do_resize", "do_center_crop", "do_rescale", "do_normalize") if found.get(key) is False]
    if off or not ({"shortest_edge"} == set(resize) or {"height", "width"} == set(resize)):
        raise ConfigError(
            f"the image processor of {source}",
            received=f"{', '.join(off)} switched off" if off else f"size {resize}",
            expected="resize (shortest_edge, or height and width), center crop, rescale, normalise",
        )
    edge = resize.get("shortest_edge")
    spec = {
        "height": height,
        "width": width,
        "resize_height": edge or resize["height"],
        "resize_width": edge or resize["width"],
        "crop_mode": "center" if edge else "squash",
        "interpolation": _RESAMPLE[int(found.get("resample", 2))],
        "mean": list(found.get("image_mean", _MEAN)),
        "std": list(found.get("image_std", _STD)),
    }
    return ImageSpec.from_dict(spec, where=f"the image processor of {source}")


class VideoMAEBackbone(Backbone):
    """A VideoMAE encoder, layer by layer.

    Args:
        encoder: transformers' model; of a fine-tuned one the classifier is gone and its final norm is kept.
        preprocessor: what its ``preprocessor_config.json`` says.
    """

    modality = "video"
    input_names = ("video_values",)

    def __init__(self, encoder: Any, *, preprocessor: Mapping[str, Any]) -> None:
        width = encoder.config.hidden_size
        depth = len(getattr(encoder, "videomae", encoder).encoder.layer)
        super().__init__(encoder, width=width, depth=depth, feature_width=width)
        self.preprocessor = dict(preprocessor)
        # transformers 5.0 keeps these biases outside the linear layers: there the token form runs.
        self.has_prefix_form = not any(hasattr(_own(layer), "q_bias") for layer in self._body.encoder.layer)

    @property
    def _body(self) -> Any:
        return getattr(self.encoder, "videomae", self.encoder)

    def embed(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Tubes with their positions. video_values (B, F, 3, H, W) → (B, N, D); all of them are real."""
        return self._body.embeddings(inputs["video_values"], None), None

    def layer(self, index: int, x: Tensor, prompts: Tensor | None, mask: Tensor | None) -> Tensor:
        """Layer ``index`` on [x ; prompts], without the prompts' outputs. (B, N, D), (B, P, D) → (B, N, D)."""
        N = x.shape[1]
        if prompts is not None:
            x = torch.cat([x, prompts], dim=1)
        return self._body.encoder.layer[index](x)[:, :N]

    def prefix_layer(
        self, index: int, x: Tensor, prompts: Tensor | None, mask: Tensor | None, kv: Made | None = None
    ) -> Tensor:
        """Layer ``index`` in prefix form. (B, N, D), (B, P, D), keys and values → (B, N, D)."""
        layer = self._body.encoder.layer[index]
        return inside(layer, _prefix_layer, layer, x, prompts, kv)

    def projection(self, index: int) -> Projection:
        """How layer ``index`` makes keys and values of prompts; its keys have no bias."""
        layer = self._body.encoder.layer[index]
        return Projection.of(layer.layernorm_before, _own(layer).key, _own(layer).value)

    def pool(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The mean of the tubes. (B, N, D) → (B, D)."""
        return masked_mean(x, mask)

    def finish(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The mean of the tubes, with the norm before or behind it that the encoder has. (B, N, D) → (B, D)."""
        if self._body.layernorm is not None:
            x = self._body.layernorm(x)
        y = masked_mean(x, mask)
        norm = getattr(self.encoder, "fc_norm", None)
        return y if norm is None else norm(y)

    def save_source(self, folder: Path) -> None:
        """Write config.json, model.safetensors and preprocessor_config.json in transformers' own form."""
        save_transformers(self.encoder, folder, preprocessor=self.preprocessor)


def _own(layer: Any) -> Any:
    """The part of a layer that makes queries, keys and values and lets them attend."""
    return layer.attention.attention


def _prefix_layer(layer: Any, x: Tensor, prompts: Tensor | None, kv: Made | None) -> Tensor:
    norm = layer.layernorm_before
    h = x + inside(
        layer.attention, _prefix_attention, layer.attention, norm(x), None if prompts is None else norm(prompts), kv
    )
    return layer.output(layer.intermediate(layer.layernorm_after(h)), h)


def _prefix_attention(whole: Any, x: Tensor, prompts: Tensor | None, kv: Made | None) -> Tensor:
    own = whole.attention
    heads = own.num_attention_heads
    mixed = inside(own, attention, own.query, own.key, own.value, heads, x, prompts, kv, None)
    return whole.output(mixed, x)
