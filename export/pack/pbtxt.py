"""Protocol buffers' text form, as far as Triton's ``config.pbtxt`` needs it: read without a schema; strings written.

The schema is not installed where models are exported; the tests parse what is written here against Triton's own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

__all__ = ["Message", "quoted", "read_text"]

_TOKEN = re.compile(
    r"""\s+ | \#[^\n]*                              # blanks, comments
    | (?P<string>"(?:[^"\\\n]|\\.)*" | '(?:[^'\\\n]|\\.)*')
    | (?P<word>[A-Za-z0-9_.+-]+)
    | (?P<sign>[{}\[\]<>:,;])""",
    re.VERBOSE,
)
_ESCAPES = {"n": b"\n", "r": b"\r", "t": b"\t", "a": b"\a", "b": b"\b", "f": b"\f", "v": b"\v"}
_OPEN = {"{": "}", "<": ">"}

Message = dict[str, list[Any]]  # field → its values, in order; a value is text or a message


def quoted(text: str) -> str:
    """A string literal. What is not printable ASCII is written as the octal bytes of its UTF-8."""
    escaped = (
        f"\\{byte:03o}" if not 32 <= byte < 127 else "\\" + chr(byte) if byte in b'"\\' else chr(byte)
        for byte in text.encode("utf-8")
    )
    return '"' + "".join(escaped) + '"'


def read_text(text: str) -> Message:
    """The fields of a message; every one is a list, as nothing here tells which of them may be repeated.

    Numbers and names of enumerations stay the text that they are.

    Raises:
        ValueError: it is no such text; the message says where.
    """
    return _message(_Tokens(text), end=None)


class _Tokens:
    """Tokens with one of look-ahead, ("string" | "word" | "sign", its text); ("end", "") at last."""

    def __init__(self, text: str) -> None:
        self._tokens = self._split(text)
        self.next = next(self._tokens)

    def take(self) -> tuple[str, str]:
        taken = self.next
        self.next = next(self._tokens, ("end", ""))
        return taken

    def take_sign(self, *signs: str) -> bool:
        if self.next[0] == "sign" and self.next[1] in signs:
            self.take()
            return True
        return False

    @staticmethod
    def _split(text: str) -> Iterator[tuple[str, str]]:
        position = 0
        while position < len(text):
            match = _TOKEN.match(text, position)
            if match is None:
                line = text.count("\n", 0, position) + 1
                raise ValueError(f"line {line}: {text[position : position + 20]!r} is no protobuf text")
            position = match.end()
            if match.lastgroup:
                yield match.lastgroup, match[match.lastgroup]
        yield "end", ""


def _message(tokens: _Tokens, *, end: str | None) -> Message:
    found: Message = {}
    while True:
        kind, text = tokens.take()
        if (kind, text) == (("end", "") if end is None else ("sign", end)):
            return found
        if kind != "word":
            raise ValueError(f"{text!r} where the name of a field is expected" if text else "it ends within a message")
        tokens.take_sign(":")
        values = found.setdefault(text, [])
        if tokens.take_sign("["):
            while not tokens.take_sign("]"):
                values.append(_value(tokens))
                tokens.take_sign(",")
        else:
            values.append(_value(tokens))
        tokens.take_sign(",", ";")


def _value(tokens: _Tokens) -> Any:
    kind, text = tokens.take()
    if kind == "sign" and text in _OPEN:
        return _message(tokens, end=_OPEN[text])
    if kind == "word":
        return text
    if kind != "string":
        raise ValueError(f"{text!r} where a value is expected" if text else "it ends before a value")
    parts = [_unquoted(text)]
    while tokens.next[0] == "string":  # neighbours are one string
        parts.append(_unquoted(tokens.take()[1]))
    return b"".join(parts).decode("utf-8")


def _unquoted(literal: str) -> bytes:
    def byte(match: re.Match[bytes]) -> bytes:
        escape = match[1].decode("ascii", errors="replace")
        if escape[0] in "xX":
            return bytes([int(escape[1:], 16)])
        if escape[0].isdigit():
            return bytes([int(escape, 8) & 0xFF])
        return _ESCAPES.get(escape, match[1])

    return re.sub(rb"\\([xX][0-9a-fA-F]{1,2}|[0-7]{1,3}|.)", byte, literal[1:-1].encode("utf-8"))
