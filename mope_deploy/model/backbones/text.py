"""What the text families share: class token, padding mask, longest text and tokenizer."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mope_deploy.errors import ConfigError
from mope_deploy.model.backbones.base import FrozenEncoder
from mope_deploy.model.backbones.masks import blocked
from mope_deploy.model.backbones.sources import LoadedEncoder
from mope_deploy.model.backbones.tokenizers import load_tokenizer
from mope_deploy.model.backbones.transformers_encoder import LayeredTransformers, TransformersEncoder
from mope_deploy.model.config import EncoderSpec
from mope_deploy.preprocess import TextSpec

__all__ = ["LayeredText", "TextEncoder"]

_DEFAULT_MAX_LENGTH = 128


class TextEncoder(TransformersEncoder):
    """A transformers text encoder; ``shared`` is which tokens are real, (B, N) int64."""

    modality = "text"
    input_names = ("input_ids", "attention_mask")

    @classmethod
    def wrap(cls, loaded: LoadedEncoder, spec: EncoderSpec) -> FrozenEncoder:
        """The encoder with its longest text and its tokenizer.

        Raises:
            ConfigError: if there is no usable tokenizer beside it, that has ids which the encoder has no rows for, or
                ``max_length`` is more than its positions allow.
        """
        tokenizer = load_tokenizer(loaded.location, spec.source)
        limit = cls.positions(loaded.module)
        usual = min(limit, tokenizer.longest or limit, _DEFAULT_MAX_LENGTH)
        max_length = usual if spec.max_length is None else spec.max_length
        if max_length > limit:
            raise ConfigError(
                f"max_length of {spec.source}", received=max_length, expected=f"at most its {limit} positions"
            )
        backbone = cls.of(loaded.module, spec.source, max_length)
        if tokenizer.ids > backbone.vocabulary:
            raise ConfigError(
                f"the tokenizer of {spec.source} has more ids than the encoder has rows",
                received=f"ids 0 to {tokenizer.ids - 1}",
                expected=f"ids 0 to {backbone.vocabulary - 1}",
                todo="the tokenizer is another encoder's, or tokens were added to it that the encoder was not given",
            )
        return FrozenEncoder(backbone, TextSpec(max_length, _padding(backbone)), tokenizer.json)

    @property
    def vocabulary(self) -> int:
        """Token ids are below it: the rows of its embeddings, whatever a tokenizer counts."""
        return self.encoder.get_input_embeddings().weight.shape[0]

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


def _padding(backbone: TextEncoder) -> int:
    """The id of padding; it is masked, so that any will do where the encoder names none (None, −1, no such key)."""
    found = getattr(backbone.encoder.config, "pad_token_id", None)
    return found if isinstance(found, int) and 0 <= found < backbone.vocabulary else 0
