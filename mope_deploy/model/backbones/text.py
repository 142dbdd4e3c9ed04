"""What the text families share: class token, padding mask, longest text, tokenizer, saving in transformers' form."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mope_deploy.errors import ConfigError
from mope_deploy.model.backbones.base import Backbone
from mope_deploy.model.backbones.sources import LoadedEncoder, quiet_transformers
from mope_deploy.model.config import EncoderSpec
from mope_deploy.preprocess import TextSpec

__all__ = ["TextBackbone", "blocked", "frozen_text", "longest_text", "with_prompts"]

_DEFAULT_MAX_LENGTH = 128
_SLOW_VOCABULARIES = ("vocab.txt", "vocab.json", "sentencepiece.bpe.model", "spiece.model", "spm.model")


class TextBackbone(Backbone):
    """A transformers text encoder whose first token is its class token."""

    modality = "text"
    input_names = ("input_ids", "attention_mask")

    def pool(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The class token. (B, N, D) → (B, D)."""
        return x[:, 0]

    def finish(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The class token of the last layer, for encoders without a final norm. (B, N, D) → (B, D)."""
        return x[:, 0]

    def save_source(self, folder: Path) -> None:
        """Write config.json and model.safetensors in transformers' own form; the tokenizer is the checkpoint's."""
        with quiet_transformers():
            self.encoder.save_pretrained(folder)


def longest_text(spec: EncoderSpec, *, limit: int) -> int:
    """The longest text in tokens: what ``spec`` asks for, else the encoder's ``limit`` but at most 128.

    Raises:
        ConfigError: if ``spec`` asks for more than ``limit``.
    """
    if spec.max_length is None:
        return min(limit, _DEFAULT_MAX_LENGTH)
    if spec.max_length > limit:
        raise ConfigError(
            f"max_length of {spec.source}", received=spec.max_length, expected=f"at most its {limit} positions"
        )
    return spec.max_length


def frozen_text(backbone: TextBackbone, loaded: LoadedEncoder, spec: EncoderSpec, *, max_length: int) -> Any:
    """A wrapped text encoder together with its tokenizer and its longest text.

    Raises:
        ConfigError: if there is no usable tokenizer beside the encoder.
    """
    from mope_deploy.model.backbones import FrozenEncoder

    pad_id = backbone.encoder.config.pad_token_id
    return FrozenEncoder(
        backbone,
        TextSpec(max_length=max_length, pad_id=0 if pad_id is None else pad_id),
        _tokenizer_json(loaded.location, spec.source),
    )


def with_prompts(x: Tensor, prompts: Tensor | None, mask: Tensor) -> tuple[Tensor, Tensor]:
    """[x ; prompts] and which of these tokens may be attended to: prompts are never masked.

    (B, N, D), (B, P, D), (B, N) int64 → (B, N + P, D), (B, N + P) int64.
    """
    if prompts is None:
        return x, mask
    return torch.cat([x, prompts], dim=1), torch.cat([mask, mask.new_ones(prompts.shape[:2])], dim=1)


def blocked(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The additive attention mask of every query: 0 for real keys, the most negative number for others.

    (B, N) int64, 1 = real → (B, 1, 1, N).
    """
    return (1 - mask[:, None, None, :]).to(dtype) * torch.finfo(dtype).min


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
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(location).backend_tokenizer.to_str()
    except Exception as error:  # transformers raises anything from OSError to AttributeError here
        todo = "put its tokenizer.json into the encoder's folder"
        if find_spec("sentencepiece") is None:
            todo += ", or run: pip install sentencepiece (it converts tokenizers published as a .model file)"
        raise ConfigError(
            f"no usable tokenizer beside {source}: {type(error).__name__}: {_first_line(error)[:200]}", todo=todo
        ) from error


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "")
