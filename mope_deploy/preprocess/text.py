"""Text → token ids, by a ``tokenizer.json``: truncated to the encoder's length, padded on the right.

Letters: B batch · T text length in tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, TypeVar

import numpy as np
from numpy.typing import NDArray

from mope_deploy.errors import ConfigError, MediaError, UsageError
from mope_deploy.fields import between, shown
from mope_deploy.limits import MAX_GROWN_CHARS, MAX_TEXT_CHARS
from mope_deploy.preprocess.rules import check_rules
from mope_deploy.preprocess.shared import Tensors, one_line

if TYPE_CHECKING:
    from tokenizers import Encoding

__all__ = ["TextReader", "TextSpec", "check_text"]

T = TypeVar("T")


@dataclass(frozen=True)
class TextSpec:
    """How a text becomes what the text encoder reads.

    Args:
        max_length: tokens, special ones included; longer texts are truncated on the right.
        pad_id: token id of padding.
    """

    max_length: Annotated[int, between(1, 65_536)]
    pad_id: Annotated[int, between(0, 2**31 - 1)]

    @property
    def tensors(self) -> Tensors:
        """What the encoder reads: name → dtype and axes."""
        return dict.fromkeys(("input_ids", "attention_mask"), ("int64", ("batch", "text_length")))


class TextReader:
    """A tokenizer with what a :class:`TextSpec` says about it.

    Args:
        spec: lengths and padding; what ``tokenizer.json`` itself says about them belongs to whoever wrote it.
        tokenizer: the text of ``tokenizer.json``.

    Raises:
        ConfigError: it cannot be parsed, or has more special tokens than ``max_length``, or its rules are beyond
            :func:`check_rules`.
    """

    def __init__(self, spec: TextSpec, tokenizer: str) -> None:
        from tokenizers import Tokenizer

        self.spec = spec
        self._growth = check_rules(tokenizer)
        try:
            self._tokenizer = _rust(Tokenizer.from_str, tokenizer)
        except _TokenizerError as error:
            raise ConfigError(f"tokenizer.json cannot be read: {error}") from error
        self._special = self._tokenizer.num_special_tokens_to_add(False)
        if spec.max_length <= self._special:
            expected = f"more than the tokenizer's {self._special} special tokens"
            raise ConfigError("text.max_length", received=spec.max_length, expected=expected)
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(spec.max_length)

    def check(self, text: object) -> str:
        """Return ``text`` if it has tokens.

        Raises:
            MediaError: it has none, or :func:`check_text` refuses it.
        """
        self._encode(checked := check_text(text))
        return checked

    def encode(
        self,
        texts: Sequence[str | None],
        *,
        pad_to: int | None = None,
        on_truncate: Callable[[int, int], None] | None = None,
    ) -> dict[str, NDArray[np.int64]]:
        """B texts → ``input_ids`` and ``attention_mask`` int64 (B, T); see :meth:`Preprocessing.encode_text`.

        A text that is None is missing: its row is the special tokens alone, or one padding token where there are none,
        and never fully masked, because attention over nothing is not defined.
        """
        rows: list[list[int]] = []
        for index, text in enumerate(texts):
            if text is None:
                rows.append(self._tokenizer.encode("").ids or [self.spec.pad_id])
                continue
            # One by one: the library's threads, once used, warn about every later fork (a data loader's workers).
            encoding = self._encode(check_text(text))
            if encoding.overflowing and on_truncate is not None:
                rest = sum(len(more.ids) - self._special for more in encoding.overflowing)
                on_truncate(index, len(encoding.ids) + rest)
            rows.append(encoding.ids)
        longest = max(map(len, rows))
        if pad_to is not None and not longest <= pad_to <= self.spec.max_length:
            expected = f"{longest} (the longest text here) to {self.spec.max_length}"
            raise UsageError("pad_to", received=pad_to, expected=expected)
        length = pad_to or longest
        ids = np.array([row + [self.spec.pad_id] * (length - len(row)) for row in rows], np.int64)  # (B, T)
        mask = (np.arange(length) < np.array([[len(row)] for row in rows])).astype(np.int64)  # (B, T)
        return {"input_ids": ids, "attention_mask": mask}

    def _encode(self, text: str) -> Encoding:
        if (grown := len(text) * self._growth) > MAX_GROWN_CHARS:
            received = f"up to {grown:,.0f} characters after the tokenizer's rules"
            raise MediaError("text is too long", received=received, expected=f"at most {MAX_GROWN_CHARS:,}")
        try:
            encoding = _rust(self._tokenizer.encode, text)
        except _TokenizerError as error:  # an unknown word and no token for such, say
            received, todo = f"{shown(text)}: {error}", "is tokenizer.json complete?"
            raise MediaError("text cannot be tokenised", received=received, todo=todo) from error
        if len(encoding.ids) <= self._special:
            raise MediaError("text has no tokens", received=shown(text), expected="at least one word")
        return encoding


class _TokenizerError(Exception):
    pass


def _rust(call: Callable[[str], T], text: str) -> T:
    """Call the tokenizers library, whose errors are bare Exceptions and whose panics are not even those."""
    try:
        return call(text)
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise _TokenizerError(one_line(error)) from error
        raise


def check_text(text: object) -> str:
    """Return ``text`` if a tokenizer may see it.

    Raises:
        MediaError: not a string, blank, too long, or with characters that no text has.
    """
    if not isinstance(text, str):
        raise MediaError("text", received=type(text).__name__, expected="a string")
    if not text.strip():
        raise MediaError("text is empty", expected="at least one word")
    if len(text) > MAX_TEXT_CHARS:
        received = f"{len(text):,} characters"
        raise MediaError("text is too long", received=received, expected=f"at most {MAX_TEXT_CHARS:,}")
    if "\0" in text:
        raise MediaError(f"text holds a NUL character at position {text.index(chr(0)):,}", todo="remove it")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        what = f"text holds half of a surrogate pair at position {error.start:,}"
        raise MediaError(what, expected="valid Unicode", todo="remove it") from error
    return text
