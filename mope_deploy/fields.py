"""Strict reading of JSON objects that came from a file: known keys only, stated types, stated ranges.

A file of ours is either as documented or refused: a value that is silently ignored, or read as another type, is a
wrong answer later. ``bool`` never passes for a number, and NaN and infinities never pass at all.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from mope_deploy.errors import MopeError

__all__ = ["Fields", "nearest", "parse_json", "shown"]

T = TypeVar("T")
_SHOWN = 60  # characters of a foreign value that an error message repeats


def shown(value: object) -> str:
    """``value`` as an error message may show it: its type, and its text if that is short."""
    if value is None or isinstance(value, bool | int | float):
        return "a huge integer" if isinstance(value, int) and value.bit_length() > 200 else str(value)
    if isinstance(value, str):
        return repr(value) if len(value) <= _SHOWN else f"{value[:_SHOWN]!r}… ({len(value):,} characters)"
    if isinstance(value, Mapping):
        return f"an object of {len(value)} keys"
    if isinstance(value, Sequence):
        return f"an array of {len(value)} items"
    return type(value).__name__


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The most similar of ``known`` if any is similar, as a hint for a mistyped name."""
    found = difflib.get_close_matches(name[:200], list(known), n=1)
    return found[0] if found else None


def parse_json(text: str) -> Any:
    """Parse one JSON document; stricter than :func:`json.loads`.

    Raises:
        ValueError: malformed JSON, a key twice in one object, NaN or an infinity, an integer of more than 400 digits,
            nesting too deep to parse.
    """
    try:
        return json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant, parse_int=_short_integer)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in {k for k, _ in pairs[:i]})
        raise ValueError(f"the key {shown(twice)} occurs twice")
    return found


def _short_integer(digits: str) -> int:
    if len(digits) > 400:
        raise ValueError(f"an integer of {len(digits):,} digits")
    return int(digits)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


class Fields:
    """One JSON object with its place in the file and the error to raise about it.

    Args:
        value: the parsed JSON value.
        where: its place, for messages: ``"manifest.json: preprocess.image"``.
        error: the class of :class:`MopeError` to raise.
        required: keys that must be there.
        optional: keys that may be there. Any other key is an error.
    """

    def __init__(
        self,
        value: object,
        where: str,
        error: type[MopeError],
        *,
        required: Sequence[str] = (),
        optional: Sequence[str] = (),
    ) -> None:
        self.where, self.error = where, error
        if not isinstance(value, Mapping):
            raise error(where, received=shown(value), expected="a JSON object")
        self.value: Mapping[str, Any] = value
        known = (*required, *optional)
        for key in value:
            if key not in known:
                hint = nearest(str(key), known)
                raise error(
                    f"{where}: unknown key {shown(key)}",
                    expected=f"one of {', '.join(known)}",
                    todo=f"did you mean {hint!r}?" if hint else None,
                )
        missing = [key for key in required if key not in value]
        if missing:
            raise error(
                f"{where}: {', '.join(missing)} missing", received=f"only {', '.join(map(str, value)) or 'no keys'}"
            )

    def fail(self, key: str, expected: str) -> MopeError:
        """The error that says what stands at ``key`` and what should."""
        return self.error(f"{self.where}.{key}", received=shown(self.value.get(key)), expected=expected)

    def integer(self, key: str, low: int, high: int) -> int:
        found = self.value.get(key)
        if isinstance(found, bool) or not isinstance(found, int) or not low <= found <= high:
            raise self.fail(key, f"an integer from {low:,} to {high:,}")
        return found

    def number(self, key: str, low: float = -math.inf, high: float = math.inf) -> float:
        found: Any = self.value.get(key)
        if not _is_number(found) or not low <= found <= high:
            raise self.fail(
                key, f"a number from {low:g} to {high:g}" if math.isfinite(low + high) else "a finite number"
            )
        return float(found)

    def numbers(self, key: str, count: int, low: float = -math.inf, high: float = math.inf) -> tuple[float, ...]:
        found = self.value.get(key)
        if not isinstance(found, list | tuple) or len(found) != count:
            raise self.fail(key, f"an array of {count} numbers")
        if not all(_is_number(item) and low <= item <= high for item in found):
            raise self.error(
                f"{self.where}.{key}", received=str(found)[:100], expected=f"{count} numbers from {low:g} to {high:g}"
            )
        return tuple(float(item) for item in found)

    def boolean(self, key: str) -> bool:
        found = self.value.get(key)
        if not isinstance(found, bool):
            raise self.fail(key, "true or false")
        return found

    def text(self, key: str, *, most: int = 1000, empty: bool = False) -> str:
        """A string of at most ``most`` characters, not blank unless ``empty``."""
        found = self.value.get(key)
        if not isinstance(found, str) or len(found) > most or not (empty or found.strip()):
            raise self.fail(key, f"a string of {0 if empty else 1} to {most:,} characters")
        return found

    def choice(self, key: str, options: Sequence[str]) -> str:
        found = self.value.get(key)
        if not isinstance(found, str) or found not in options:
            raise self.fail(key, f"one of {', '.join(options)}")
        return found

    def texts(
        self, key: str, *, least: int = 0, most: int, each: int = 1000, distinct: bool = False
    ) -> tuple[str, ...]:
        """An array of ``least`` to ``most`` strings that are not blank."""

        def one(item: object, where: str) -> str:
            if not isinstance(item, str) or not item.strip() or len(item) > each:
                raise self.error(where, received=shown(item), expected=f"a string of 1 to {each:,} characters")
            return item

        found = self.array(key, one, least=least, most=most)
        if distinct and len(set(found)) != len(found):
            twice = next(item for i, item in enumerate(found) if item in found[:i])
            raise self.error(f"{self.where}.{key}", received=f"{shown(twice)} twice", expected="every name once")
        return found

    def array(self, key: str, read: Callable[[Any, str], T], *, least: int = 0, most: int) -> tuple[T, ...]:
        """An array whose items ``read(item, place)`` checks and converts."""
        found = self.value.get(key)
        if not isinstance(found, list | tuple) or not least <= len(found) <= most:
            raise self.fail(key, f"an array of {least:,} to {most:,} items")
        return tuple(read(item, f"{self.where}.{key}[{i}]") for i, item in enumerate(found))

    def maybe(self, key: str, read: Callable[[Any, str], T]) -> T | None:
        """``None`` where the file says null, or nothing; else what ``read(value, place)`` makes of it."""
        found = self.value.get(key)
        return None if found is None else read(found, f"{self.where}.{key}")


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e300  # NaN fails the comparison, infinities and integers beyond float exceed it
