"""transformers' ModernBERT: pre-norm, rotary positions, and layers that see only a window of the text.

Text tokens keep the angles they have without prompts; prompts have none (cos 1, sin 0). In a windowed layer a token
sees its neighbours as before, and every prompt: prompts have no place that could lie outside a window.

The angles are tables made once, not computed in the graph: at reduced precision the product of a position and a
frequency would lose the very digits that tell positions apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.modernbert.modeling_modernbert import rotate_half

from mope_deploy.errors import ConfigError
from mope_deploy.model.backbones.exported.tracing import traced_as
from mope_deploy.model.backbones.masks import blocked, prompts_seen, prompts_unmasked
from mope_deploy.model.backbones.prefix import PrefixKV, Projection, joined, mixed_values, split_heads, split_qkv
from mope_deploy.model.backbones.text import LayeredText

__all__ = ["ModernBertEncoder"]

_WINDOWED = "sliding_attention"


class ModernBertEncoder(LayeredText):
    """A transformers ModernBERT, layer by layer; the tables of angles end at ``max_length``."""

    family = "transformers ModernBERT"
    model_types = ("modernbert",)

    @classmethod
    def of(cls, encoder: Any, source: str, max_length: int) -> ModernBertEncoder:
        """Raises :class:`ConfigError` for angles that change with the length of the text."""
        for kind, values in encoder.config.rope_parameters.items():
            if values["rope_type"] != "default":
                raise ConfigError(
                    f"rotary positions of {source}", received=f"{values['rope_type']!r} ({kind})", expected="'default'"
                )
        return cls(encoder, max_length=max_length)

    def __init__(self, encoder: Any, *, max_length: int) -> None:
        super().__init__(encoder, max_length=max_length)
        positions = torch.arange(max_length).unsqueeze(0)
        for kind in set(encoder.config.layer_types):
            cos, sin = encoder.rotary_emb(encoder.embeddings.tok_embeddings.weight, positions, kind)
            self.register_buffer(f"{kind}_cos", cos[0], persistent=False)  # (max_length, head width)
            self.register_buffer(f"{kind}_sin", sin[0], persistent=False)

    def embed(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Normed token embeddings. input_ids, attention_mask (B, N) int64 → (B, N, D), (B, N) int64."""
        return self.encoder.embeddings(input_ids=inputs["input_ids"]), inputs["attention_mask"]

    @property
    def layers(self) -> Any:
        return self.encoder.layers

    def token_layer(self, index: int, rows: Tensor, shared: Tensor | None, P: int) -> Tensor:
        assert shared is not None
        layer, N = self.layers[index], rows.shape[1] - P
        unseen, angles = self._seen_from(layer, prompts_unmasked(shared, P), rows.dtype, text=N, prompts=P)
        return layer(rows, attention_mask=unseen, position_embeddings=angles)

    def shared_by(self, index: int, x: Tensor, shared: Tensor | None, P: int) -> Any:
        """The additive mask of the text's keys, (B, 1, 1 or N, N), and the angles of text and prompts."""
        assert shared is not None
        return self._seen_from(self.layers[index], shared, x.dtype, text=x.shape[1], prompts=P)

    def prefix_form(self, layer: Any, x: Tensor, prompts: Tensor | None, kv: PrefixKV | None, shared: Any) -> Tensor:
        rows = layer.attn_norm(x if prompts is None else torch.cat([x, prompts], dim=1))
        x = x + traced_as(layer.attn, _attention, layer.attn, rows, kv, *shared)
        return x + layer.mlp(layer.mlp_norm(x))

    def projection(self, index: int) -> Projection:
        """How layer ``index`` makes keys and values of prompts; the first layer has no norm of its own."""
        layer = self.layers[index]
        weight, bias = layer.attn.Wqkv.weight, layer.attn.Wqkv.bias
        inner = len(weight) // 3
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        norm = None if isinstance(layer.attn_norm, nn.Identity) else layer.attn_norm
        return Projection(norm, weight[inner:], bias[inner:], product=len(weight))

    def finish(self, x: Tensor, shared: Tensor | None) -> Tensor:
        """The class token after the final norm. (B, N, D) → (B, D)."""
        return self.encoder.final_norm(x[:, 0])

    def _seen_from(
        self, layer: Any, mask: Tensor, dtype: torch.dtype, *, text: int, prompts: int
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """What a layer's tokens see: the additive mask of the keys in ``mask``, and the angles of all tokens."""
        unseen = blocked(mask, dtype)  # (B, 1, 1, n)
        if layer.attention_type == _WINDOWED:
            unseen = self._beyond_window(unseen, text=text)  # (B, 1, n, n)
        return unseen, self._angles(layer.attention_type, text=text, prompts=prompts)

    def _beyond_window(self, unseen: Tensor, *, text: int) -> Tensor:
        """``unseen`` with the text tokens blocked that lie beyond a text token's window. → (B, 1, N + P, N + P)."""
        place = torch.arange(unseen.shape[-1], device=unseen.device)
        is_text = (place < text).long()
        distance = (place[:, None] - place).abs() * is_text[:, None] * is_text  # a prompt is far from nothing
        lowest = torch.finfo(unseen.dtype).min
        unseen = torch.where(distance <= self.encoder.config.sliding_window, unseen, lowest)
        # Padding far behind the text would see nothing at all, and a softmax over nothing is NaN at half precision.
        return torch.where(place[:, None] == place, 0.0, unseen)

    def _angles(self, kind: str, *, text: int, prompts: int) -> tuple[Tensor, Tensor]:
        """cos and sin of every token: the text's own, then 1 and 0 for prompts. Each (1, N + P, head width)."""
        cos_table, sin_table = self.get_buffer(f"{kind}_cos"), self.get_buffer(f"{kind}_sin")
        positions = torch.arange(text, device=cos_table.device)
        cos, sin = (nn.functional.embedding(positions, table) for table in (cos_table, sin_table))
        cos = torch.cat([cos, cos.new_ones(prompts, cos.shape[1])])
        sin = torch.cat([sin, sin.new_zeros(prompts, sin.shape[1])])
        return cos.unsqueeze(0), sin.unsqueeze(0)


def _attention(
    attention: Any, rows: Tensor, kv: PrefixKV | None, unseen: Tensor, angles: tuple[Tensor, Tensor]
) -> Tensor:
    """rows (B, N + P, D) normed, text first → (B, N, D)."""
    N = unseen.shape[-1]
    heads = attention.config.num_attention_heads
    q, k, v = split_qkv(attention.Wqkv(rows), N)
    q, k, v = (split_heads(each, heads) for each in (q, joined(k, kv, 0), joined(v, kv, 1)))
    # Angles of all keys: one rotation of everything is what ONNX Runtime's fusion knows.
    q, k = _turned(q, *(each[:, :N] for each in angles)), _turned(k, *angles)
    mixed = mixed_values(q, k, v, prompts_seen(unseen, k.shape[2] - N))
    return attention.Wo(mixed.transpose(1, 2).flatten(2))


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys by their angles, in float32 as in the library. (B, heads, n, d), (1, n, d) → (B, heads, n, d)."""
    wide = x.float()
    return (wide * cos.unsqueeze(1) + rotate_half(wide) * sin.unsqueeze(1)).to(x.dtype)
