"""transformers' MPNet: post-norm, learned positions and one relative-position bias that every layer adds.

Prompts have no position: the bias between a prompt and anything else is 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mope_deploy.model.backbones.exported.tracing import traced_as
from mope_deploy.model.backbones.masks import blocked, prompts_unmasked
from mope_deploy.model.backbones.prefix import PrefixKV
from mope_deploy.model.backbones.text import LayeredText

__all__ = ["MPNetEncoder"]


class MPNetEncoder(LayeredText):
    """A transformers MPNet encoder, layer by layer; the table of distances ends at ``max_length``."""

    family = "transformers MPNet"
    model_types = ("mpnet",)
    buckets: Tensor

    def __init__(self, encoder: Any, *, max_length: int) -> None:
        super().__init__(encoder, max_length=max_length)
        # The bucket of every distance key − query, −(max_length − 1) first: a logarithm in the graph would round
        # differently from machine to machine, and a step of one bucket is another weight.
        distances = torch.arange(1 - max_length, max_length)
        self.register_buffer("buckets", encoder.encoder.relative_position_bucket(distances), persistent=False)

    @classmethod
    def positions(cls, encoder: Any) -> int:
        return super().positions(encoder) - encoder.embeddings.padding_idx - 1

    def embed(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Token and position embeddings. input_ids, attention_mask (B, N) int64 → (B, N, D), (B, N) int64."""
        ids, first = inputs["input_ids"], self.encoder.embeddings.padding_idx + 1
        # Padding is always behind the text, so a plain count gives every real token the library's own position.
        positions = torch.arange(first, first + ids.shape[1], device=ids.device)
        return self.encoder.embeddings(input_ids=ids, position_ids=positions.unsqueeze(0)), inputs["attention_mask"]

    def token_layer(self, index: int, rows: Tensor, shared: Tensor | None, P: int) -> Tensor:
        assert shared is not None
        bias = nn.functional.pad(self._bias(rows.shape[1] - P), (0, P, 0, P))  # (1, heads, N + P, N + P)
        return self.layers[index](rows, blocked(prompts_unmasked(shared, P), rows.dtype), bias)[0]

    def shared_by(self, index: int, x: Tensor, shared: Tensor | None, P: int) -> Tensor:
        """Additive mask and bias of the text's keys, (B, heads, N, N)."""
        return super().shared_by(index, x, shared, P) + self._bias(x.shape[1])

    def linears(self, layer: Any) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        own = layer.attention.attn
        return own.q, own.k, own.v

    def prefix_form(self, layer: Any, x: Tensor, prompts: Tensor | None, kv: PrefixKV | None, shared: Any) -> Tensor:
        own = layer.attention.attn
        mixed = traced_as(own, self.mixed, layer, x, prompts, kv, shared)
        h = layer.attention.LayerNorm(own.o(mixed) + x)
        return layer.output(layer.intermediate(h), h)

    def _bias(self, N: int) -> Tensor:
        """The relative-position bias of N text tokens, (1, heads, N, N)."""
        place = torch.arange(N, device=self.buckets.device)
        offset = place - place[:, None] + self.buckets.shape[0] // 2  # (N, N)
        return self.encoder.encoder.relative_attention_bias(self.buckets[offset]).permute(2, 0, 1).unsqueeze(0)
