"""Any other text encoder of transformers', run as a whole for its pooled feature: ALBERT, DeBERTa-v1 and the rest.

Its layers are not known here, so it cannot be prompted and is a complementary encoder only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from mope_deploy.errors import ConfigError
from mope_deploy.model.backbones.base import FrozenEncoder
from mope_deploy.model.backbones.exported.dry import check_traceable
from mope_deploy.model.backbones.masks import masked_mean
from mope_deploy.model.backbones.sources import LoadedEncoder
from mope_deploy.model.backbones.text import TextEncoder
from mope_deploy.model.config import EncoderSpec

__all__ = ["PooledTextEncoder"]

_NO_LIMIT = 1 << 20
_ROUNDING = 1e-3


class PooledTextEncoder(TextEncoder):
    """A text encoder whose layers are not prompted.

    Attributes:
        class_token: whether its feature is the first token's state; else it is the mean of the real tokens'.
    """

    family = "another transformers text encoder"
    class_token: bool

    @classmethod
    def accepts(cls, module: Any) -> bool:
        """One of transformers' that reads text and gives hidden states."""
        config = getattr(module, "config", None)
        unfit = getattr(config, "is_encoder_decoder", False) or getattr(config, "is_decoder", False)
        return hasattr(config, "model_type") and getattr(module, "main_input_name", None) == "input_ids" and not unfit

    @classmethod
    def positions(cls, encoder: Any) -> int:
        return getattr(encoder.config, "max_position_embeddings", None) or _NO_LIMIT

    @classmethod
    def of(cls, encoder: Any, source: str, max_length: int) -> PooledTextEncoder:
        """The encoder alone; it is run once, on its longest text.

        Raises:
            ConfigError: if it gives no hidden states of a text, padding changes what it makes of one, or it cannot be
                exported.
        """
        width, sees_the_text = _probe(encoder.eval(), source, max_length)
        _check_attention(encoder.config, source, max_length)
        backbone = cls(encoder, feature_width=width)
        backbone.class_token = sees_the_text
        ids = torch.ones(2, min(7, max_length), dtype=torch.int64)
        examples = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        check_traceable(encoder, lambda **inputs: backbone.embed(inputs)[0], examples, source)
        return backbone

    @classmethod
    def wrap(cls, loaded: LoadedEncoder, spec: EncoderSpec) -> FrozenEncoder:
        frozen = super().wrap(loaded, spec)
        frozen.backbone.class_token &= _begins_with_a_special_token(frozen.tokenizer)
        return frozen

    def embed(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """The last hidden states. input_ids, attention_mask (B, N) int64 → (B, N, D), (B, N) int64."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        return self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state, mask

    def finish(self, x: Tensor, shared: Tensor | None) -> Tensor:
        """The class token, or the mean of the real tokens. (B, N, D) → (B, D)."""
        return x[:, 0] if self.class_token else masked_mean(x, shared)


def _check_attention(config: Any, source: str, max_length: int) -> None:
    """Raise :class:`ConfigError` for BigBird's texts that are long enough for sparse attention: it draws at random."""
    if getattr(config, "attention_type", None) == "block_sparse":
        dense = (5 + 2 * config.num_random_blocks) * config.block_size
        if max_length > dense:
            raise ConfigError(
                f"max_length of {source}", received=max_length, expected=f"at most {dense}: beyond it is sparse"
            )


@torch.no_grad()
def _probe(encoder: Any, source: str, max_length: int) -> tuple[int, bool]:
    """Width of the hidden states, and whether the first one depends on the text's last token (a causal one does not).

    Raises:
        ConfigError: if the encoder cannot be run on a text of ``max_length`` tokens alone, or padding changes it.
    """
    pad_id = max(getattr(encoder.config, "pad_token_id", None) or 0, 0)  # None and −1 stand for none
    short = max(1, max_length // 2)
    one, other = [token for token in (1, 2, 3) if token != pad_id][:2]
    ids = torch.full((3, max_length), one)
    mask = torch.ones_like(ids)
    ids[1, -1] = other
    ids[2, short:], mask[2, short:] = pad_id, 0
    try:
        states = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        alone = encoder(input_ids=ids[2:, :short], attention_mask=mask[2:, :short]).last_hidden_state[0]
    except Exception as error:  # whatever a model of another kind misses: an image, a decoder's input, positions
        raise ConfigError(
            f"{source} cannot be run on a text of {max_length} tokens: "
            f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
            received=type(encoder).__name__,
            expected="a text encoder, and max_length within its positions",
        ) from error
    moved = float((states[2, :short] - alone).abs().max() / alone.abs().max())
    if not moved < _ROUNDING:
        raise ConfigError(
            f"padding changes what {source} makes of a text: predictions would depend on the rest of a batch",
            received=f"{type(encoder).__name__}, whose states move by {moved:.1%}",
            expected="an encoder that leaves padding out",
        )
    return states.shape[-1], not torch.equal(states[0, 0], states[1, 0])


def _begins_with_a_special_token(tokenizer: str | None) -> bool:
    """Whether texts begin with a token that stands for no text: [CLS] or <s>."""
    assert tokenizer is not None
    encoding = Tokenizer.from_str(tokenizer).encode("a")
    return bool(encoding.special_tokens_mask) and encoding.special_tokens_mask[0] == 1
