"""transformers' VideoMAE: a clip of a fixed number of frames as tubes of patches, pre-norm, without a class token.

Its sine positions are added before the layers; prompts come behind the tubes and have none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor, nn

from mope_deploy.errors import ConfigError
from mope_deploy.model.backbones.base import FrozenEncoder
from mope_deploy.model.backbones.exported.tracing import traced_as
from mope_deploy.model.backbones.masks import masked_mean
from mope_deploy.model.backbones.prefix import PrefixKV
from mope_deploy.model.backbones.processors import ProcessorValues, processor_values
from mope_deploy.model.backbones.sources import LoadedEncoder
from mope_deploy.model.backbones.transformers_encoder import LayeredTransformers
from mope_deploy.model.config import EncoderSpec
from mope_deploy.model.strict import Listed
from mope_deploy.preprocess import ImageSpec, VideoSpec

__all__ = ["VideoMAEEncoder"]

_DEFAULT_SECONDS = 60.0
_RESAMPLE = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # Pillow's numbers


class _Processor(ProcessorValues):
    """With the library's defaults."""

    size: dict[str, int] | int | None = None
    crop_size: dict[str, int] | int | None = None
    resample: Annotated[int, Field(ge=0, lt=len(_RESAMPLE))] = 2
    image_mean: Listed[float] = (0.5, 0.5, 0.5)
    image_std: Listed[float] = (0.5, 0.5, 0.5)
    do_resize: bool = True
    do_center_crop: bool = True
    do_rescale: bool = True
    do_normalize: bool = True
    rescale_factor: float = 1 / 255


class VideoMAEEncoder(LayeredTransformers):
    """A VideoMAE encoder, layer by layer.

    Args:
        encoder: transformers' model; of a fine-tuned one the classifier is gone and its final norm is kept.
        preprocessor: what its ``preprocessor_config.json`` says.
    """

    family = "transformers VideoMAE"
    model_types = ("videomae",)
    modality = "video"
    input_names = ("video_values",)

    def __init__(self, encoder: Any, *, preprocessor: Mapping[str, Any]) -> None:
        super().__init__(encoder)
        self.preprocessor = dict(preprocessor)
        # transformers 5.0 keeps these biases outside the linear layers: there the token form runs.
        self.has_prefix_form = not any(hasattr(layer.attention.attention, "q_bias") for layer in self.layers)

    @classmethod
    def wrap(cls, loaded: LoadedEncoder, spec: EncoderSpec) -> FrozenEncoder:
        """The encoder with its preprocessing: every frame as its own image processor makes it.

        Raises:
            ConfigError: for an image processor whose steps are not supported.
        """
        found, preprocessor = processor_values(loaded.location, spec.source, modality="video", kind=_Processor)
        backbone = cls(loaded.module, preprocessor=preprocessor)
        seconds = _DEFAULT_SECONDS if spec.max_seconds is None else spec.max_seconds
        image = _image_spec(backbone.encoder.config, found, spec.source)
        return FrozenEncoder(backbone, VideoSpec(backbone.encoder.config.num_frames, "uniform", float(seconds), image))

    @property
    def _body(self) -> Any:
        return getattr(self.encoder, "videomae", self.encoder)

    @property
    def layers(self) -> Any:
        return self._body.encoder.layer

    def embed(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Tubes with their positions. video_values (B, F, 3, H, W) → (B, N, D); all of them are real."""
        return self._body.embeddings(inputs["video_values"], None), None

    def linears(self, layer: Any) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        own = layer.attention.attention
        return own.query, own.key, own.value  # keys have no bias

    def norm_before(self, layer: Any) -> nn.Module | None:
        return layer.layernorm_before

    def prefix_form(self, layer: Any, x: Tensor, prompts: Tensor | None, kv: PrefixKV | None, shared: Any) -> Tensor:
        norm = layer.layernorm_before
        normed = None if prompts is None else norm(prompts)
        h = x + traced_as(layer.attention, self._attended, layer, norm(x), normed, kv)
        return layer.output(layer.intermediate(layer.layernorm_after(h)), h)

    def _attended(self, layer: Any, x: Tensor, prompts: Tensor | None, kv: PrefixKV | None) -> Tensor:
        own = layer.attention.attention
        return layer.attention.output(traced_as(own, self.mixed, layer, x, prompts, kv, None), x)

    def pool(self, x: Tensor, shared: Tensor | None) -> Tensor:
        """The mean of the tubes. (B, N, D) → (B, D)."""
        return masked_mean(x, shared)

    def finish(self, x: Tensor, shared: Tensor | None) -> Tensor:
        """The mean of the tubes, with the norm before or behind it that the encoder has. (B, N, D) → (B, D)."""
        if self._body.layernorm is not None:
            x = self._body.layernorm(x)
        y = masked_mean(x, shared)
        norm = getattr(self.encoder, "fc_norm", None)
        return y if norm is None else norm(y)


def _image_spec(config: Any, found: _Processor, source: str) -> ImageSpec:
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    resize = found.size or {"shortest_edge": min(height, width)}
    resize = {"shortest_edge": resize} if isinstance(resize, int) else resize
    crop = found.crop_size or {"height": height, "width": width}
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
    off = [key for key in ("do_resize", "do_center_crop", "do_rescale", "do_normalize") if not getattr(found, key)]
    usual = abs(found.rescale_factor - 1 / 255) < 1e-6 and crop == {"height": height, "width": width}
    if off or not usual or set(resize) not in ({"shortest_edge"}, {"height", "width"}):
        scale = f"size {resize}, crop {crop}, scale {found.rescale_factor:g}"
        raise ConfigError(
            f"the image processor of {source}",
            received=f"{', '.join(off)} switched off" if off else scale,
            expected=f"resize (shortest_edge, or height and width), center crop to {height} × {width}, rescale by "
            "1/255, normalise",
        )
    edge = resize.get("shortest_edge")
    spec = {
        "height": height,
        "width": width,
        "resize_height": edge or resize["height"],
        "resize_width": edge or resize["width"],
        "crop_mode": "center" if edge else "squash",
        "interpolation": _RESAMPLE[found.resample],
        "mean": list(found.image_mean),
        "std": list(found.image_std),
    }
    return ImageSpec.from_dict(spec, where=f"the image processor of {source}")
