"""Swin's windows in a graph: one Gather in place of shifting, cutting, splitting heads and expanding prompts.

Letters: W windows of a picture · A tokens of a window · d width of a head · P prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mope_deploy.model.backbones.prefix import PrefixKV, joined
from mope_deploy.model.backbones.timm_attention import queries_keys_values

__all__ = ["gathered_attention"]


def gathered_attention(
    block: Any, x: Tensor, prompts: Tensor | None, kv: PrefixKV | None, *, attend: Callable[..., Tensor]
) -> Tensor:
    """Attention in windows that are put together row by row, each with the sample's prompts in it.

    One Gather of keys shifts the picture, cuts it into windows, splits heads and puts the prompts into every window:
    nothing is expanded and nothing concatenated per window, and a row of d numbers is copied once. Another one takes
    the results back to their places.

    Args:
        block: timm's, with a weight each for queries, keys and values.
        x, prompts: normed, (B, N, D) and (B, P, D).
        kv: keys and values of P' further prompts.
        attend: ``attend(attention, q, k, v, mask, prompts=P + P')`` within windows.

    Returns:
        (B, N, D).
    """
    attention, heads = block.attn, block.attn.num_heads
    B, N, D = x.shape
    cut = _Windows(block.input_resolution, block.window_size, block.shift_size)
    padding = [] if cut.whole else [x.new_zeros(B, 1, D)]  # zeros that are attended to, as in timm
    further = [*padding, *([] if prompts is None else [prompts])]
    q, k, v = queries_keys_values(attention, x, torch.cat(further, dim=1) if further else None)
    k, v = joined(k, kv, 0), joined(v, kv, 1)  # (B, rows, inner)
    W, A = cut.places.shape
    own = N if cut.whole else N + 1
    index = cut.with_prompts(k.shape[1] - own, first=own)
    q = _rows(q, cut.places % N, heads).view(B, W, heads, A, -1)
    k, v = (_rows(each, index, heads).view(B, W, heads, index.shape[1], -1) for each in (k, v))
    mask = block.get_attn_mask(x.new_zeros(B, *cut.padded, 1)) if block.dynamic_mask else block.attn_mask
    mixed = attend(attention, q, k, v, mask, prompts=k.shape[3] - A)  # (B, W, heads, A, d)
    mixed = mixed.reshape(B, W * heads * A, -1)
    back = torch.from_numpy(cut.back(heads)).to(x.device)
    return attention.proj(mixed.index_select(1, back).view(B, N, -1))


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
