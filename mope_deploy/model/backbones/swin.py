"""timm's Swin Transformer (v1): every window attends to its own tokens and to its own sample's prompts.

A window [tokens ; prompts] runs through the block's attention with the prompts' relative-position bias and shift mask
at zero. The prompts' outputs are dropped, so their queries and MLP are never computed, and patch merging sees image
tokens alone. A prompt's key and value are the same in every window of a sample and computed once.

Letters: W windows of a sample · A tokens of a window · d width of a head · P prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from timm.models.swin_transformer import SwinTransformer, window_partition, window_reverse
from torch import Tensor, nn

from mope_deploy.model.backbones.sources import LoadedEncoder
from mope_deploy.model.backbones.timm_image import TimmBackbone, frozen_image
from mope_deploy.model.config import EncoderSpec

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
        stage, number = self._places[index]
        block = self.encoder.layers[stage].blocks[number]
        B, _, D = x.shape
        H, W = block.input_resolution
        if prompts is None:
            x = block(x.view(B, H, W, D)).flatten(1, 2)
        else:
            x = x + _attention(block, block.norm1(x).view(B, H, W, D), block.norm1(prompts)).flatten(1, 2)
            x = x + block.mlp(block.norm2(x))
        if index + 1 < self.depth and self._places[index + 1][0] != stage:
            x = self.encoder.layers[stage + 1].downsample(x.view(B, H, W, D)).flatten(1, 2)
        return x

    def pool(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The mean of the image tokens. (B, N, D) → (B, D)."""
        return x.mean(dim=1)

    def finish(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """timm's own final norm and pooling, without a classifier. (B, N, D) → (B, feature_width)."""
        H, W = self.encoder.layers[-1].blocks[-1].input_resolution
        x = self.encoder.norm(x).unflatten(1, (H, W))
        return self.encoder.forward_head(x, pre_logits=True)


def _attention(block: Any, x: Tensor, prompts: Tensor) -> Tensor:
    """Windowed attention of normed x (B, H, W, D) over itself and normed prompts (B, P, D) → (B, H, W, D)."""
    H, W = x.shape[1:3]
    (height, width), (down, right) = block.window_size, block.shift_size
    if down or right:
        x = torch.roll(x, shifts=(-down, -right), dims=(1, 2))
    # As in timm, padding is made of zeros that are attended to: their keys and values are the bias.
    x = nn.functional.pad(x, (0, 0, 0, -W % width, 0, -H % height))
    padded = x.shape[1:3]
    mask = block.get_attn_mask(x) if block.dynamic_mask else block.attn_mask  # (W, A, A), or None without a shift
    x = _window_attention(block.attn, window_partition(x, block.window_size), prompts, mask)
    x = window_reverse(x.unflatten(1, (height, width)), block.window_size, *padded)[:, :H, :W]
    return torch.roll(x, shifts=(down, right), dims=(1, 2)) if down or right else x


def _window_attention(attention: Any, windows: Tensor, prompts: Tensor, mask: Tensor | None) -> Tensor:
    """Windows (B·W, height, width, D), a sample's ones next to each other, and prompts (B, P, D) → (B·W, A, D)."""
    B, P, D = prompts.shape
    A, heads = attention.window_area, attention.num_heads
    # One product for tokens and prompts, so that the weight is read once.
    rows = torch.cat([windows.reshape(B, -1, D), prompts], dim=1)  # (B, W·A + P, D)
    q, k, v = attention.qkv(rows).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, W·A + P, d) each
    q = (q[:, :, :-P] * attention.scale).unflatten(2, (-1, A)).transpose(1, 2)  # (B, W, heads, A, d)
    k, v = _with_prompts(k, P, A), _with_prompts(v, P, A)  # (B, W, heads, A + P, d)
    bias = attention._get_rel_pos_bias()  # (1, heads, A, A)
    if mask is not None:
        bias = bias + mask.unsqueeze(1)  # (W, heads, A, A)
    scores = q @ k.transpose(-2, -1) + nn.functional.pad(bias, (0, P))  # zero for prompts; (B, W, heads, A, A + P)
    x = torch.softmax(scores, dim=-1) @ v  # (B, W, heads, A, d)
    return attention.proj(x.transpose(2, 3).flatten(3).flatten(0, 1))


def _with_prompts(rows: Tensor, P: int, A: int) -> Tensor:
    """Each window's rows and, behind them, those of its own sample's prompts.

    (B, heads, W·A + P, d) → (B, W, heads, A + P, d).
    """
    windows = rows[:, :, :-P].unflatten(2, (-1, A)).transpose(1, 2)  # (B, W, heads, A, d)
    prompts = rows[:, None, :, -P:].expand(-1, windows.shape[1], -1, -1, -1)  # (B, W, heads, P, d)
    return torch.cat([windows, prompts], dim=3)
