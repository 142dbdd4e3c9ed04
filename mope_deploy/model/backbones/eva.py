"""timm's Eva (EVA, EVA02, DINOv3, RoPE-ViT): rotary positions, which prompts neither have nor disturb.

timm rotates the queries and keys of everything behind the prefix tokens by one angle per patch. Prompts stand behind
the patches, so they get an angle as well: that of position nothing, sine 0 and cosine 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from timm.models.eva import Eva, EvaBlock
from torch import Tensor

from mope_deploy.model.backbones.prefix import PrefixKV
from mope_deploy.model.backbones.timm_attention import prefix_attention
from mope_deploy.model.backbones.timm_image import LayeredTimm

__all__ = ["EvaEncoder"]


class EvaEncoder(LayeredTimm):
    """A timm Eva, block by block."""

    family = "timm Eva"

    def __init__(self, encoder: Any) -> None:
        super().__init__(encoder)
        # Not the blocks that normalise their results, nor those whose heads share keys.
        self.has_prefix_form = all(
            type(b) is EvaBlock and getattr(b.attn, "num_kv_groups", 1) == 1 for b in encoder.blocks
        )

    @classmethod
    def accepts(cls, module: Any) -> bool:
        return isinstance(module, Eva)

    def embed(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Prefix tokens and patches, and the patches' angles.

        pixel_values (B, 3, H, W) → (B, N, D) and [sin, cos] (patches, 2 d), with an axis of layers and one of heads
        before them where each layer has its own frequencies; None without rotary positions.
        """
        x, angles = self.encoder._pos_embed(self.encoder.patch_embed(inputs["pixel_values"]))
        return self.encoder.norm_pre(x), angles

    def token_layer(self, index: int, rows: Tensor, shared: Tensor | None, P: int) -> Tensor:
        """timm's own block with an angle for every prompt, which turns nothing."""
        angles = self._angles(index, shared)
        if angles is not None and P:
            angles = torch.cat([angles, _no_angle(P, like=angles)], dim=-2)
        return self.layers[index](rows, rope=angles)

    def shared_by(self, index: int, x: Tensor, shared: Tensor | None, P: int) -> Tensor | None:
        return self._angles(index, shared)

    def attend(
        self, block: Any, x: Tensor, prompts: Tensor | None, kv: PrefixKV | None, shared: Tensor | None
    ) -> Tensor:
        return prefix_attention(block.attn, x, prompts, kv, shared)

    def _angles(self, index: int, shared: Tensor | None) -> Tensor | None:
        """The angles of block ``index``; each has its own where frequencies are mixed."""
        return shared[index] if shared is not None and self.encoder.rope_mixed else shared


def _no_angle(tokens: int, *, like: Tensor) -> Tensor:
    """[sin 0, cos 0] for some tokens, of the shape that ``like`` (…, patches, 2 d) has but for their number."""
    shape = (*like.shape[:-2], tokens, like.shape[-1] // 2)
    return torch.cat([like.new_zeros(shape), like.new_ones(shape)], dim=-1)
