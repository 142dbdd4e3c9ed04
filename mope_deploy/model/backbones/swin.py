"""timm's Swin Transformer (v1): every window attends to its own tokens and to its own sample's prompts.

A window [tokens ; prompts] runs through the block's attention with the prompts' relative-position bias and shift mask
at zero. The prompts' outputs are dropped behind the attention, so patch merging sees image tokens alone. In prefix form
a prompt's key and value, the same in every window of a sample, are computed once.

Letters: W windows of a sample · A tokens of a window · d width of a head · P prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.models.swin_transformer import SwinTransformer, window_partition, window_reverse
from torch import Tensor, nn

from mope_deploy.model.backbones.exported.tracing import traced_as
from mope_deploy.model.backbones.exported.windows import gathered_attention
from mope_deploy.model.backbones.masks import prompts_seen
from mope_deploy.model.backbones.prefix import PrefixKV, split_heads
from mope_deploy.model.backbones.timm_attention import projection
from mope_deploy.model.backbones.timm_image import LayeredTimm

__all__ = ["SwinEncoder"]

_Attend = Callable[[Tensor, Tensor | None], Tensor]


class SwinEncoder(LayeredTimm):
    """A timm SwinTransformer, block by block; a stage's patch merging follows the last block of the stage before."""

    family = "timm SwinTransformer"

    def __init__(self, encoder: Any) -> None:
        super().__init__(encoder)
        self.width = self.widths[0]

    @classmethod
    def accepts(cls, module: Any) -> bool:
        return isinstance(module, SwinTransformer)

    @property
    def layers(self) -> Sequence[Any]:
        return [block for stage in self.encoder.layers for block in stage.blocks]

    @property
    def widths(self) -> tuple[int, ...]:
        """D of every block; it doubles from stage to stage."""
        return tuple(block.dim for block in self.layers)

    def embed(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Patches, which have no position. pixel_values (B, 3, H, W) → (B, N, D); all tokens are real."""
        return self.encoder.patch_embed(inputs["pixel_values"]).flatten(1, 2), None

    def layer(self, index: int, x: Tensor, prompts: Tensor | None, shared: Tensor | None) -> Tensor:
        """Block ``index`` on windows [x ; prompts], and merging where its stage ends.

        (B, N, D), (B, P, D) → (B, N, D).
        """
        block = self.layers[index]
        if prompts is None:
            B, _, D = x.shape
            x = block(x.view(B, *block.input_resolution, D)).flatten(1, 2)
        else:
            x = traced_as(block, _block, block, x, partial(_token_attention, block, prompts))
        return self._merged(index, x)

    def prefix_layer(
        self, index: int, x: Tensor, prompts: Tensor | None, shared: Tensor | None, kv: PrefixKV | None = None
    ) -> Tensor:
        """Block ``index`` in prefix form, and merging. (B, N, D), (B, P, D), keys and values → (B, N, D)."""
        return self._merged(index, super().prefix_layer(index, x, prompts, shared, kv))

    def prefix_form(self, layer: Any, x: Tensor, prompts: Tensor | None, kv: PrefixKV | None, shared: Any) -> Tensor:
        """A block by shifted windows, or, where :meth:`separate` made it ready for a graph, by a Gather."""
        if layer.attn.qkv is not None:
            return _block(layer, x, partial(_prefix_attention, layer, prompts, kv))
        return super().prefix_form(layer, x, prompts, kv, shared)

    def attend(self, block: Any, x: Tensor, prompts: Tensor | None, kv: PrefixKV | None, shared: Any) -> Tensor:
        return gathered_attention(block, x, prompts, kv, attend=_attend)

    def pool(self, x: Tensor, shared: Tensor | None) -> Tensor:
        """The mean of the image tokens. (B, N, D) → (B, D)."""
        return x.mean(dim=1)

    def finish(self, x: Tensor, shared: Tensor | None) -> Tensor:
        """timm's own final norm and pooling, without a classifier. (B, N, D) → (B, feature_width)."""
        return super().finish(x.unflatten(1, self.layers[-1].input_resolution), shared)

    def _merged(self, index: int, x: Tensor) -> Tensor:
        """x as the next block reads it: with patches merged where a stage ends. (B, N, D) → (B, N, D)."""
        stages = [number for number, stage in enumerate(self.encoder.layers) for _ in stage.blocks]
        if index + 1 == self.depth or stages[index + 1] == stages[index]:
            return x
        x = x.unflatten(1, self.layers[index].input_resolution)
        return self.encoder.layers[stages[index + 1]].downsample(x).flatten(1, 2)


def _block(block: Any, x: Tensor, attend: _Attend) -> Tensor:
    """A block with another attention within its windows. (B, N, D) → (B, N, D)."""
    picture = block.norm1(x).unflatten(1, block.input_resolution)  # (B, H, W, D)
    x = x + _windowed(block, picture, attend).flatten(1, 2)
    return x + block.mlp(block.norm2(x))


def _windowed(block: Any, x: Tensor, attend: _Attend) -> Tensor:
    """``attend`` on the shifted windows of normed x. (B, H, W, D) → (B, H, W, D)."""
    H, W = x.shape[1:3]
    (height, width), (down, right) = block.window_size, block.shift_size
    if down or right:
        x = torch.roll(x, shifts=(-down, -right), dims=(1, 2))
    # As in timm, padding is made of zeros that are attended to: their keys and values are the bias.
    x = nn.functional.pad(x, (0, 0, 0, -W % width, 0, -H % height))
    padded = x.shape[1:3]
    mask = block.get_attn_mask(x) if block.dynamic_mask else block.attn_mask  # (W, A, A), or None without a shift
    windows = window_partition(x, block.window_size).unflatten(0, (x.shape[0], -1)).flatten(2, 3)  # (B, W, A, D)
    x = traced_as(block.attn, attend, windows, mask).flatten(0, 1)  # (B·W, A, D)
    x = window_reverse(x.unflatten(1, (height, width)), block.window_size, *padded)[:, :H, :W]
    return torch.roll(x, shifts=(down, right), dims=(1, 2)) if down or right else x


def _token_attention(block: Any, prompts: Tensor, windows: Tensor, mask: Tensor | None) -> Tensor:
    """Every window [tokens ; prompts] through the attention. (B, W, A, D), (B, P, D) → (B, W, A, D)."""
    attention, A = block.attn, windows.shape[2]
    normed = block.norm1(prompts).unsqueeze(1).expand(-1, windows.shape[1], -1, -1)  # (B, W, P, D)
    rows = torch.cat([windows, normed], dim=2)  # (B, W, A + P, D)
    qkv = attention.qkv(rows).unflatten(-1, (3, attention.num_heads, -1))
    q, k, v = qkv.permute(3, 0, 1, 4, 2, 5)  # (B, W, heads, A + P, d) each
    mixed = _attend(attention, q, k, v, mask, prompts=prompts.shape[1])
    return attention.proj(mixed.transpose(2, 3).flatten(3))[:, :, :A]


def _prefix_attention(
    block: Any, prompts: Tensor | None, kv: PrefixKV | None, windows: Tensor, mask: Tensor | None
) -> Tensor:
    """(B, W, A, D), tokens (B, P, D), keys and values (B, P', inner) → (B, W, A, D)."""
    attention, heads = block.attn, block.attn.num_heads
    B, W = windows.shape[:2]
    q, k, v = attention.qkv(windows.flatten(0, 1)).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    parts = [] if prompts is None else [PrefixKV.of(projection(block)(prompts))]
    parts += [] if kv is None else [kv]
    made = ([split_heads(part, heads) for one in parts for part in one[which]] for which in (0, 1))
    keys, values = (torch.cat(each, dim=2) for each in made)  # of the prompts, (B, heads, P + P', d)
    bias = _bias(attention, mask, prompts=keys.shape[2])  # (1 or W, heads, A, A + P + P')
    if mask is not None:
        bias = bias.expand(B, W, *bias.shape[1:]).flatten(0, 1)
    k, v = (torch.cat([own, _in_each(more, W)], dim=2) for own, more in ((k, keys), (v, values)))
    q = q * attention.scale  # a tensor of its own: what is kept for the gradient must not hold the whole product
    mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
    return attention.proj(mixed.transpose(1, 2).flatten(2)).unflatten(0, (B, W))


def _attend(attention: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, prompts: int) -> Tensor:
    """Attention within windows, the last ``prompts`` keys of each being those of prompts.

    q (B, W, heads, A or A + P, d), k and v (B, W, heads, A + P, d) → (B, W, heads, A or A + P, d).
    """
    A = k.shape[3] - prompts
    bias = _bias(attention, mask, prompts=prompts)  # (1 or W, heads, A, A + P)
    if q.shape[3] > A:  # token form: prompts ask as well
        bias = nn.functional.pad(bias, (0, 0, 0, q.shape[3] - A))
    return torch.softmax((q * attention.scale) @ k.transpose(-2, -1) + bias, dim=-1) @ v


def _bias(attention: Any, mask: Tensor | None, *, prompts: int) -> Tensor:
    """What is added to scores: the relative position's bias and the shift's mask (W, A, A); 0 for prompts.

    → (1 or W, heads, A, A + P).
    """
    bias = attention._get_rel_pos_bias()  # (1, heads, A, A)
    if mask is not None:
        bias = bias + mask.unsqueeze(1)
    return prompts_seen(bias, prompts)


def _in_each(prompts: Tensor, W: int) -> Tensor:
    """Keys or values of a sample's prompts for each of its windows. (B, heads, P, d) → (B·W, heads, P, d)."""
    return prompts.unsqueeze(1).expand(-1, W, -1, -1, -1).flatten(0, 1)
