"""transformers' DeBERTa-v2 and -v3: disentangled attention (arXiv 2006.03654), post-norm.

A score is the sum of content to content, content to position and position to content. Prompts have no position, so
theirs is the first term alone, under the same scale. The library's attention cannot be told to leave the other two
out, so this part of its layers is replaced; the rest of a layer, and the whole library's own forward pass, stay.

What positions are projected to depends on nothing but frozen weights, so it is a table per layer, made once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention, make_log_bucket_position

from mope_deploy.model.backbones.masks import blocked, prompts_unmasked
from mope_deploy.model.backbones.text import LayeredText

__all__ = ["DebertaEncoder", "PromptedAttention", "table_rows"]


class DebertaEncoder(LayeredText):
    """A transformers DeBERTa-v2, layer by layer; the tables of positions end at ``max_length``.

    Args:
        encoder: transformers' module. Its attentions become :class:`PromptedAttention`; tensors and results stay.
        max_length: longest text in tokens.
    """

    family = "transformers DeBERTa-v2"
    model_types = ("deberta-v2",)
    has_prefix_form = False
    rows: Tensor

    def __init__(self, encoder: Any, *, max_length: int) -> None:
        super().__init__(encoder, max_length=max_length)
        for layer in self.layers:
            layer.attention.self.__class__ = PromptedAttention
        rows, self.reach = table_rows(self.layers[0].attention.self, max_length)
        self.register_buffer("rows", rows, persistent=False)
        self._make_tables()

    def embed(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Token embeddings, 0 under padding. input_ids, attention_mask (B, N) int64 → (B, N, D), (B, N) int64."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        positions = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)  # read by encoders that have them
        return self.encoder.embeddings(input_ids=ids, position_ids=positions, mask=mask), mask

    def layer(self, index: int, x: Tensor, prompts: Tensor | None, shared: Tensor | None) -> Tensor:
        """The library's own layer, queries of the text alone. (B, N, D), (B, P, D) → (B, N, D)."""
        assert shared is not None
        P = 0 if prompts is None else prompts.shape[1]
        rows = x if prompts is None else torch.cat([x, prompts], dim=1)  # (B, N + P, D)
        place = torch.arange(x.shape[1], device=x.device)
        distances = self.rows[place[:, None] - place + self.rows.shape[0] // 2]  # of query i and key j, (N, N)
        unseen = blocked(prompts_unmasked(shared, P), x.dtype)  # (B, 1, 1, N + P)
        hidden, _ = self.layers[index](rows, unseen, query_states=x, relative_pos=distances)
        if index == 0 and self.encoder.encoder.conv is not None:  # v2-xlarge: a convolution over the text alone
            return self.encoder.encoder.conv(x, hidden, shared)
        return hidden

    @torch.no_grad()
    def _make_tables(self) -> None:
        stack = self.encoder.encoder
        positions = stack.get_rel_embedding()[self.reach] if stack.relative_attention else None  # (rows, D)
        for layer in stack.layer:
            layer.attention.self.make_tables(positions)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Tables follow a cast or a move of the weights they were made of, at the new precision."""
        super()._apply(fn, recurse)
        self._make_tables()
        return self


class PromptedAttention(DisentangledSelfAttention):
    """The library's attention, and one from the text's queries to keys of text and prompts.

    Attributes:
        c2p: keys of positions (heads, d, rows), or None without that term.
        p2c: queries of positions over the scale, likewise.
    """

    c2p: Tensor | None
    p2c: Tensor | None

    def make_tables(self, positions: Tensor | None) -> None:
        """Project the embeddings of positions (rows, D); None where the encoder has no relative positions."""
        shared = self.share_att_key
        keys = queries = None
        if positions is not None and "c2p" in self.pos_att_type:
            keys = self._split((self.key_proj if shared else self.pos_key_proj)(positions)).mT.contiguous()
        if positions is not None and "p2c" in self.pos_att_type:
            queries = (self.query_proj if shared else self.pos_query_proj)(positions) / self._scale
            queries = self._split(queries).mT.contiguous()
        self.register_buffer("c2p", keys, persistent=False)
        self.register_buffer("p2c", queries, persistent=False)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        output_attentions: bool = False,
        query_states: Tensor | None = None,
        relative_pos: Tensor | None = None,
        rel_embeddings: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The library's own without ``query_states``, else the mixed values of the text.

        Args:
            hidden_states: text and prompts, (B, N + P, D).
            attention_mask: additive, (B, 1, 1, N + P).
            output_attentions: part of the library's signature.
            query_states: the text, (B, N, D).
            relative_pos: row of the tables for every query and key of the text, (N, N) int64.
            rel_embeddings: part of the library's signature; the tables stand for them.

        Returns:
            (B, N, heads · d), and None for the weights.
        """
        if query_states is None:
            return super().forward(
                hidden_states,
                attention_mask,
                output_attentions,
                relative_pos=relative_pos,
                rel_embeddings=rel_embeddings,
            )
        q = self._split(self.query_proj(query_states)) / self._scale  # (B, heads, N, d)
        k = self._split(self.key_proj(hidden_states))  # (B, heads, N + P, d)
        v = self._split(self.value_proj(hidden_states))
        scores = q @ k.mT  # (B, heads, N, N + P)
        B, H, N, _ = q.shape
        assert relative_pos is not None
        rows = relative_pos.expand(B, H, N, N)
        of_text, of_prompts = scores[..., :N], scores[..., N:]
        if self.c2p is not None:
            of_text = of_text + torch.gather(q @ self.c2p, -1, rows)
        if self.p2c is not None:  # the same distances seen from the key: row j, column i
            of_text = of_text + torch.gather(k[:, :, :N] @ self.p2c, -1, rows.mT).mT
        scores = torch.cat([of_text, of_prompts], dim=-1)
        weights = torch.softmax(scores + attention_mask, dim=-1)
        return (weights @ v).transpose(1, 2).flatten(2), None

    @property
    def _scale(self) -> float:
        # The library counts the terms whether or not the encoder has relative positions at all.
        terms = 1 + sum(term in self.pos_att_type for term in ("c2p", "p2c"))
        return math.sqrt(self.attention_head_size * terms)

    def _split(self, x: Tensor) -> Tensor:
        """(…, N, heads · d) → (…, heads, N, d)."""
        return x.unflatten(-1, (self.num_attention_heads, -1)).transpose(-2, -3)


def table_rows(attention: DisentangledSelfAttention, max_length: int) -> tuple[Tensor, slice]:
    """The table's row for every distance query − key, −(max_length − 1) first; and which rows of the whole those are.

    The distances of a text of at most ``max_length`` tokens reach a part of the table only. Their logarithmic buckets
    are the library's own, looked up: a logarithm in a graph would round differently from machine to machine.
    """
    distances = torch.arange(1 - max_length, max_length)
    if not attention.relative_attention:
        return distances, slice(0, 0)
    span = attention.pos_ebd_size
    if attention.position_buckets > 0:
        distances = make_log_bucket_position(distances, attention.position_buckets, attention.max_relative_positions)
    rows = (distances.long() + span).clamp(0, 2 * span - 1)
    first, last = int(rows.min()), int(rows.max())
    return rows - first, slice(first, last + 1)
