"""Prefix form: prompts enter a layer as keys and values alone.

A prompt's own output is thrown away, so it matters only through the key and the value that the layer's tokens attend
to: queries, output projection and MLP run on the tokens alone. Equal to the token form, in which the prompts run
through the whole layer, up to rounding.

A key or value is ``weight · norm(prompt) + bias`` with frozen weights, so that of a prompt which is known beforehand
can be computed beforehand (``export/graph/folding.py``). What an encoder does to keys afterwards (a norm of each head,
rotary angles, which prompts do not have) the layer does to those as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mope_deploy.model.backbones.exported.attention import attention_written_out, sliced_qkv
from mope_deploy.model.backbones.masks import prompts_seen

__all__ = ["PrefixKV", "Projection", "attention", "joined", "mixed_values", "split_heads", "split_qkv"]


class PrefixKV(NamedTuple):
    """Keys and values of prompts that were made before the layer runs, in parts that stand behind one another.

    Attributes:
        keys, values: each part (B, P, inner).
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @classmethod
    def of(cls, kv: Tensor) -> PrefixKV:
        """From what :class:`Projection` returns, (B, 2, P, inner)."""
        return cls((kv[:, 0],), (kv[:, 1],))

    @property
    def total(self) -> int:
        """P' of all parts together."""
        return sum(part.shape[1] for part in self.keys)


@dataclass(frozen=True)
class Projection:
    """How one layer makes the keys and values of a prompt: ``weight · norm(prompt) + bias``.

    Attributes:
        norm: what a pre-norm layer applies to its tokens first; None where keys and values are linear in the prompt.
        weight: (2 · inner, D), keys first; inner is the width of all heads together.
        bias: (2 · inner,).
        product: rows of the product that a prompt's token goes through where it is appended to x: 3 · inner where one
            weight makes queries too.
    """

    norm: nn.Module | None
    weight: Tensor
    bias: Tensor
    product: int

    @classmethod
    def of(cls, norm: nn.Module | None, key: nn.Linear, value: nn.Linear) -> Projection:
        """Of a layer with weights of their own for keys and values; a bias that one of them lacks is 0."""
        weight = torch.cat((key.weight, value.weight))
        biases = (each.weight.new_zeros(len(each.weight)) if each.bias is None else each.bias for each in (key, value))
        return cls(norm, weight, torch.cat(tuple(biases)), product=len(weight))

    def __call__(self, prompts: Tensor) -> Tensor:
        """Keys and values (…, 2, P, inner) of prompts (…, P, D)."""
        normed = prompts if self.norm is None else self.norm(prompts)
        kv = nn.functional.linear(normed, self.weight, self.bias)
        return kv.unflatten(-1, (2, -1)).transpose(-3, -2)


def joined(own: Tensor, made: PrefixKV | None, which: int) -> Tensor:
    """A layer's own keys (``which`` 0) or values (1), and behind them those of prompts made before.

    (B, N, inner), (B, P', inner) → (B, N + P', inner).
    """
    return own if made is None else torch.cat([own, *made[which]], dim=1)


def split_qkv(qkv: Tensor, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, N, inner) of the first N tokens, k and v (B, N + P, inner) of all, from their joint product.

    By a split, whose gradient is one concatenation: that of three slices is the sum of three tensors as large as the
    product.
    """
    if torch.compiler.is_exporting():
        return sliced_qkv(qkv, tokens)
    q, k, v = qkv.split(qkv.shape[-1] // 3, dim=-1)
    return q[:, :tokens], k, v


def attention(
    query: nn.Module,
    key: nn.Module,
    value: nn.Module,
    heads: int,
    x: Tensor,
    prompts: Tensor | None,
    kv: PrefixKV | None,
    unseen: Tensor | None,
) -> Tensor:
    """Attention of tokens to themselves and to prompts, with a linear layer each for queries, keys and values.

    Args:
        query, key, value: the encoder's linear layers.
        heads: number of heads.
        x: what these layers read of the tokens (B, N, D): normed in a pre-norm layer.
        prompts: (B, P, D), normed likewise, or None.
        kv: keys and values (B, P', inner) or None.
        unseen: additive mask of the tokens' keys (B, 1 or heads, 1 or N, N), or None. Prompts are never masked.

    Returns:
        (B, N, inner), not yet through the output projection.
    """
    rows = x if prompts is None else torch.cat([x, prompts], dim=1)
    q = split_heads(query(x), heads)
    k, v = (split_heads(joined(each(rows), kv, i), heads) for i, each in enumerate((key, value)))
    if unseen is not None:
        unseen = prompts_seen(unseen, k.shape[2] - x.shape[1])
    return mixed_values(q, k, v, unseen).transpose(1, 2).flatten(2)


def mixed_values(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / √d + bias) v. q (B, heads, N, d), k and v (B, heads, N + P, d) → (B, heads, N, d)."""
    if torch.compiler.is_exporting():
        return attention_written_out(q, k, v, bias)
    return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, heads · d) → (B, heads, N, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
