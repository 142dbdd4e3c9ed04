"""transformers' Whisper encoder: sound as a log-mel spectrogram of a fixed length (30 s), pre-norm.

Its positions are fixed and counted by the frames; prompts come behind the frames and after the positions were added, so
they have none. Silence fills short clips and is never masked: Whisper was trained that way.
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
from mope_deploy.preprocess import AudioSpec

__all__ = ["WhisperBackbone", "accepts", "wrap"]


def accepts(module: nn.Module) -> bool:
    """Whether ``module`` is an encoder of this family."""
    return type(module).__name__ == "WhisperEncoder"


def wrap(loaded: LoadedEncoder, spec: EncoderSpec) -> Any:
    """The frozen encoder with its preprocessing, the log-mel spectrogram it was trained on.

    Raises:
        ConfigError: for ``max_seconds``, which the encoder itself fixes.
    """
    from mope_deploy.model.backbones import FrozenEncoder

    found = {"sampling_rate": 16_000, "n_fft": 400, "hop_length": 160} | preprocessor_config(loaded.location)
    backbone = WhisperBackbone(loaded.module, preprocessor=found)
    config: Any = loaded.module.config
    samples = 2 * config.max_source_positions * int(found["hop_length"])  # the second convolution halves the frames
    if spec.max_seconds is not None:
        raise ConfigError(
            f"max_seconds of {spec.source}",
            received=spec.max_seconds,
            expected=f"none: a Whisper encoder reads {samples / found['sampling_rate']:g} s, longer clips are cut",
        )
    return FrozenEncoder(
        backbone,
        AudioSpec(
            form="log-mel",
            sample_rate=int(found["sampling_rate"]),
            max_samples=samples,
            fixed=True,
            min_samples=1,
            normalise=False,
            mels=config.num_mel_bins,
            n_fft=int(found["n_fft"]),
            hop=int(found["hop_length"]),
        ),
    )


class WhisperBackbone(Backbone):
    """A Whisper encoder, layer by layer.

    Args:
        encoder: transformers' module, without the decoder.
        preprocessor: what its ``preprocessor_config.json`` says.
    """

    modality = "audio"
    input_names = ("audio_features",)
    has_prefix_form = True

    def __init__(self, encoder: Any, *, preprocessor: Mapping[str, Any]) -> None:
        width = encoder.config.d_model
        super().__init__(encoder, width=width, depth=len(encoder.layers), feature_width=width)
        self.preprocessor = dict(preprocessor)

    def embed(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Frames with their positions. audio_features (B, M, T) → (B, T / 2, D); all of them are real."""
        x = nn.functional.gelu(self.encoder.conv1(inputs["audio_features"]))
        x = nn.functional.gelu(self.encoder.conv2(x)).transpose(1, 2)  # (B, N, D)
        return x + self.encoder.embed_positions.weight, None

    def layer(self, index: int, x: Tensor, prompts: Tensor | None, mask: Tensor | None) -> Tensor:
        """Layer ``index`` on [x ; prompts], without the prompts' outputs. (B, N, D), (B, P, D) → (B, N, D)."""
        N = x.shape[1]
        if prompts is not None:
            x = torch.cat([x, prompts], dim=1)
        return self.encoder.layers[index](x, None)[:, :N]

    def prefix_layer(
        self, index: int, x: Tensor, prompts: Tensor | None, mask: Tensor | None, kv: Made | None = None
    ) -> Tensor:
        """Layer ``index`` in prefix form. (B, N, D), (B, P, D), keys and values → (B, N, D)."""
        layer = self.encoder.layers[index]
        return inside(layer, _prefix_layer, layer, x, prompts, kv)

    def projection(self, index: int) -> Projection:
        """How layer ``index`` makes keys and values of prompts; its keys have no bias."""
        layer = self.encoder.layers[index]
        return Projection.of(layer.self_attn_layer_norm, layer.self_attn.k_proj, layer.self_attn.v_proj)

    def pool(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The mean of the frames. (B, N, D) → (B, D)."""
        return masked_mean(x, mask)

    def finish(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The mean of the frames after the encoder's final norm. (B, N, D) → (B, D)."""
        return masked_mean(self.encoder.layer_norm(x), mask)

    def save_source(self, folder: Path) -> None:
        """Write config.json, model.safetensors and preprocessor_config.json, of the encoder alone."""
        save_transformers(self.encoder, folder, preprocessor=self.preprocessor)


def _prefix_layer(layer: Any, x: Tensor, prompts: Tensor | None, kv: Made | None) -> Tensor:
    norm = layer.self_attn_layer_norm
    normed = None if prompts is None else norm(prompts)
    x = x + inside(layer.self_attn, _prefix_attention, layer.self_attn, norm(x), normed, kv)
    x = x + layer.fc2(layer.activation_fn(layer.fc1(layer.final_layer_norm(x))))
    if x.dtype == torch.float16:  # as the library does: the largest sizes overflow half precision
        most = torch.finfo(x.dtype).max - 1000
        x = x.clamp(-most, most)
    return x


def _prefix_attention(own: Any, x: Tensor, prompts: Tensor | None, kv: Made | None) -> Tensor:
    return own.out_proj(attention(own.q_proj, own.k_proj, own.v_proj, own.num_heads, x, prompts, kv, None))
