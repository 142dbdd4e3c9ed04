"""transformers' DeBERTa-v2 and -v3: disentangled attention (arXiv 2006.03654), post-norm.

A score is the sum of content to content, content to position and position to content. Prompts have no position, so
theirs is the first term alone, under the same scale. The library's layer cannot be told to leave the other two out, so
the attention is written out here, on the library's own weights; queries are needed of the text alone, as the prompts'
outputs are thrown away.

What positions are projected to depends on nothing but frozen weights, so it is a table per layer, made once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mope_deploy.model.backbones.sources import LoadedEncoder
from mope_deploy.model.backbones.text import TextBackbone, blocked, frozen_text, longest_text, with_prompts
from mope_deploy.model.config import EncoderSpec

__all__ = ["DebertaBackbone", "accepts", "wrap"]


def accepts(module: nn.Module) -> bool:
    """Whether ``module`` is an encoder of this family."""
    return getattr(getattr(module, "config", None), "model_type", None) == "deberta-v2"


def wrap(loaded: LoadedEncoder, spec: EncoderSpec) -> Any:
    """The frozen encoder with its tokenizer.

    Raises:
        ConfigError: if there is no tokenizer beside the encoder, or ``max_length`` is more than its positions allow.
    """
    encoder: Any = loaded.module
    max_length = longest_text(spec, limit=encoder.config.max_position_embeddings)
    return frozen_text(DebertaBackbone(encoder, max_length=max_length), loaded, spec, max_length=max_length)


class DebertaBackbone(TextBackbone):
    """A transformers DeBERTa-v2, layer by layer.

    Args:
        encoder: transformers' module.
        max_length: longest text in tokens; the tables of positions end there.
    """

    rows: Tensor

    def __init__(self, encoder: Any, *, max_length: int) -> None:
        config = encoder.config
        super().__init__(
            encoder, width=config.hidden_size, depth=len(encoder.encoder.layer), feature_width=config.hidden_size
        )
        attention = encoder.encoder.layer[0].attention.self
        self.heads: int = attention.num_attention_heads
        self.terms = tuple(term for term in ("c2p", "p2c") if term in attention.pos_att_type)
        # The library counts the terms for the scale whether or not the encoder has relative positions at all.
        self.scale = math.sqrt(attention.attention_head_size * (1 + len(self.terms)))
        if not attention.relative_attention:
            self.terms = ()
        if self.terms:
            rows, self.reach = _rows(attention, max_length)
            self.register_buffer("rows", rows, persistent=False)
            self._make_tables()

    def embed(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Token embeddings, 0 under padding. input_ids, attention_mask (B, N) int64 → (B, N, D), (B, N) int64."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        positions = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)  # read by encoders that have them
        return self.encoder.embeddings(input_ids=ids, position_ids=positions, mask=mask), mask

    def layer(self, index: int, x: Tensor, prompts: Tensor | None, mask: Tensor | None) -> Tensor:
        """Layer ``index`` on [x ; prompts], without the prompts' outputs. (B, N, D), (B, P, D) → (B, N, D)."""
        assert mask is not None
        layer = self.encoder.encoder.layer[index]
        everything, seen = with_prompts(x, prompts, mask)  # (B, N + P, D)
        q = self._split(layer.attention.self.query_proj(x)) / self.scale  # (B, heads, N, d)
        k = self._split(layer.attention.self.key_proj(everything))  # (B, heads, N + P, d)
        v = self._split(layer.attention.self.value_proj(everything))
        scores = q @ k.transpose(-1, -2)  # (B, heads, N, N + P)
        if self.terms:
            N = x.shape[1]
            scores = torch.cat([scores[..., :N] + self._relative(index, q, k[:, :, :N]), scores[..., N:]], dim=-1)
        weights = torch.softmax(scores + blocked(seen, x.dtype), dim=-1)
        mixed = (weights @ v).transpose(1, 2).flatten(2)  # (B, N, heads · d)
        h = layer.attention.output(mixed, x)
        h = layer.output(layer.intermediate(h), h)
        if index == 0 and self.encoder.encoder.conv is not None:  # v2-xlarge: a convolution over the text alone
            h = self.encoder.encoder.conv(x, h, mask)
        return h

    def _relative(self, index: int, q: Tensor, k: Tensor) -> Tensor:
        """Content to position plus position to content of the text. q, k (B, heads, N, d) → (B, heads, N, N)."""
        B, H, N, _ = q.shape
        place = torch.arange(N, device=q.device)
        offset = place[:, None] - place + self.rows.shape[0] // 2  # of query i and key j
        rows = self.rows[offset].expand(B, H, N, N)
        bias = torch.zeros((), dtype=q.dtype, device=q.device)
        if "c2p" in self.terms:
            bias = bias + torch.gather(q @ self.get_buffer(f"c2p_{index}"), -1, rows)
        if "p2c" in self.terms:  # the same distances seen from the key: row j, column i
            seen_from_key = torch.gather(k @ self.get_buffer(f"p2c_{index}"), -1, rows.transpose(-1, -2))
            bias = bias + seen_from_key.transpose(-1, -2)
        return bias

    def _split(self, x: Tensor) -> Tensor:
        """(…, N, heads · d) → (…, heads, N, d)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(-2, -3)

    @torch.no_grad()
    def _make_tables(self) -> None:
        """Every layer's projected positions (heads, d, rows), those of p2c already divided by the scale."""
        positions = self.encoder.encoder.get_rel_embedding()[self.reach]  # (rows, D)
        for i, layer in enumerate(self.encoder.encoder.layer):
            own = layer.attention.self
            shared = own.share_att_key
            if "c2p" in self.terms:
                keys = (own.key_proj if shared else own.pos_key_proj)(positions)
                self.register_buffer(f"c2p_{i}", self._split(keys).transpose(-1, -2).contiguous(), persistent=False)
            if "p2c" in self.terms:
                queries = (own.query_proj if shared else own.pos_query_proj)(positions) / self.scale
                self.register_buffer(f"p2c_{i}", self._split(queries).transpose(-1, -2).contiguous(), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Tables follow a cast or a move of the weights they were made of, at the new precision."""
        super()._apply(fn, recurse)
        if self.terms:
            self._make_tables()
        return self


def _rows(attention: Any, max_length: int) -> tuple[Tensor, slice]:
    """The row of the position table for every distance query − key, −(max_length − 1) first, and which rows those are.

    The distances of a text of at most ``max_length`` tokens reach a part of the table only. Their logarithmic buckets
    are the library's own.
    """
    from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

    distances = torch.arange(1 - max_length, max_length)
    span = attention.pos_ebd_size
    if attention.position_buckets > 0:
        distances = make_log_bucket_position(distances, attention.position_buckets, attention.max_relative_positions)
    rows = (distances.long() + span).clamp(0, 2 * span - 1)
    first, last = int(rows.min()), int(rows.max())
    return rows - first, slice(first, last + 1)
