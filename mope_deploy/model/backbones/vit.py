"""timm's VisionTransformer (ViT, DeiT, DINOv2, CLIP's, SigLIP's): learned positions, prompts behind the patches.

Prompts are appended after the position embeddings were added, so they have no position, and behind the image tokens, so
class, distillation and register tokens keep their place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

from mope_deploy.model.backbones.prefix import Made, Projection, inside
from mope_deploy.model.backbones.sources import LoadedEncoder
from mope_deploy.model.backbones.timm_attention import prefix_attention, projection, separate
from mope_deploy.model.backbones.timm_image import TimmBackbone, frozen_image
from mope_deploy.model.config import EncoderSpec

__all__ = ["ViTBackbone", "accepts", "wrap"]


def accepts(module: nn.Module) -> bool:
    """Whether ``module`` is an encoder of this family: one that runs its blocks just as VisionTransformer does."""
    return (
        isinstance(module, VisionTransformer)
        and type(module).forward_features is VisionTransformer.forward_features
        and module.global_pool != "prr"  # pools in a way of its own, to another width
    )


def wrap(loaded: LoadedEncoder, spec: EncoderSpec) -> Any:
    """The frozen encoder with its preprocessing.

    Raises:
        ConfigError: for an encoder without a pooled feature (``global_pool=''``).
    """
    return frozen_image(ViTBackbone(loaded), spec)


class ViTBackbone(TimmBackbone):
    """A timm VisionTransformer, layer by layer."""

    def __init__(self, loaded: LoadedEncoder) -> None:
        encoder: Any = loaded.module
        super().__init__(
            loaded, width=encoder.embed_dim, depth=len(encoder.blocks), feature_width=encoder.head_hidden_size
        )
        # Some blocks run attention and MLP side by side or normalise their results: those keep the token form.
        self.has_prefix_form = all(type(b) is Block and type(b.attn) is Attention for b in encoder.blocks)

    def embed(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Prefix tokens and patches with positions. pixel_values (B, 3, H, W) → (B, N, D); all tokens are real."""
        x = self.encoder.patch_embed(inputs["pixel_values"])
        x = self.encoder._pos_embed(x)
        x = self.encoder.patch_drop(x)
        return self.encoder.norm_pre(x), None

    def layer(self, index: int, x: Tensor, prompts: Tensor | None, mask: Tensor | None) -> Tensor:
        """Block ``index`` on [x ; prompts], without the prompts' outputs. (B, N, D), (B, P, D) → (B, N, D)."""
        block = self.encoder.blocks[index]
        if prompts is None:
            return block(x)
        N = x.shape[1]
        return block(torch.cat([x, prompts], dim=1))[:, :N]

    def prefix_layer(
        self, index: int, x: Tensor, prompts: Tensor | None, mask: Tensor | None, kv: Made | None = None
    ) -> Tensor:
        """Block ``index`` in prefix form. (B, N, D), (B, P, D), keys and values → (B, N, D)."""
        block = self.encoder.blocks[index]
        return inside(block, _prefix_block, block, x, prompts, kv)

    def projection(self, index: int) -> Projection:
        """How block ``index`` makes keys and values of prompts."""
        return projection(self.encoder.blocks[index])

    def separate(self, index: int) -> None:
        """Three weights in place of a joint one in block ``index``."""
        separate(self.encoder.blocks[index].attn)

    def pool(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The class token, or the mean of the patches where there is none. (B, N, D) → (B, D)."""
        if self.encoder.has_class_token:
            return x[:, 0]
        return x[:, self.encoder.num_prefix_tokens :].mean(dim=1)

    def finish(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """timm's own final norm and pooling, without a classifier. (B, N, D) → (B, feature_width)."""
        return self.encoder.forward_head(self.encoder.norm(x), pre_logits=True)


def _prefix_block(block: Any, x: Tensor, prompts: Tensor | None, kv: Made | None) -> Tensor:
    normed = None if prompts is None else block.norm1(prompts)
    mixed = inside(block.attn, prefix_attention, block.attn, block.norm1(x), normed, kv)
    x = x + block.ls1(mixed)
    return x + block.ls2(block.mlp(block.norm2(x)))
