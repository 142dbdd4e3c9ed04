"""transformers' BERT-like text encoders (BERT, MiniLM, RoBERTa, XLM-R, CamemBERT, ELECTRA, DistilBERT).

Post-norm, learned positions. Their layers all read (hidden states, additive attention mask) and return a bare tensor.
Prompts have no position and are never masked; padded text tokens always are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mope_deploy.model.backbones.prefix import Made, Projection, attention, inside
from mope_deploy.model.backbones.sources import LoadedEncoder
from mope_deploy.model.backbones.text import (
    TextBackbone,
    blocked,
    frozen_text,
    longest_text,
    with_prompts,
)
from mope_deploy.model.config import EncoderSpec

__all__ = ["BertBackbone", "accepts", "wrap"]

_MODEL_TYPES = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert")
# These count positions from padding_idx + 1 on.
_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert")


def accepts(module: nn.Module) -> bool:
    """Whether ``module`` is an encoder of this family."""
    config = getattr(module, "config", None)
    return getattr(config, "model_type", None) in _MODEL_TYPES and not getattr(config, "is_decoder", False)


def wrap(loaded: LoadedEncoder, spec: EncoderSpec) -> Any:
    """The frozen encoder with its tokenizer.

    Raises:
        ConfigError: if there is no tokenizer beside the encoder, or ``max_length`` is more than its positions allow.
    """
    backbone = BertBackbone(loaded.module)
    return frozen_text(backbone, loaded, spec, max_length=longest_text(spec, limit=backbone.max_positions))


class BertBackbone(TextBackbone):
    """A transformers BERT-like encoder, layer by layer."""

    has_prefix_form = True

    def __init__(self, encoder: Any) -> None:
        config = encoder.config
        super().__init__(
            encoder, width=config.hidden_size, depth=len(_layers(encoder)), feature_width=config.hidden_size
        )
        self.first_position: int = config.pad_token_id + 1 if config.model_type in _OFFSET_POSITIONS else 0
        self.max_positions: int = config.max_position_embeddings - self.first_position

    def embed(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Token, type and position embeddings. input_ids, attention_mask (B, N) int64 → (B, N, D), (B, N) int64."""
        ids = inputs["input_ids"]
        # Padding is always behind the text, so a plain count gives every real token the library's own position.
        positions = torch.arange(self.first_position, self.first_position + ids.shape[1], device=ids.device)
        x = self.encoder.embeddings(input_ids=ids, position_ids=positions.unsqueeze(0))
        if hasattr(self.encoder, "embeddings_project"):  # ELECTRA's small embeddings
            x = self.encoder.embeddings_project(x)
        return x, inputs["attention_mask"]

    def layer(self, index: int, x: Tensor, prompts: Tensor | None, mask: Tensor | None) -> Tensor:
        """Layer ``index`` on [x ; prompts], without the prompts' outputs. (B, N, D), (B, P, D) → (B, N, D)."""
        assert mask is not None
        everything, mask = with_prompts(x, prompts, mask)  # (B, N + P, D)
        return _layers(self.encoder)[index](everything, blocked(mask, x.dtype))[:, : x.shape[1]]

    def prefix_layer(
        self, index: int, x: Tensor, prompts: Tensor | None, mask: Tensor | None, kv: Made | None = None
    ) -> Tensor:
        """Layer ``index`` in prefix form. (B, N, D), (B, P, D), keys and values → (B, N, D)."""
        assert mask is not None
        layer = _layers(self.encoder)[index]
        form = _prefix_distilbert if hasattr(layer, "ffn") else _prefix_bert
        return inside(layer, form, layer, x, prompts, kv, blocked(mask, x.dtype))

    def projection(self, index: int) -> Projection:
        """How layer ``index`` makes keys and values of prompts: post-norm, so linearly."""
        _, k, v = _linears(_layers(self.encoder)[index])
        return Projection.of(None, k, v)


def _layers(encoder: Any) -> nn.ModuleList:
    # DistilBERT's stack has another name; its layers are called the same way.
    return (encoder.transformer if encoder.config.model_type == "distilbert" else encoder.encoder).layer


def _linears(layer: Any) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    """The layers that make queries, keys and values."""
    if hasattr(layer, "ffn"):
        return layer.attention.q_lin, layer.attention.k_lin, layer.attention.v_lin
    own = layer.attention.self
    return own.query, own.key, own.value


def _prefix_bert(layer: Any, x: Tensor, prompts: Tensor | None, kv: Made | None, unseen: Tensor) -> Tensor:
    own = layer.attention.self
    mixed = inside(own, attention, *_linears(layer), own.num_attention_heads, x, prompts, kv, unseen)
    h = layer.attention.output(mixed, x)
    return layer.output(layer.intermediate(h), h)


def _prefix_distilbert(layer: Any, x: Tensor, prompts: Tensor | None, kv: Made | None, unseen: Tensor) -> Tensor:
    own = layer.attention
    mixed = inside(own, attention, *_linears(layer), own.n_heads, x, prompts, kv, unseen)
    h = layer.sa_layer_norm(own.out_lin(mixed) + x)
    return layer.output_layer_norm(layer.ffn(h) + h)
