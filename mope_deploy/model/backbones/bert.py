"""transformers' BERT-like text encoders (BERT, MiniLM, RoBERTa, XLM-R, CamemBERT, ELECTRA, DistilBERT).

Post-norm, learned positions. Their layers all read (hidden states, additive attention mask) and return a bare tensor.
Prompts have no position and are never masked; padded text tokens always are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mope_deploy.errors import ConfigError
from mope_deploy.model.backbones.exported.tracing import traced_as
from mope_deploy.model.backbones.masks import blocked, prompts_unmasked
from mope_deploy.model.backbones.prefix import PrefixKV
from mope_deploy.model.backbones.text import LayeredText

__all__ = ["BertEncoder"]

# These count positions from padding_idx + 1 on.
_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert")


class BertEncoder(LayeredText):
    """A transformers BERT-like encoder, layer by layer."""

    family = "transformers BERT-like"
    model_types = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert")

    @classmethod
    def accepts(cls, module: Any) -> bool:
        return super().accepts(module) and not getattr(module.config, "is_decoder", False)

    @classmethod
    def positions(cls, encoder: Any) -> int:
        if encoder.config.model_type in _OFFSET_POSITIONS and not isinstance(encoder.config.pad_token_id, int):
            raise ConfigError(
                f"config.json of {encoder.config.model_type}",
                received=f"pad_token_id {encoder.config.pad_token_id}",
                expected="the id that its positions are counted from",
            )
        return super().positions(encoder) - _first_position(encoder.config)

    @property
    def layers(self) -> Any:
        # DistilBERT's stack has another name; its layers are called the same way.
        return (self.encoder.transformer if hasattr(self.encoder, "transformer") else self.encoder.encoder).layer

    def embed(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Token, type and position embeddings. input_ids, attention_mask (B, N) int64 → (B, N, D), (B, N) int64."""
        ids, first = inputs["input_ids"], _first_position(self.encoder.config)
        # Padding is always behind the text, so a plain count gives every real token the library's own position.
        positions = torch.arange(first, first + ids.shape[1], device=ids.device)
        x = self.encoder.embeddings(input_ids=ids, position_ids=positions.unsqueeze(0))
        if hasattr(self.encoder, "embeddings_project"):  # ELECTRA's small embeddings
            x = self.encoder.embeddings_project(x)
        return x, inputs["attention_mask"]

    def token_layer(self, index: int, rows: Tensor, shared: Tensor | None, P: int) -> Tensor:
        assert shared is not None
        return self.layers[index](rows, blocked(prompts_unmasked(shared, P), rows.dtype))

    def linears(self, layer: Any) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        if hasattr(layer, "ffn"):  # DistilBERT
            return layer.attention.q_lin, layer.attention.k_lin, layer.attention.v_lin
        own = layer.attention.self
        return own.query, own.key, own.value

    def prefix_form(self, layer: Any, x: Tensor, prompts: Tensor | None, kv: PrefixKV | None, shared: Any) -> Tensor:
        if hasattr(layer, "ffn"):
            own = layer.attention
            mixed = traced_as(own, self.mixed, layer, x, prompts, kv, shared)
            h = layer.sa_layer_norm(own.out_lin(mixed) + x)
            return layer.output_layer_norm(layer.ffn(h) + h)
        mixed = traced_as(layer.attention.self, self.mixed, layer, x, prompts, kv, shared)
        h = layer.attention.output(mixed, x)
        return layer.output(layer.intermediate(h), h)


def _first_position(config: Any) -> int:
    return config.pad_token_id + 1 if config.model_type in _OFFSET_POSITIONS else 0
