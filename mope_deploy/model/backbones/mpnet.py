"""transformers' MPNet: post-norm, learned positions and one relative-position bias that every layer adds.

Prompts have no position: the bias between a prompt and anything else is 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mope_deploy.model.backbones.prefix import Made, Projection, attention, inside
from mope_deploy.model.backbones.sources import LoadedEncoder
from mope_deploy.model.backbones.text import (
    TextBackbone,
    blocked,
    frozen_text,
    longest_text,
    with_prompts,
)
from mope_deploy.model.config import EncoderSpec

__all__ = ["MPNetBackbone", "accepts", "wrap"]


def accepts(module: nn.Module) -> bool:
    """Whether ``module`` is an encoder of this family."""
    return getattr(getattr(module, "config", None), "model_type", None) == "mpnet"


def wrap(loaded: LoadedEncoder, spec: EncoderSpec) -> Any:
    """The frozen encoder with its tokenizer.

    Raises:
        ConfigError: if there is no tokenizer beside the encoder, or ``max_length`` is more than its positions allow.
    """
    encoder: Any = loaded.module
    max_length = longest_text(spec, limit=encoder.config.max_position_embeddings - encoder.embeddings.padding_idx - 1)
    return frozen_text(MPNetBackbone(encoder, max_length=max_length), loaded, spec, max_length=max_length)


class MPNetBackbone(TextBackbone):
    """A transformers MPNet encoder, layer by layer.

    Args:
        encoder: transformers' module.
        max_length: longest text in tokens; the table of distances ends there.
    """

    has_prefix_form = True
    buckets: Tensor

    def __init__(self, encoder: Any, *, max_length: int) -> None:
        config = encoder.config
        super().__init__(
            encoder, width=config.hidden_size, depth=len(encoder.encoder.layer), feature_width=config.hidden_size
        )
        self.first_position: int = encoder.embeddings.padding_idx + 1
        # The bucket of every distance key − query, −(max_length − 1) first: a logarithm in the graph would round
        # differently from machine to machine, and a step of one bucket is another weight.
        distances = torch.arange(1 - max_length, max_length)
        self.register_buffer("buckets", encoder.encoder.relative_position_bucket(distances), persistent=False)

    def embed(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Token and position embeddings. input_ids, attention_mask (B, N) int64 → (B, N, D), (B, N) int64."""
        ids = inputs["input_ids"]
        # Padding is always behind the text, so a plain count gives every real token the library's own position.
        positions = torch.arange(self.first_position, self.first_position + ids.shape[1], device=ids.device)
        return self.encoder.embeddings(input_ids=ids, position_ids=positions.unsqueeze(0)), inputs["attention_mask"]

    def layer(self, index: int, x: Tensor, prompts: Tensor | None, mask: Tensor | None) -> Tensor:
        """Layer ``index`` on [x ; prompts], without the prompts' outputs. (B, N, D), (B, P, D) → (B, N, D)."""
        assert mask is not None
        N, P = x.shape[1], 0 if prompts is None else prompts.shape[1]
        everything, mask = with_prompts(x, prompts, mask)  # (B, N + P, D)
        bias = nn.functional.pad(self._bias(N), (0, P, 0, P))  # (1, heads, N + P, N + P)
        return self.encoder.encoder.layer[index](everything, blocked(mask, x.dtype), bias)[0][:, :N]

    def prefix_layer(
        self, index: int, x: Tensor, prompts: Tensor | None, mask: Tensor | None, kv: Made | None = None
    ) -> Tensor:
        """Layer ``index`` in prefix form. (B, N, D), (B, P, D), keys and values → (B, N, D)."""
        assert mask is not None
        layer = self.encoder.encoder.layer[index]
        unseen = blocked(mask, x.dtype) + self._bias(x.shape[1])  # (B, heads, N, N)
        return inside(layer, _prefix_layer, layer, x, prompts, kv, unseen)

    def projection(self, index: int) -> Projection:
        """How layer ``index`` makes keys and values of prompts: post-norm, so linearly."""
        own = self.encoder.encoder.layer[index].attention.attn
        return Projection.of(None, own.k, own.v)

    def _bias(self, N: int) -> Tensor:
        """The relative-position bias of N text tokens, (1, heads, N, N)."""
        place = torch.arange(N, device=self.buckets.device)
        offset = place - place[:, None] + self.buckets.shape[0] // 2  # (N, N)
        return self.encoder.encoder.relative_attention_bias(self.buckets[offset]).permute(2, 0, 1).unsqueeze(0)


def _prefix_layer(layer: Any, x: Tensor, prompts: Tensor | None, kv: Made | None, unseen: Tensor) -> Tensor:
    own = layer.attention.attn
    mixed = inside(own, attention, own.q, own.k, own.v, own.num_attention_heads, x, prompts, kv, unseen)
    h = layer.attention.LayerNorm(own.o(mixed) + x)
    return layer.output(layer.intermediate(h), h)
