"""timm's Swin Transformer (v1): every window attends to its own tokens and to its own sample's prompts.

A window [tokens ; prompts] runs through the block's attention with the prompts' relative-position bias and shift mask
at zero. The prompts' outputs are dropped behind the attention, so patch merging sees image tokens alone. In prefix form
a prompt's key and value, the same in every window of a sample, are computed once.

Letters: W windows of a sample · A tokens of a window · d width of a head · P prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from timm.models.swin_transformer import SwinTransformer, window_partition, window_reverse
from torch import Tensor, nn

from mope_deploy.model.backbones.prefix import Projection, inside, prompts_seen, split_heads
from mope_deploy.model.backbones.sources import LoadedEncoder
from mope_deploy.model.backbones.timm_attention import projection
from mope_deploy.model.backbones.timm_image import TimmBackbone, frozen_image
from mope_deploy.model.config import EncoderSpec

_Attend = Callable[[Tensor, Tensor | None], Tensor]

__all__ = ["SwinBackbone", "accepts", "wrap"]


def accepts(module: nn.Module) -> bool:
    """Whether ``module`` is an encoder of this family."""
    return isinstance(module, SwinTransformer)


def wrap(loaded: LoadedEncoder, spec: EncoderSpec) -> Any:
    """The frozen encoder with its preprocessing.

    Raises:
        ConfigError: for an encoder without a pooled feature (``global_pool=''``).
    """
    return frozen_image(SwinBackbone(loaded), spec)


class SwinBackbone(TimmBackbone):
    """A timm SwinTransformer, block by block; a stage's patch merging follows the last block of the stage before."""

    has_prefix_form = True

    def __init__(self, loaded: LoadedEncoder) -> None:
        encoder: Any = loaded.module
        # Where in the encoder each layer is; the modules themselves would be registered twice.
        self._places = [(s, b) for s, stage in enumerate(encoder.layers) for b in range(len(stage.blocks))]
        self._widths = tuple(encoder.layers[s].blocks[b].dim for s, b in self._places)
        super().__init__(loaded, width=self._widths[0], depth=len(self._places), feature_width=encoder.head_hidden_size)

    @property
    def widths(self) -> tuple[int, ...]:
        """D of every block; it doubles from stage to stage."""
        return self._widths

    def embed(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Patches, which have no position. pixel_values (B, 3, H, W) → (B, N, D); all tokens are real."""
        return self.encoder.patch_embed(inputs["pixel_values"]).flatten(1, 2), None

    def layer(self, index: int, x: Tensor, prompts: Tensor | None, mask: Tensor | None) -> Tensor:
        """Block ``index`` on windows [x ; prompts], and merging where its stage ends.

        (B, N, D), (B, P, D) → (B, N, D).
        """
        block = self._block(index)
        if prompts is None:
            B, _, D = x.shape
            x = block(x.view(B, *block.input_resolution, D)).flatten(1, 2)
        else:
            x = inside(block, _block, block, x, lambda windows, seen: _token_attention(block, windows, prompts, seen))
        return self._merged(index, x)

    def prefix_layer(
        self, index: int, x: Tensor, prompts: Tensor | None, mask: Tensor | None, kv: Tensor | None = None
    ) -> Tensor:
        """Block ``index`` in prefix form, and merging. (B, N, D), (B, P, D), (B, 2, P', inner) → (B, N, D)."""
        block = self._block(index)
        x = inside(block, _block, block, x, lambda windows, seen: _prefix_attention(block, windows, prompts, kv, seen))
        return self._merged(index, x)

    def projection(self, index: int) -> Projection:
        """How block ``index`` makes keys and values of prompts."""
        return projection(self._block(index))

    def pool(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The mean of the image tokens. (B, N, D) → (B, D)."""
        return x.mean(dim=1)

    def finish(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """timm's own final norm and pooling, without a classifier. (B, N, D) → (B, feature_width)."""
        H, W = self.encoder.layers[-1].blocks[-1].input_resolution
        x = self.encoder.norm(x).unflatten(1, (H, W))
        return self.encoder.forward_head(x, pre_logits=True)

    def _block(self, index: int) -> Any:
        stage, number = self._places[index]
        return self.encoder.layers[stage].blocks[number]

    def _merged(self, index: int, x: Tensor) -> Tensor:
        """x as the next block reads it: with patches merged where a stage ends. (B, N, D) → (B, N, D)."""
        stage = self._places[index][0]
        if index + 1 == self.depth or self._places[index + 1][0] == stage:
            return x
        x = x.unflatten(1, self._block(index).input_resolution)
        return self.encoder.layers[stage + 1].downsample(x).flatten(1, 2)


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
    x = inside(block.attn, attend, windows, mask).flatten(0, 1)  # (B·W, A, D)
    x = window_reverse(x.unflatten(1, (height, width)), block.window_size, *padded)[:, :H, :W]
    return torch.roll(x, shifts=(down, right), dims=(1, 2)) if down or right else x


def _token_attention(block: Any, windows: Tensor, prompts: Tensor, mask: Tensor | None) -> Tensor:
    """Every window [tokens ; prompts] through the attention. (B, W, A, D), (B, P, D) → (B, W, A, D)."""
    attention, A = block.attn, windows.shape[2]
    normed = block.norm1(prompts).unsqueeze(1).expand(-1, windows.shape[1], -1, -1)  # (B, W, P, D)
    rows = torch.cat([windows, normed], dim=2)  # (B, W, A + P, D)
    qkv = attention.qkv(rows).unflatten(-1, (3, attention.num_heads, -1))
    q, k, v = qkv.permute(3, 0, 1, 4, 2, 5)  # (B, W, heads, A + P, d) each
    return _mix(attention, q, k, v, mask)[:, :, :A]


def _prefix_attention(
    block: Any, windows: Tensor, prompts: Tensor | None, kv: Tensor | None, mask: Tensor | None
) -> Tensor:
    """(B, W, A, D), tokens (B, P, D), keys and values (B, 2, P', inner) → (B, W, A, D)."""
    attention = block.attn
    W, A = windows.shape[1:3]
    rows = windows.flatten(1, 2)  # (B, W·A, D)
    if prompts is not None:  # one product for tokens and prompts, so that the weight is read once
        rows = torch.cat([rows, block.norm1(prompts)], dim=1)
    q, k, v = attention.qkv(rows).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    q, own_k, own_v = (each[:, :, : W * A].unflatten(2, (W, A)).transpose(1, 2) for each in (q, k, v))
    keys, values = k[:, :, W * A :], v[:, :, W * A :]  # of the prompts, (B, heads, P, d)
    if kv is not None:
        made = [split_heads(kv[:, i], attention.num_heads) for i in (0, 1)]
        keys, values = torch.cat([keys, made[0]], dim=2), torch.cat([values, made[1]], dim=2)
    return _mix(attention, q, _in_each(own_k, keys), _in_each(own_v, values), mask)


def _mix(attention: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention within windows, and the output projection.

    q (B, W, heads, A or A + P, d), k and v (B, W, heads, A + P, d) → (B, W, A or A + P, D).
    """
    bias = attention._get_rel_pos_bias()  # (1, heads, A, A)
    if mask is not None:
        bias = bias + mask.unsqueeze(1)  # (W, heads, A, A)
    A = bias.shape[-1]
    bias = prompts_seen(bias, k.shape[3] - A)  # (…, A, A + P)
    if q.shape[3] > A:  # token form: prompts ask as well
        bias = nn.functional.pad(bias, (0, 0, 0, q.shape[3] - A))
    x = torch.softmax((q * attention.scale) @ k.transpose(-2, -1) + bias, dim=-1) @ v  # (B, W, heads, …, d)
    return attention.proj(x.transpose(2, 3).flatten(3))


def _in_each(own: Tensor, prompts: Tensor) -> Tensor:
    """Each window's own keys or values and, behind them, those of the sample's prompts.

    (B, W, heads, A, d), (B, heads, P, d) → (B, W, heads, A + P, d).
    """
    return torch.cat([own, prompts.unsqueeze(1).expand(-1, own.shape[1], -1, -1, -1)], dim=3)
