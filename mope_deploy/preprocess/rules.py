"""What a ``tokenizer.json`` may ask for: rules that make a text longer, or slower, only within bounds.

A replacement rule may turn each character into megabytes, and several multiply: the library then ends the
process, which no caller can catch. So a file's rules are looked at before the library gets it.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from mope_deploy.errors import ConfigError
from mope_deploy.fields import shown
from mope_deploy.limits import MAX_TEXT_GROWTH, MAX_WORD_CHARS
from mope_deploy.preprocess.shared import one_line

__all__ = ["check_rules"]

_ORDINARY = 64  # bytes that a table of Unicode's own normalisation may make of a character; NFKC makes at most 33
_DEPTH = 50  # of sequences within sequences; the library itself reads about a hundred


class _Model(msgspec.Struct):
    """What there is to say of a tokenizer's model: its vocabulary, which may be large, is not even made."""

    max_input_chars_per_word: Any = None
    dropout: Any = None


class _File(msgspec.Struct):
    """What a text goes through; a decoder runs only the other way."""

    normalizer: Any = None
    pre_tokenizer: Any = None
    model: _Model = msgspec.field(default_factory=_Model)


def check_rules(text: str) -> float:
    """Refuse the text of a ``tokenizer.json`` whose rules could take all memory or all time.

    Returns:
        How many times as many characters a text may have after all of them.

    Raises:
        ConfigError: no JSON object; texts could grow too much; words are looked at too long; choices are random.
    """
    try:
        document = msgspec.json.decode(text, type=_File)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ConfigError(f"tokenizer.json cannot be read: {one_line(error)}") from error
    growth = 1.0
    for rule in (rule for stage in (document.normalizer, document.pre_tokenizer) for rule in _rules(stage, 0)):
        growth *= _growth(rule)
        if growth > MAX_TEXT_GROWTH:
            received = f"texts up to {growth:,.0f} times as long"
            raise ConfigError("tokenizer.json: rules", received=received, expected=f"{MAX_TEXT_GROWTH} times at most")
    longest, dropout = document.model.max_input_chars_per_word, document.model.dropout
    if isinstance(longest, int) and longest > MAX_WORD_CHARS:  # WordPiece's time grows with its square
        what = "tokenizer.json: model.max_input_chars_per_word"
        raise ConfigError(what, received=shown(longest), expected=f"{MAX_WORD_CHARS:,} at most")
    if dropout:
        expected = "null: the same text has the same tokens"
        raise ConfigError("tokenizer.json: model.dropout", received=shown(dropout), expected=expected)
    return growth


def _rules(stage: object, depth: int) -> Iterator[Mapping[str, Any]]:
    """A stage's rules, those inside sequences each for itself."""
    if depth > _DEPTH:
        raise ConfigError("tokenizer.json: rules", received="nested too deeply", expected=f"{_DEPTH} levels at most")
    if not isinstance(stage, Mapping):
        return
    for key in ("normalizers", "pretokenizers"):
        inner = stage.get(key)
        for one in inner if isinstance(inner, list) else ():
            yield from _rules(one, depth + 1)
    yield stage


def _growth(rule: Mapping[str, Any]) -> float:
    """How many times as many characters a rule may make of a text."""
    content, pattern = rule.get("content"), rule.get("pattern")
    if rule.get("type") == "Replace" and isinstance(content, str):
        if isinstance(pattern, Mapping) and isinstance(pattern.get("String"), str) and pattern["String"]:
            return max(1.0, len(content) / len(pattern["String"]))
        return 1.0 + len(content)  # an expression may match one character, or nothing between two
    if rule.get("type") == "Prepend" and isinstance(prepended := rule.get("prepend"), str):
        return 1.0 + len(prepended)
    if rule.get("type") == "Precompiled" and isinstance(table := rule.get("precompiled_charsmap"), str):
        longest = _longest(table)
        return 1.0 if longest <= _ORDINARY else float(longest)
    return 1.0


def _longest(table: str) -> int:
    """Bytes of the longest text that sentencepiece's table has for a character: the size of a trie, it, then texts."""
    try:
        data = base64.b64decode(table)
    except (binascii.Error, ValueError):
        return 0  # the library says what is wrong
    texts = data[4 + int.from_bytes(data[:4], "little") :]
    return max(map(len, texts.split(b"\0")), default=0)
