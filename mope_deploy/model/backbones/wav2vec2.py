"""transformers' wav2vec 2.0 and HuBERT: sound as a waveform, pre-norm ("stable layer norm") or post-norm layers.

The convolutions that make frames of samples, and the convolutional position embedding, come before the layers: prompts
never meet them, so they have no position. Where the convolutions' norm is a group norm it runs over time, padding
included; such encoders read clips of one fixed length, each padded alone. The others read clips of any length behind a
mask.

Letters: S samples · N frames.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from mope_deploy.errors import ConfigError
from mope_deploy.fields import decode
from mope_deploy.model.backbones.base import FrozenEncoder
from mope_deploy.model.backbones.exported.tracing import traced_as
from mope_deploy.model.backbones.masks import blocked, masked_mean, prompts_unmasked
from mope_deploy.model.backbones.prefix import PrefixKV
from mope_deploy.model.backbones.processors import ProcessorValues, processor_values
from mope_deploy.model.backbones.sources import LoadedEncoder
from mope_deploy.model.backbones.transformers_encoder import LayeredTransformers
from mope_deploy.model.config import EncoderSpec
from mope_deploy.preprocess import AudioSpec

__all__ = ["Wav2Vec2Encoder"]

_DEFAULT_SECONDS = 10.0
_MOST_SECONDS = 600.0


class _FeatureExtractor(ProcessorValues):
    feature_extractor_type: Literal["Wav2Vec2FeatureExtractor"] = "Wav2Vec2FeatureExtractor"
    sampling_rate: PositiveInt = 16_000
    do_normalize: bool = True


class Wav2Vec2Encoder(LayeredTransformers):
    """A wav2vec 2.0 or HuBERT encoder, layer by layer; ``shared`` is which frames are real, (B, N) int64 or None.

    Args:
        encoder: transformers' module.
        preprocessor: what the file of its feature extractor says.

    Attributes:
        fixed: whether clips must have one length, because a norm runs over time.
        receptive_field, stride: samples that one frame is made from, and samples between two frames.
    """

    family = "transformers wav2vec 2.0 or HuBERT"
    model_types = ("wav2vec2", "hubert")
    modality = "audio"

    def __init__(self, encoder: Any, *, preprocessor: Mapping[str, Any]) -> None:
        config = encoder.config
        super().__init__(encoder)
        self.preprocessor = dict(preprocessor)
        self.pre_norm = bool(config.do_stable_layer_norm)
        self.fixed = config.feat_extract_norm == "group"
        self.input_names = ("audio_values",) if self.fixed else ("audio_values", "audio_mask")
        self.receptive_field = 1
        for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
            self.receptive_field = (self.receptive_field - 1) * stride + kernel
        self.stride = math.prod(config.conv_stride)

    @classmethod
    def wrap(cls, loaded: LoadedEncoder, spec: EncoderSpec) -> FrozenEncoder:
        """The encoder with its preprocessing: rate and normalisation as its own feature extractor says.

        Raises:
            ConfigError: for an encoder with an adapter behind its layers, without a feature extractor, or of a rate or
                a length that cannot be read.
        """
        if getattr(loaded.module.config, "add_adapter", False):
            raise ConfigError(f"{spec.source} has an adapter behind its layers, which is not supported")
        found, preprocessor = processor_values(loaded.location, spec.source, modality="audio", kind=_FeatureExtractor)
        backbone = cls(loaded.module, preprocessor=preprocessor | found.model_dump())
        rate = found.sampling_rate
        seconds = _DEFAULT_SECONDS if spec.max_seconds is None else spec.max_seconds
        if not backbone.receptive_field <= seconds * rate <= _MOST_SECONDS * rate:
            raise ConfigError(
                f"max_seconds of {spec.source}",
                received=seconds,
                expected=f"{backbone.receptive_field / rate:g} (one frame) to {_MOST_SECONDS:g}",
            )
        values = {
            "form": "waveform",
            "sample_rate": rate,
            "max_samples": round(seconds * rate),
            "fixed": backbone.fixed,
            "min_samples": backbone.receptive_field,
            "normalise": found.do_normalize,
        }
        values |= dict.fromkeys(("mels", "n_fft", "hop"))
        where = f"the feature extractor of {spec.source}"
        return FrozenEncoder(backbone, decode(values, AudioSpec, where, ConfigError))

    @property
    def layers(self) -> Any:
        return self.encoder.encoder.layers

    def embed(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Frames with their positions. audio_values (B, S), audio_mask (B, S) int64 → (B, N, D), (B, N) int64."""
        x = self.encoder.feature_extractor(inputs["audio_values"]).transpose(1, 2)  # (B, N, C)
        x = self.encoder.feature_projection(x)
        if isinstance(x, tuple):  # wav2vec 2.0 also returns what it projected
            x = x[0]
        mask = None
        if not self.fixed:
            # A frame is real if every sample that it is made from is: what the library's length formula comes to.
            last = torch.arange(x.shape[1], device=x.device) * self.stride + self.receptive_field - 1  # (N,)
            mask = (last < inputs["audio_mask"].sum(dim=1, keepdim=True)).to(torch.int64)  # (B, N)
            x = x * mask.unsqueeze(-1).to(x.dtype)
        x = x + self.encoder.encoder.pos_conv_embed(x)
        return (x if self.pre_norm else self.encoder.encoder.layer_norm(x)), mask

    def token_layer(self, index: int, rows: Tensor, shared: Tensor | None, P: int) -> Tensor:
        unseen = None if shared is None else blocked(prompts_unmasked(shared, P), rows.dtype)  # (B, 1, 1, N + P)
        return self.layers[index](rows, attention_mask=unseen)

    def shared_by(self, index: int, x: Tensor, shared: Tensor | None, P: int) -> Tensor | None:
        """The additive mask of the frames' keys, (B, 1, 1, N)."""
        return None if shared is None else blocked(shared, x.dtype)

    def linears(self, layer: Any) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        return layer.attention.q_proj, layer.attention.k_proj, layer.attention.v_proj

    def norm_before(self, layer: Any) -> nn.Module | None:
        return layer.layer_norm if self.pre_norm else None

    def prefix_form(self, layer: Any, x: Tensor, prompts: Tensor | None, kv: PrefixKV | None, shared: Any) -> Tensor:
        if not self.pre_norm:
            x = layer.layer_norm(x + traced_as(layer.attention, self._attended, layer, x, prompts, kv, shared))
            return layer.final_layer_norm(x + layer.feed_forward(x))
        normed = None if prompts is None else layer.layer_norm(prompts)
        x = x + traced_as(layer.attention, self._attended, layer, layer.layer_norm(x), normed, kv, shared)
        x = x + layer.feed_forward(layer.final_layer_norm(x))
        return x if layer.adapter_layer is None else x + layer.adapter_layer(x)

    def _attended(self, layer: Any, *tensors: Any) -> Tensor:
        return layer.attention.out_proj(self.mixed(layer, *tensors))

    def pool(self, x: Tensor, shared: Tensor | None) -> Tensor:
        """The mean of the real frames. (B, N, D) → (B, D)."""
        return masked_mean(x, shared)

    def finish(self, x: Tensor, shared: Tensor | None) -> Tensor:
        """The mean of the real frames after the encoder's final norm, where it has one. (B, N, D) → (B, D)."""
        return masked_mean(self.encoder.encoder.layer_norm(x) if self.pre_norm else x, shared)
