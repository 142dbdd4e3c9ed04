"""transformers' Whisper encoder: sound as a log-mel spectrogram of a fixed length (30 s), pre-norm.

Its positions are fixed and counted by the frames; prompts come behind the frames and after the positions were added, so
they have none. Silence fills short clips and is never masked: Whisper was trained that way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from mope_deploy.errors import ConfigError
from mope_deploy.fields import decode
from mope_deploy.model.backbones.base import FrozenEncoder
from mope_deploy.model.backbones.exported.tracing import traced_as
from mope_deploy.model.backbones.masks import masked_mean
from mope_deploy.model.backbones.prefix import PrefixKV
from mope_deploy.model.backbones.processors import ProcessorValues, processor_values
from mope_deploy.model.backbones.sources import LoadedEncoder
from mope_deploy.model.backbones.transformers_encoder import LayeredTransformers
from mope_deploy.model.config import EncoderSpec
from mope_deploy.preprocess import AudioSpec

__all__ = ["WhisperEncoder"]


class _FeatureExtractor(ProcessorValues):
    feature_extractor_type: Literal["WhisperFeatureExtractor"] = "WhisperFeatureExtractor"
    sampling_rate: PositiveInt = 16_000
    n_fft: PositiveInt = 400
    hop_length: PositiveInt = 160
    feature_size: PositiveInt | None = None  # bands and seconds are the encoder's too: they may not contradict it
    chunk_length: float | None = None


class WhisperEncoder(LayeredTransformers):
    """A Whisper encoder without the decoder, layer by layer."""

    family = "transformers Whisper"
    modality = "audio"
    input_names = ("audio_features",)

    def __init__(self, encoder: Any, *, preprocessor: Mapping[str, Any]) -> None:
        super().__init__(encoder)
        self.preprocessor = dict(preprocessor)

    @classmethod
    def accepts(cls, module: Any) -> bool:
        return type(module).__name__ == "WhisperEncoder"

    @classmethod
    def wrap(cls, loaded: LoadedEncoder, spec: EncoderSpec) -> FrozenEncoder:
        """The encoder with its preprocessing, the log-mel spectrogram it was trained on.

        Raises:
            ConfigError: for ``max_seconds``, which the encoder itself fixes, and for a feature extractor that is not
                there or not of this encoder.
        """
        found, preprocessor = processor_values(loaded.location, spec.source, modality="audio", kind=_FeatureExtractor)
        backbone = cls(loaded.module, preprocessor=preprocessor | found.model_dump(exclude_none=True))
        config: Any = loaded.module.config
        samples = 2 * config.max_source_positions * found.hop_length  # the second convolution halves the frames
        if spec.max_seconds is not None:
            raise ConfigError(
                f"max_seconds of {spec.source}",
                received=spec.max_seconds,
                expected=f"none: a Whisper encoder reads {samples / found.sampling_rate:g} s, longer clips are cut",
            )
        bands, seconds = found.feature_size or config.num_mel_bins, found.chunk_length or samples / found.sampling_rate
        if bands != config.num_mel_bins or seconds * found.sampling_rate != samples:
            raise ConfigError(
                f"the feature extractor of {spec.source} is of another encoder",
                received=f"{bands} bands, {seconds:g} s",
                expected=f"{config.num_mel_bins} bands, {samples / found.sampling_rate:g} s",
            )
        values = {
            "form": "log-mel",
            "sample_rate": found.sampling_rate,
            "max_samples": samples,
            "fixed": True,
            "min_samples": 1,
            "normalise": False,
            "mels": config.num_mel_bins,
            "n_fft": found.n_fft,
            "hop": found.hop_length,
        }
        where = f"the feature extractor of {spec.source}"
        return FrozenEncoder(backbone, decode(values, AudioSpec, where, ConfigError))

    @property
    def layers(self) -> Any:
        return self.encoder.layers

    def embed(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Frames with their positions. audio_features (B, M, T) → (B, T / 2, D); all of them are real."""
        x = nn.functional.gelu(self.encoder.conv1(inputs["audio_features"]))
        x = nn.functional.gelu(self.encoder.conv2(x)).transpose(1, 2)  # (B, N, D)
        return x + self.encoder.embed_positions.weight, None

    def token_layer(self, index: int, rows: Tensor, shared: Tensor | None, P: int) -> Tensor:
        return self.layers[index](rows, None)

    def linears(self, layer: Any) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        return layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj  # keys have no bias

    def norm_before(self, layer: Any) -> nn.Module | None:
        return layer.self_attn_layer_norm

    def prefix_form(self, layer: Any, x: Tensor, prompts: Tensor | None, kv: PrefixKV | None, shared: Any) -> Tensor:
        norm = layer.self_attn_layer_norm
        normed = None if prompts is None else norm(prompts)
        x = x + traced_as(layer.self_attn, self._attended, layer, norm(x), normed, kv)
        x = x + layer.fc2(layer.activation_fn(layer.fc1(layer.final_layer_norm(x))))
        if x.dtype == torch.float16:  # as the library does: the largest sizes overflow half precision
            most = torch.finfo(x.dtype).max - 1000
            x = x.clamp(-most, most)
        return x

    def _attended(self, layer: Any, x: Tensor, prompts: Tensor | None, kv: PrefixKV | None) -> Tensor:
        return layer.self_attn.out_proj(self.mixed(layer, x, prompts, kv, None))

    def pool(self, x: Tensor, shared: Tensor | None) -> Tensor:
        """The mean of the frames. (B, N, D) → (B, D)."""
        return masked_mean(x, shared)

    def finish(self, x: Tensor, shared: Tensor | None) -> Tensor:
        """The mean of the frames after the encoder's final norm. (B, N, D) → (B, D)."""
        return masked_mean(self.encoder.layer_norm(x), shared)
