"""timm's Beit (BEiT, BEiT v2): relative-position bias in every layer, zero for prompts.

The library's attention adds a bias of exactly its own tokens' shape, so a prompted layer computes attention here, from
the library's weights. docs/add-an-encoder.md walks through this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from timm.models.beit import Beit
from torch import Tensor, nn

from mope_deploy.model.backbones.prefix import Made, Projection, inside, joined, mixed_values, prompts_seen, split_heads
from mope_deploy.model.backbones.sources import LoadedEncoder
from mope_deploy.model.backbones.timm_attention import projection, queries_keys_values, separate
from mope_deploy.model.backbones.timm_image import TimmBackbone, frozen_image
from mope_deploy.model.config import EncoderSpec

__all__ = ["BeitBackbone", "accepts", "wrap"]


def accepts(module: nn.Module) -> bool:
    """Whether ``module`` is an encoder of this family."""
    return isinstance(module, Beit)


def wrap(loaded: LoadedEncoder, spec: EncoderSpec) -> Any:
    """The frozen encoder with its preprocessing.

    Raises:
        ConfigError: for an encoder without a pooled feature (``global_pool=''``).
    """
    return frozen_image(BeitBackbone(loaded), spec)


class BeitBackbone(TimmBackbone):
    """A timm Beit, layer by layer."""

    has_prefix_form = True

    def __init__(self, loaded: LoadedEncoder) -> None:
        encoder: Any = loaded.module
        super().__init__(
            loaded, width=encoder.embed_dim, depth=len(encoder.blocks), feature_width=encoder.head_hidden_size
        )

    def embed(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Class token and patches, and the bias that all layers share, (1, heads, N, N), or None.

        pixel_values (B, 3, H, W) → (B, N, D).
        """
        x = self.encoder.patch_embed(inputs["pixel_values"])
        x = torch.cat([self.encoder.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        if self.encoder.pos_embed is not None:
            x = x + self.encoder.pos_embed
        return x, None if self.encoder.rel_pos_bias is None else self.encoder.rel_pos_bias()

    def layer(self, index: int, x: Tensor, prompts: Tensor | None, mask: Tensor | None) -> Tensor:
        """Block ``index`` on [x ; prompts], without the prompts' outputs. (B, N, D), (B, P, D) → (B, N, D)."""
        block = self.encoder.blocks[index]
        if prompts is None:
            return block(x, shared_rel_pos_bias=mask)
        return self.prefix_layer(index, x, prompts, mask)

    def prefix_layer(
        self, index: int, x: Tensor, prompts: Tensor | None, mask: Tensor | None, kv: Made | None = None
    ) -> Tensor:
        """Block ``index`` in prefix form. (B, N, D), (B, P, D), keys and values → (B, N, D)."""
        block = self.encoder.blocks[index]
        return inside(block, _prefix_block, block, x, prompts, kv, mask)

    def projection(self, index: int) -> Projection:
        """How block ``index`` makes keys and values of prompts."""
        return projection(self.encoder.blocks[index])

    def separate(self, index: int) -> None:
        """Three weights in place of a joint one in block ``index``."""
        separate(self.encoder.blocks[index].attn)

    def pool(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The class token. (B, N, D) → (B, D)."""
        return x[:, 0]

    def finish(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """timm's own final norm and pooling, without a classifier. (B, N, D) → (B, feature_width)."""
        return self.encoder.forward_head(self.encoder.norm(x), pre_logits=True)


def _prefix_block(block: Any, x: Tensor, prompts: Tensor | None, kv: Made | None, shared: Tensor | None) -> Tensor:
    normed = None if prompts is None else block.norm1(prompts)
    attended, mlp = (1.0, 1.0) if block.gamma_1 is None else (block.gamma_1, block.gamma_2)
    x = x + attended * inside(block.attn, _attention, block.attn, block.norm1(x), normed, kv, shared)
    return x + mlp * block.mlp(block.norm2(x))


def _attention(attention: Any, x: Tensor, prompts: Tensor | None, kv: Made | None, shared: Tensor | None) -> Tensor:
    """Attention of x to itself, to prompts and to ``kv``, without a bias towards these two. → (B, N, D)."""
    N = x.shape[1]
    q, k, v = queries_keys_values(attention, x, prompts)
    q, k, v = (split_heads(each, attention.num_heads) for each in (q, joined(k, kv, 0), joined(v, kv, 1)))
    bias = shared
    if attention.relative_position_bias_table is not None:
        own = attention._get_rel_pos_bias()  # (1, heads, N, N)
        bias = own if shared is None else own + shared
    if bias is not None:
        bias = prompts_seen(bias, k.shape[2] - N)  # (1, heads, N, N + P)
    mixed = mixed_values(q, k, v, bias)
    return attention.proj(mixed.transpose(1, 2).flatten(2))
