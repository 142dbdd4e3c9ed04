"""timm's Beit (BEiT, BEiT v2): relative-position bias in every layer, zero for prompts.

docs/add-an-encoder.md walks through this file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from timm.models.beit import Beit
from torch import Tensor, nn

from mope_deploy.model.backbones.masks import prompts_seen
from mope_deploy.model.backbones.prefix import PrefixKV, joined, mixed_values, split_heads
from mope_deploy.model.backbones.timm_attention import queries_keys_values
from mope_deploy.model.backbones.timm_image import LayeredTimm

__all__ = ["BeitEncoder"]


class BeitEncoder(LayeredTimm):
    """A timm Beit, block by block."""

    family = "timm Beit"

    @classmethod
    def accepts(cls, module: Any) -> bool:
        return isinstance(module, Beit)

    def embed(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Class token and patches, and the bias that all layers share, (1, heads, N, N), or None.

        pixel_values (B, 3, H, W) → (B, N, D).
        """
        x = self.encoder.patch_embed(inputs["pixel_values"])
        x = torch.cat([self.encoder.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        if self.encoder.pos_embed is not None:
            x = x + self.encoder.pos_embed
        return x, None if self.encoder.rel_pos_bias is None else self.encoder.rel_pos_bias()

    def token_layer(self, index: int, rows: Tensor, shared: Tensor | None, P: int) -> Tensor:
        """timm's own block, its biases extended by zeros for prompts. (B, N + P, D) → (B, N + P, D)."""
        block = self.layers[index]
        if shared is not None:
            shared = nn.functional.pad(shared, (0, P, 0, P))  # (1, heads, N + P, N + P)
        with _bias_extended(block.attn, P):
            return block(rows, shared_rel_pos_bias=shared)

    def attend(
        self, block: Any, x: Tensor, prompts: Tensor | None, kv: PrefixKV | None, shared: Tensor | None
    ) -> Tensor:
        """Attention of x to itself, to prompts and to ``kv``, without a bias towards these two. → (B, N, D)."""
        attention, N = block.attn, x.shape[1]
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


@contextmanager
def _bias_extended(attention: Any, P: int) -> Iterator[None]:
    """timm's attention, whose own bias fits its own tokens alone, with 0 for P prompts behind them."""
    if attention.relative_position_bias_table is None or P == 0:
        yield
        return
    own = attention._get_rel_pos_bias  # → (1, heads, N, N)
    attention._get_rel_pos_bias = lambda: nn.functional.pad(own(), (0, P, 0, P))
    try:
        yield
    finally:
        del attention._get_rel_pos_bias
