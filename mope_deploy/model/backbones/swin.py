"""timm's Swin Transformer (v1): every window attends to its own tokens and to its own sample's prompts.

A window [tokens ; prompts] runs through the block's attention with the prompts' relative-position bias and shift mask
at zero. The prompts' outputs are dropped behind the attention, so patch merging sees image tokens alone. In prefix form
a prompt's key and value, the same in every window of a sample, are computed once.

Letters: W windows of a sample · A tokens of a window · d width of a head · P prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from timm.models.swin_transformer import SwinTransformer, window_partition, window_reverse
from torch import Tensor, nn

from mope_deploy.model.backbones.prefix import Made, Projection, inside, joined, prompts_seen, split_heads
from mope_deploy.model.backbones.sources import LoadedEncoder
from mope_deploy.model.backbones.timm_attention import projection, queries_keys_values, separate
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
        self, index: int, x: Tensor, prompts: Tensor | None, mask: Tensor | None, kv: Made | None = None
    ) -> Tensor:
        """Block ``index`` in prefix form, and merging. (B, N, D), (B, P, D), keys and values → (B, N, D)."""
        block = self._block(index)
        if block.attn.qkv is None:
            x = inside(block, _gathered_block, block, x, prompts, kv)
        else:
            x = inside(
                block, _block, block, x, lambda windows, seen: _prefix_attention(block, windows, prompts, kv, seen)
            )
        return self._merged(index, x)

    def projection(self, index: int) -> Projection:
        """How block ``index`` makes keys and values of prompts."""
        return projection(self._block(index))

    def separate(self, index: int) -> None:
        """Three weights in place of a joint one in block ``index``, and windows by a Gather instead of by shifting."""
        separate(self._block(index).attn)

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


def _gathered_block(block: Any, x: Tensor, prompts: Tensor | None, kv: Made | None) -> Tensor:
    """A block in the form that is exported. (B, N, D), tokens (B, P, D), keys and values → (B, N, D)."""
    normed = None if prompts is None else block.norm1(prompts)
    x = x + inside(block.attn, _gathered_attention, block, block.norm1(x), normed, kv)
    return x + block.mlp(block.norm2(x))


def _gathered_attention(block: Any, x: Tensor, prompts: Tensor | None, kv: Made | None) -> Tensor:
    """Attention in windows that are put together row by row, each with the sample's prompts in it.

    One Gather of keys shifts the picture, cuts it into windows, splits heads and puts the prompts into every window:
    nothing is expanded and nothing concatenated per window, and a row of d numbers is copied once. Another one takes
    the results back to their places.

    x (B, N, D) and prompts (B, P, D) normed, P' keys and values → (B, N, D).
    """
    attention, heads = block.attn, block.attn.num_heads
    B, N, D = x.shape
    cut = _Windows(block.input_resolution, block.window_size, block.shift_size)
    padding = None if cut.whole else x.new_zeros(B, 1, D)  # zeros that are attended to, as in timm
    q, k, v = queries_keys_values(attention, x, _behind(padding, prompts))
    k, v = joined(k, kv, 0), joined(v, kv, 1)  # (B, rows, inner)
    W, A = cut.places.shape
    own = N if cut.whole else N + 1
    index = cut.with_prompts(k.shape[1] - own, first=own)
    q = _rows(q, cut.places % N, heads).view(B, W, heads, A, -1)
    k, v = (_rows(each, index, heads).view(B, W, heads, index.shape[1], -1) for each in (k, v))
    mask = block.get_attn_mask(x.new_zeros(B, *cut.padded, 1)) if block.dynamic_mask else block.attn_mask
    mixed = _attend(attention, q, k, v, mask, prompts=k.shape[3] - A)  # (B, W, heads, A, d)
    mixed = mixed.reshape(B, W * heads * A, -1)
    back = torch.from_numpy(cut.back(heads)).to(x.device)
    return attention.proj(mixed.index_select(1, back).view(B, N, -1))


def _behind(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    parts = [part for part in (first, second) if part is not None]
    return torch.cat(parts, dim=1) if parts else None


def _rows(x: Tensor, index: NDArray[np.int64], heads: int) -> Tensor:
    """The rows that ``index`` (W, n) names, head by head. (B, rows, heads · d) → (B, W · heads · n, d)."""
    B, rows, inner = x.shape
    each = index[:, None, :] * heads + np.arange(heads)[:, None]  # (W, heads, n)
    chosen = torch.from_numpy(each.reshape(-1)).to(x.device)
    return x.reshape(B, rows * heads, inner // heads).index_select(1, chosen)


class _Windows:
    """Which token stands where in the shifted windows of a picture.

    Args:
        resolution: height and width of the picture in tokens; N is their product.
        window, shift: of the block.

    Attributes:
        padded: height and width in whole windows.
        whole: whether that is the picture itself.
        places: (W, A), the token of each place; N for padding.
    """

    def __init__(self, resolution: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]) -> None:
        (H, W), (height, width) = resolution, window
        self.padded = (H + -H % height, W + -W % width)
        self.whole = self.padded == (H, W)
        picture = np.arange(H * W).reshape(H, W)
        picture = np.roll(picture, (-shift[0], -shift[1]), axis=(0, 1))
        picture = np.pad(picture, ((0, -H % height), (0, -W % width)), constant_values=H * W)
        rows, columns = self.padded[0] // height, self.padded[1] // width
        cut = picture.reshape(rows, height, columns, width).swapaxes(1, 2)
        self.places: NDArray[np.int64] = cut.reshape(rows * columns, height * width)
        self.tokens = H * W

    def with_prompts(self, prompts: int, *, first: int) -> NDArray[np.int64]:
        """``places`` with ``prompts`` more in every window, rows ``first`` and following. → (W, A + prompts)."""
        behind = np.arange(first, first + prompts)[None].repeat(len(self.places), axis=0)
        return np.concatenate([self.places, behind], axis=1)

    def back(self, heads: int) -> NDArray[np.int64]:
        """For each token and head the row of (W, heads, A) that holds its result, (N · heads,)."""
        W, A = self.places.shape
        place = np.empty(self.tokens + 1, np.int64)
        place[self.places.reshape(-1)] = np.arange(W * A)
        place = place[: self.tokens, None]  # (N, 1)
        return ((place // A * heads + np.arange(heads)) * A + place % A).reshape(-1)


def _token_attention(block: Any, windows: Tensor, prompts: Tensor, mask: Tensor | None) -> Tensor:
    """Every window [tokens ; prompts] through the attention. (B, W, A, D), (B, P, D) → (B, W, A, D)."""
    attention, A = block.attn, windows.shape[2]
    normed = block.norm1(prompts).unsqueeze(1).expand(-1, windows.shape[1], -1, -1)  # (B, W, P, D)
    rows = torch.cat([windows, normed], dim=2)  # (B, W, A + P, D)
    qkv = attention.qkv(rows).unflatten(-1, (3, attention.num_heads, -1))
    q, k, v = qkv.permute(3, 0, 1, 4, 2, 5)  # (B, W, heads, A + P, d) each
    mixed = _attend(attention, q, k, v, mask, prompts=prompts.shape[1])
    return attention.proj(mixed.transpose(2, 3).flatten(3))[:, :, :A]


def _prefix_attention(
    block: Any, windows: Tensor, prompts: Tensor | None, kv: Made | None, mask: Tensor | None
) -> Tensor:
    """(B, W, A, D), tokens (B, P, D), keys and values (B, P', inner) → (B, W, A, D)."""
    attention, heads = block.attn, block.attn.num_heads
    B, W = windows.shape[:2]
    q, k, v = attention.qkv(windows.flatten(0, 1)).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    parts = [] if prompts is None else [Made.of(projection(block)(prompts))]
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
