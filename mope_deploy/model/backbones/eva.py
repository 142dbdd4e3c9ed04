"""timm's Eva (EVA, EVA02, DINOv3, RoPE-ViT): rotary positions, which prompts neither have nor disturb.

timm rotates the queries and keys of everything behind the prefix tokens by one angle per patch. Prompts stand behind
the patches, so they get an angle as well: that of position nothing, sine 0 and cosine 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from timm.models.eva import Eva, EvaBlock
from torch import Tensor, nn

from mope_deploy.model.backbones.prefix import Made, Projection, inside
from mope_deploy.model.backbones.sources import LoadedEncoder
from mope_deploy.model.backbones.timm_attention import prefix_attention, projection, separate
from mope_deploy.model.backbones.timm_image import TimmBackbone, frozen_image
from mope_deploy.model.config import EncoderSpec

__all__ = ["EvaBackbone", "accepts", "wrap"]


def accepts(module: nn.Module) -> bool:
    """Whether ``module`` is an encoder of this family."""
    return isinstance(module, Eva)


def wrap(loaded: LoadedEncoder, spec: EncoderSpec) -> Any:
    """The frozen encoder with its preprocessing.

    Raises:
        ConfigError: for an encoder without a pooled feature (``global_pool=''``).
    """
    return frozen_image(EvaBackbone(loaded), spec)


class EvaBackbone(TimmBackbone):
    """A timm Eva, layer by layer."""

    def __init__(self, loaded: LoadedEncoder) -> None:
        encoder: Any = loaded.module
        super().__init__(
            loaded, width=encoder.embed_dim, depth=len(encoder.blocks), feature_width=encoder.head_hidden_size
        )
        # Not the blocks that normalise their results, nor those whose heads share keys.
        self.has_prefix_form = all(
            type(b) is EvaBlock and getattr(b.attn, "num_kv_groups", 1) == 1 for b in encoder.blocks
        )

    def embed(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Prefix tokens and patches, and the patches' angles.

        pixel_values (B, 3, H, W) → (B, N, D) and [sin, cos] (patches, 2 d), with an axis of layers and one of heads
        before them where each layer has its own frequencies; None without rotary positions.
        """
        x, angles = self.encoder._pos_embed(self.encoder.patch_embed(inputs["pixel_values"]))
        return self.encoder.norm_pre(x), angles

    def layer(self, index: int, x: Tensor, prompts: Tensor | None, mask: Tensor | None) -> Tensor:
        """Block ``index`` on [x ; prompts], without the prompts' outputs. (B, N, D), (B, P, D) → (B, N, D)."""
        block = self.encoder.blocks[index]
        angles = self._angles(index, mask)
        if prompts is None:
            return block(x, rope=angles)
        if angles is not None:
            angles = torch.cat([angles, _no_angle(prompts.shape[1], like=angles)], dim=-2)
        N = x.shape[1]
        return block(torch.cat([x, prompts], dim=1), rope=angles)[:, :N]

    def prefix_layer(
        self, index: int, x: Tensor, prompts: Tensor | None, mask: Tensor | None, kv: Made | None = None
    ) -> Tensor:
        """Block ``index`` in prefix form. (B, N, D), (B, P, D), keys and values → (B, N, D)."""
        block = self.encoder.blocks[index]
        return inside(block, _prefix_block, block, x, prompts, kv, self._angles(index, mask))

    def projection(self, index: int) -> Projection:
        """How block ``index`` makes keys and values of prompts."""
        return projection(self.encoder.blocks[index])

    def separate(self, index: int) -> None:
        """Three weights in place of a joint one in block ``index``."""
        separate(self.encoder.blocks[index].attn)

    def pool(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The class token, or the mean of the patches where there is none. (B, N, D) → (B, D)."""
        if self.encoder.cls_token is not None:
            return x[:, 0]
        return x[:, self.encoder.num_prefix_tokens :].mean(dim=1)

    def finish(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """timm's own final norm and pooling, without a classifier. (B, N, D) → (B, feature_width)."""
        return self.encoder.forward_head(self.encoder.norm(x), pre_logits=True)

    def _angles(self, index: int, mask: Tensor | None) -> Tensor | None:
        """The angles of block ``index``; each has its own where frequencies are mixed."""
        return mask[index] if mask is not None and self.encoder.rope_mixed else mask


def _prefix_block(block: Any, x: Tensor, prompts: Tensor | None, kv: Made | None, angles: Tensor | None) -> Tensor:
    normed = None if prompts is None else block.norm1(prompts)
    mixed = inside(block.attn, prefix_attention, block.attn, block.norm1(x), normed, kv, angles)
    x = x + (mixed if block.gamma_1 is None else block.gamma_1 * mixed)
    mixed = block.mlp(block.norm2(x))
    return x + (mixed if block.gamma_2 is None else block.gamma_2 * mixed)


def _no_angle(tokens: int, *, like: Tensor) -> Tensor:
    """[sin 0, cos 0] for some tokens, of the shape that ``like`` (…, patches, 2 d) has but for their number."""
    shape = (*like.shape[:-2], tokens, like.shape[-1] // 2)
    return torch.cat([like.new_zeros(shape), like.new_ones(shape)], dim=-1)
