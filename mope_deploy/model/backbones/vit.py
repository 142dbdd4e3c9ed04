"""timm's VisionTransformer (ViT, DeiT, DINOv2, CLIP's, SigLIP's): learned positions, prompts behind the patches.

Prompts are appended after the position embeddings were added, so they have no position, and behind the image tokens, so
class, distillation and register tokens keep their place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor

from mope_deploy.model.backbones.prefix import PrefixKV
from mope_deploy.model.backbones.timm_attention import prefix_attention
from mope_deploy.model.backbones.timm_image import LayeredTimm

__all__ = ["ViTEncoder"]


class ViTEncoder(LayeredTimm):
    """A timm VisionTransformer, block by block."""

    family = "timm VisionTransformer"

    def __init__(self, encoder: Any) -> None:
        super().__init__(encoder)
        # Some blocks run attention and MLP side by side or normalise their results: those keep the token form.
        self.has_prefix_form = all(type(b) is Block and type(b.attn) is Attention for b in encoder.blocks)

    @classmethod
    def accepts(cls, module: Any) -> bool:
        """One that runs its blocks just as VisionTransformer does."""
        return (
            isinstance(module, VisionTransformer)
            and type(module).forward_features is VisionTransformer.forward_features
            and module.global_pool != "prr"  # pools in a way of its own, to another width
        )

    def embed(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Prefix tokens and patches with positions. pixel_values (B, 3, H, W) → (B, N, D); all tokens are real."""
        x = self.encoder.patch_embed(inputs["pixel_values"])
        x = self.encoder._pos_embed(x)
        x = self.encoder.patch_drop(x)
        return self.encoder.norm_pre(x), None

    def attend(self, block: Any, x: Tensor, prompts: Tensor | None, kv: PrefixKV | None, shared: None) -> Tensor:
        return prefix_attention(block.attn, x, prompts, kv)
