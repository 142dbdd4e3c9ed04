"""timm's Eva (EVA, EVA02, DINOv3, RoPE-ViT): rotary positions, which prompts neither have nor disturb.

timm rotates the queries and keys of everything behind the prefix tokens by one angle per patch. Prompts stand behind
the patches, so they get an angle as well: that of position nothing, sine 0 and cosine 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from timm.models.eva import Eva
from torch import Tensor, nn

from mope_deploy.model.backbones.sources import LoadedEncoder
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
        angles = mask[index] if mask is not None and self.encoder.rope_mixed else mask
        if prompts is None:
            return block(x, rope=angles)
        if angles is not None:
            angles = torch.cat([angles, _no_angle(prompts.shape[1], like=angles)], dim=-2)
        N = x.shape[1]
        return block(torch.cat([x, prompts], dim=1), rope=angles)[:, :N]

    def pool(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The class token, or the mean of the patches where there is none. (B, N, D) → (B, D)."""
        if self.encoder.cls_token is not None:
            return x[:, 0]
        return x[:, self.encoder.num_prefix_tokens :].mean(dim=1)

    def finish(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """timm's own final norm and pooling, without a classifier. (B, N, D) → (B, feature_width)."""
        return self.encoder.forward_head(self.encoder.norm(x), pre_logits=True)


def _no_angle(tokens: int, *, like: Tensor) -> Tensor:
    """[sin 0, cos 0] for some tokens, of the shape that ``like`` (…, patches, 2 d) has but for their number."""
    shape = (*like.shape[:-2], tokens, like.shape[-1] // 2)
    return torch.cat([like.new_zeros(shape), like.new_ones(shape)], dim=-1)
