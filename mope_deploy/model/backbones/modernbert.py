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
from mope_deploy.model.backbones.prefix import (
    Made,
    Projection,
    inside,
    joined,
    mixed_values,
    prompts_seen,
    split_heads,
    thirds,
)
from mope_deploy.model.backbones.sources import LoadedEncoder
from mope_deploy.model.backbones.text import (
    TextBackbone,
    blocked,
    frozen_text,
    longest_text,
    with_prompts,
)
from mope_deploy.model.config import EncoderSpec

__all__ = ["ModernBertBackbone", "accepts", "wrap"]

_WINDOWED = "sliding_attention"


def accepts(module: nn.Module) -> bool:
    """Whether ``module`` is an encoder of this family."""
    return getattr(getattr(module, "config", None), "model_type", None) == "modernbert"


def wrap(loaded: LoadedEncoder, spec: EncoderSpec) -> Any:
    """The frozen encoder with its tokenizer.

    Raises:
        ConfigError: if there is no tokenizer beside the encoder, ``max_length`` is more than its positions allow, or
            its angles change with the length of the text.
    """
    encoder: Any = loaded.module
    for kind, values in encoder.config.rope_parameters.items():
        if values["rope_type"] != "default":
            raise ConfigError(
                f"rotary positions of {spec.source}", received=f"{values['rope_type']!r} ({kind})", expected="'default'"
            )
    max_length = longest_text(spec, limit=encoder.config.max_position_embeddings)
    return frozen_text(ModernBertBackbone(encoder, max_length=max_length), loaded, spec, max_length=max_length)


class ModernBertBackbone(TextBackbone):
    """A transformers ModernBERT, layer by layer.

    Args:
        encoder: transformers' module.
        max_length: longest text in tokens; the tables of angles end there.
    """

    has_prefix_form = True

    def __init__(self, encoder: Any, *, max_length: int) -> None:
        config = encoder.config
        super().__init__(encoder, width=config.hidden_size, depth=len(encoder.layers), feature_width=config.hidden_size)
        positions = torch.arange(max_length).unsqueeze(0)
        for kind in set(config.layer_types):
            cos, sin = encoder.rotary_emb(encoder.embeddings.tok_embeddings.weight, positions, kind)
            self.register_buffer(f"{kind}_cos", cos[0], persistent=False)  # (max_length, head width)
            self.register_buffer(f"{kind}_sin", sin[0], persistent=False)

    def embed(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Normed token embeddings. input_ids, attention_mask (B, N) int64 → (B, N, D), (B, N) int64."""
        return self.encoder.embeddings(input_ids=inputs["input_ids"]), inputs["attention_mask"]

    def layer(self, index: int, x: Tensor, prompts: Tensor | None, mask: Tensor | None) -> Tensor:
        """Layer ``index`` on [x ; prompts], without the prompts' outputs. (B, N, D), (B, P, D) → (B, N, D)."""
        assert mask is not None
        layer = self.encoder.layers[index]
        everything, mask = with_prompts(x, prompts, mask)  # (B, N + P, D)
        angles = self._angles(layer.attention_type, text=x.shape[1], prompts=everything.shape[1] - x.shape[1])
        unseen = blocked(mask, x.dtype)  # (B, 1, 1, N + P)
        if layer.attention_type == _WINDOWED:
            unseen = self._beyond_window(unseen, text=x.shape[1])  # (B, 1, N + P, N + P)
        return layer(everything, attention_mask=unseen, position_embeddings=angles)[:, : x.shape[1]]

    def prefix_layer(
        self, index: int, x: Tensor, prompts: Tensor | None, mask: Tensor | None, kv: Made | None = None
    ) -> Tensor:
        """Layer ``index`` in prefix form. (B, N, D), (B, P, D), keys and values → (B, N, D)."""
        assert mask is not None
        layer = self.encoder.layers[index]
        P = (0 if prompts is None else prompts.shape[1]) + (0 if kv is None else kv.total)
        angles = self._angles(layer.attention_type, text=x.shape[1], prompts=P)
        unseen = blocked(mask, x.dtype)  # (B, 1, 1, N)
        if layer.attention_type == _WINDOWED:
            unseen = self._beyond_window(unseen, text=x.shape[1])  # (B, 1, N, N)
        return inside(layer, _prefix_layer, layer, x, prompts, kv, unseen, angles)

    def projection(self, index: int) -> Projection:
        """How layer ``index`` makes keys and values of prompts; the first layer has no norm of its own."""
        layer = self.encoder.layers[index]
        weight, bias = layer.attn.Wqkv.weight, layer.attn.Wqkv.bias
        inner = len(weight) // 3
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        norm = None if isinstance(layer.attn_norm, nn.Identity) else layer.attn_norm
        return Projection(norm, weight[inner:], bias[inner:], product=len(weight))

    def finish(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The class token after the final norm. (B, N, D) → (B, D)."""
        return self.encoder.final_norm(x[:, 0])

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
        cos = torch.cat(
            [nn.functional.embedding(positions, cos_table), cos_table.new_ones(prompts, cos_table.shape[1])]
        )
        sin = torch.cat(
            [nn.functional.embedding(positions, sin_table), sin_table.new_zeros(prompts, sin_table.shape[1])]
        )
        return cos.unsqueeze(0), sin.unsqueeze(0)


def _prefix_layer(
    layer: Any, x: Tensor, prompts: Tensor | None, kv: Made | None, unseen: Tensor, angles: tuple[Tensor, Tensor]
) -> Tensor:
    rows = layer.attn_norm(x if prompts is None else torch.cat([x, prompts], dim=1))
    x = x + inside(layer.attn, _prefix_attention, layer.attn, rows, kv, unseen, angles)
    return x + layer.mlp(layer.mlp_norm(x))


def _prefix_attention(
    attention: Any, rows: Tensor, kv: Made | None, unseen: Tensor, angles: tuple[Tensor, Tensor]
) -> Tensor:
    """rows (B, N + P, D) normed, text first → (B, N, D)."""
    N = unseen.shape[-1]
    heads = attention.config.num_attention_heads
    q, k, v = thirds(attention.Wqkv(rows), N)
    q, k, v = (split_heads(each, heads) for each in (q, joined(k, kv, 0), joined(v, kv, 1)))
    # Angles of all keys: one rotation of everything is what ONNX Runtime's fusion knows.
    q, k = _turned(q, *(each[:, :N] for each in angles)), _turned(k, *angles)
    unseen = prompts_seen(unseen, k.shape[2] - N)
    mixed = mixed_values(q, k, v, unseen)
    return attention.Wo(mixed.transpose(1, 2).flatten(2))


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys by their angles, in float32 as in the library. (B, heads, n, d), (1, n, d) → (B, heads, n, d)."""
    wide = x.float()
    return (wide * cos.unsqueeze(1) + rotate_half(wide) * sin.unsqueeze(1)).to(x.dtype)
