"""What the text families share: class token, padding mask, longest text and tokenizer."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from mope_deploy.errors import ConfigError
from mope_deploy.model.backbones.base import FrozenEncoder
from mope_deploy.model.backbones.masks import blocked
from mope_deploy.model.backbones.sources import LoadedEncoder, quiet_transformers
from mope_deploy.model.backbones.transformers_encoder import LayeredTransformers, TransformersEncoder
from mope_deploy.model.config import EncoderSpec
from mope_deploy.preprocess import TextSpec

__all__ = ["LayeredText", "TextEncoder"]

_DEFAULT_MAX_LENGTH = 128
_SLOW_VOCABULARIES = ("vocab.txt", "vocab.json", "sentencepiece.bpe.model", "spiece.model", "spm.model")


class TextEncoder(TransformersEncoder):
    """A transformers text encoder; ``shared`` is which tokens are real, (B, N) int64."""

    modality = "text"
    input_names = ("input_ids", "attention_mask")

    @classmethod
    def wrap(cls, loaded: LoadedEncoder, spec: EncoderSpec) -> FrozenEncoder:
        """The encoder with its longest text and its tokenizer.

        Raises:
            ConfigError: if there is no usable tokenizer beside it, or ``max_length`` is more than its positions allow.
        """
        limit = cls.positions(loaded.module)
        max_length = min(limit, _DEFAULT_MAX_LENGTH) if spec.max_length is None else spec.max_length
        if max_length > limit:
            raise ConfigError(
                f"max_length of {spec.source}", received=max_length, expected=f"at most its {limit} positions"
            )
        backbone = cls.of(loaded.module, spec.source, max_length)
        pad_id = backbone.encoder.config.pad_token_id
        return FrozenEncoder(
            backbone,
            TextSpec(max_length=max_length, pad_id=0 if pad_id is None else pad_id),
            _tokenizer_json(loaded.location, spec.source),
        )

    @classmethod
    def positions(cls, encoder: Any) -> int:
        """The longest text in tokens that the encoder can read."""
        return encoder.config.max_position_embeddings

    @classmethod
    def of(cls, encoder: Any, source: str, max_length: int) -> Any:
        """The encoder alone, for texts of at most ``max_length`` tokens; ``source`` is for messages."""
        raise NotImplementedError


class LayeredText(TextEncoder, LayeredTransformers):
    """One whose layers can be prompted, and whose first token is its class token."""

    def __init__(self, encoder: Any, *, max_length: int) -> None:
        super().__init__(encoder)
        self.max_length = max_length

    @classmethod
    def of(cls, encoder: Any, source: str, max_length: int) -> Any:
        return cls(encoder, max_length=max_length)

    @property
    def layers(self) -> Any:
        return self.encoder.encoder.layer

    def shared_by(self, index: int, x: Tensor, shared: Tensor | None, P: int) -> Any:
        """The additive mask of the text's keys, (B, 1, 1, N)."""
        assert shared is not None
        return blocked(shared, x.dtype)

    def pool(self, x: Tensor, shared: Tensor | None) -> Tensor:
        """The class token. (B, N, D) → (B, D)."""
        return x[:, 0]

    def finish(self, x: Tensor, shared: Tensor | None) -> Tensor:
        """The class token of the last layer, for encoders without a final norm. (B, N, D) → (B, D)."""
        return x[:, 0]


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
