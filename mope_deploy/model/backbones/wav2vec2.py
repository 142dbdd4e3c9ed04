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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mope_deploy.errors import ConfigError
from mope_deploy.model.backbones.base import Backbone, masked_mean
from mope_deploy.model.backbones.prefix import Made, Projection, attention, inside
from mope_deploy.model.backbones.sources import LoadedEncoder, preprocessor_config, save_transformers
from mope_deploy.model.backbones.text import blocked
from mope_deploy.model.config import EncoderSpec
from mope_deploy.preprocess import AudioSpec

__all__ = ["Wav2Vec2Backbone", "accepts", "wrap"]

_MODEL_TYPES = ("wav2vec2", "hubert")
_DEFAULT_SECONDS = 10.0
_MOST_SECONDS = 600.0


def accepts(module: nn.Module) -> bool:
    """Whether ``module`` is an encoder of this family."""
    return getattr(getattr(module, "config", None), "model_type", None) in _MODEL_TYPES


def wrap(loaded: LoadedEncoder, spec: EncoderSpec) -> Any:
    """The frozen encoder with its preprocessing: rate and normalisation as its own feature extractor says.

    Raises:
        ConfigError: for an encoder with an adapter behind its layers, or a length it cannot read.
    """
    from mope_deploy.model.backbones import FrozenEncoder

    config: Any = loaded.module.config
    if getattr(config, "add_adapter", False):
        raise ConfigError(f"{spec.source} has an adapter behind its layers, which is not supported")
    preprocessor = {"sampling_rate": 16_000, "do_normalize": True} | preprocessor_config(loaded.location)
    backbone = Wav2Vec2Backbone(loaded.module, preprocessor=preprocessor)
    rate = int(preprocessor["sampling_rate"])
    seconds = _DEFAULT_SECONDS if spec.max_seconds is None else spec.max_seconds
    if not backbone.receptive_field <= seconds * rate <= _MOST_SECONDS * rate:
        raise ConfigError(
            f"max_seconds of {spec.source}",
            received=seconds,
            expected=f"{backbone.receptive_field / rate:g} (one frame) to {_MOST_SECONDS:g}",
        )
    return FrozenEncoder(
        backbone,
        AudioSpec(
            form="waveform",
            sample_rate=rate,
            max_samples=round(seconds * rate),
            fixed=backbone.fixed,
            min_samples=backbone.receptive_field,
            normalise=bool(preprocessor["do_normalize"]),
        ),
    )


class Wav2Vec2Backbone(Backbone):
    """A wav2vec 2.0 or HuBERT encoder, layer by layer.

    Args:
        encoder: transformers' module.
        preprocessor: what its ``preprocessor_config.json`` says.

    Attributes:
        fixed: whether clips must have one length, because a norm runs over time.
        receptive_field, stride: samples that one frame is made from, and samples between two frames.
    """

    modality = "audio"
    has_prefix_form = True

    def __init__(self, encoder: Any, *, preprocessor: Mapping[str, Any]) -> None:
        config = encoder.config
        super().__init__(
            encoder,
            width=config.hidden_size,
            depth=len(encoder.encoder.layers),
            feature_width=config.hidden_size,
        )
        self.preprocessor = dict(preprocessor)
        self.fixed = config.feat_extract_norm == "group"
        self.input_names = ("audio_values",) if self.fixed else ("audio_values", "audio_mask")
        self.receptive_field = 1
        for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
            self.receptive_field = (self.receptive_field - 1) * stride + kernel
        self.stride = math.prod(config.conv_stride)

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
        return (x if self._pre_norm else self.encoder.encoder.layer_norm(x)), mask

    def layer(self, index: int, x: Tensor, prompts: Tensor | None, mask: Tensor | None) -> Tensor:
        """Layer ``index`` on [x ; prompts], without the prompts' outputs. (B, N, D), (B, P, D) → (B, N, D)."""
        N = x.shape[1]
        if prompts is not None:
            x = torch.cat([x, prompts], dim=1)  # (B, N + P, D)
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(prompts.shape[:2])], dim=1)  # prompts are never masked
        unseen = None if mask is None else blocked(mask, x.dtype)  # (B, 1, 1, N + P)
        return self.encoder.encoder.layers[index](x, attention_mask=unseen)[:, :N]

    def prefix_layer(
        self, index: int, x: Tensor, prompts: Tensor | None, mask: Tensor | None, kv: Made | None = None
    ) -> Tensor:
        """Layer ``index`` in prefix form. (B, N, D), (B, P, D), keys and values → (B, N, D)."""
        layer = self.encoder.encoder.layers[index]
        form = _prefix_pre_norm if self._pre_norm else _prefix_post_norm
        return inside(layer, form, layer, x, prompts, kv, None if mask is None else blocked(mask, x.dtype))

    def projection(self, index: int) -> Projection:
        """How layer ``index`` makes keys and values of prompts."""
        layer = self.encoder.encoder.layers[index]
        norm = layer.layer_norm if self._pre_norm else None
        return Projection.of(norm, layer.attention.k_proj, layer.attention.v_proj)

    def pool(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The mean of the real frames. (B, N, D) → (B, D)."""
        return masked_mean(x, mask)

    def finish(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The mean of the real frames after the encoder's final norm, where it has one. (B, N, D) → (B, D)."""
        return masked_mean(self.encoder.encoder.layer_norm(x) if self._pre_norm else x, mask)

    def save_source(self, folder: Path) -> None:
        """Write config.json, model.safetensors and preprocessor_config.json in transformers' own form."""
        save_transformers(self.encoder, folder, preprocessor=self.preprocessor)

    @property
    def _pre_norm(self) -> bool:
        return bool(self.encoder.config.do_stable_layer_norm)


def _prefix_pre_norm(layer: Any, x: Tensor, prompts: Tensor | None, kv: Made | None, unseen: Tensor | None) -> Tensor:
    normed = None if prompts is None else layer.layer_norm(prompts)
    x = x + inside(layer.attention, _prefix_attention, layer.attention, layer.layer_norm(x), normed, kv, unseen)
    x = x + layer.feed_forward(layer.final_layer_norm(x))
    return x if layer.adapter_layer is None else x + layer.adapter_layer(x)


def _prefix_post_norm(layer: Any, x: Tensor, prompts: Tensor | None, kv: Made | None, unseen: Tensor | None) -> Tensor:
    x = layer.layer_norm(x + inside(layer.attention, _prefix_attention, layer.attention, x, prompts, kv, unseen))
    return layer.final_layer_norm(x + layer.feed_forward(x))


def _prefix_attention(own: Any, x: Tensor, prompts: Tensor | None, kv: Made | None, unseen: Tensor | None) -> Tensor:
    return own.out_proj(attention(own.q_proj, own.k_proj, own.v_proj, own.num_heads, x, prompts, kv, unseen))
