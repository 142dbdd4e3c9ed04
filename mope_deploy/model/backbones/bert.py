"""transformers' BERT-like text encoders (BERT, MiniLM, RoBERTa, XLM-R, CamemBERT, ELECTRA).

Post-norm, learned positions. Their layers all read (hidden states, additive attention mask) and return a bare tensor.
Prompts have no position and are never masked; padded text tokens always are.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mope_deploy.errors import ConfigError
from mope_deploy.model.backbones.base import Backbone
from mope_deploy.model.backbones.sources import LoadedEncoder, quiet_transformers
from mope_deploy.model.config import EncoderSpec
from mope_deploy.preprocess import TextSpec

__all__ = ["BertBackbone", "accepts", "wrap"]

_MODEL_TYPES = ("bert", "roberta", "xlm-roberta", "camembert", "electra")
# These count positions from padding_idx + 1 on.
_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert")
_DEFAULT_MAX_LENGTH = 128
_SLOW_VOCABULARIES = ("vocab.txt", "vocab.json", "sentencepiece.bpe.model", "spiece.model")


def accepts(module: nn.Module) -> bool:
    """Whether ``module`` is an encoder of this family."""
    config = getattr(module, "config", None)
    return getattr(config, "model_type", None) in _MODEL_TYPES and not getattr(config, "is_decoder", False)


def wrap(loaded: LoadedEncoder, spec: EncoderSpec) -> Any:
    """The frozen encoder with its tokenizer.

    Raises:
        ConfigError: if there is no tokenizer beside the encoder, or ``max_length`` is more than its positions allow.
    """
    from mope_deploy.model.backbones import FrozenEncoder

    backbone = BertBackbone(loaded.module)
    limit = backbone.max_positions
    max_length = min(limit, _DEFAULT_MAX_LENGTH) if spec.max_length is None else spec.max_length
    if max_length > limit:
        raise ConfigError(
            f"max_length of {spec.source}", received=max_length, expected=f"at most its {limit} positions"
        )
    tokenizer = _tokenizer_json(loaded.location, spec.source)
    pad_id = backbone.encoder.config.pad_token_id
    return FrozenEncoder(backbone, TextSpec(max_length=max_length, pad_id=0 if pad_id is None else pad_id), tokenizer)


class BertBackbone(Backbone):
    """A transformers BERT-like encoder, layer by layer."""

    modality = "text"
    input_names = ("input_ids", "attention_mask")

    def __init__(self, encoder: Any) -> None:
        config = encoder.config
        super().__init__(
            encoder,
            width=config.hidden_size,
            depth=len(encoder.encoder.layer),
            feature_width=config.hidden_size,
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
        N = x.shape[1]
        if prompts is not None:
            x = torch.cat([x, prompts], dim=1)  # (B, N + P, D)
            mask = torch.cat([mask, mask.new_ones(prompts.shape[:2])], dim=1)  # prompts are never masked
        blocked = (1 - mask[:, None, None, :]).to(x.dtype) * torch.finfo(x.dtype).min  # (B, 1, 1, N + P), additive
        return self.encoder.encoder.layer[index](x, blocked)[:, :N]

    def pool(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The class token. (B, N, D) → (B, D)."""
        return x[:, 0]

    def finish(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The class token of the last layer; these encoders have no final norm. (B, N, D) → (B, D)."""
        return x[:, 0]

    def save_source(self, folder: Path) -> None:
        """Write config.json and model.safetensors in transformers' own form; the tokenizer is the checkpoint's."""
        with quiet_transformers():
            self.encoder.save_pretrained(folder)


def _tokenizer_json(location: str, source: str) -> str:
    """The text of the encoder's ``tokenizer.json``; slow-only tokenizers are converted by transformers."""
    folder = Path(location)
    if (folder / "tokenizer.json").is_file():
        return (folder / "tokenizer.json").read_text(encoding="utf-8")
    # Given a folder without any vocabulary, transformers makes up a tokenizer of special tokens alone.
    if folder.is_dir() and not any((folder / name).is_file() for name in _SLOW_VOCABULARIES):
        raise ConfigError(
            f"no tokenizer beside {source}",
            received=f"{folder} without one",
            expected=f"tokenizer.json or {', '.join(_SLOW_VOCABULARIES)}",
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(location).backend_tokenizer.to_str()
    except Exception as error:  # transformers raises anything from OSError to AttributeError here
        raise ConfigError(
            f"no usable tokenizer beside {source}: {type(error).__name__}: {str(error).splitlines()[0][:200]}",
            todo="put its tokenizer.json into the encoder's folder",
        ) from error
