"""Strict reading of JSON that came from a file: exactly the keys, types and ranges that a dataclass states.

A file of ours is either as documented or refused: a value that is silently ignored, or read as another type, is a
wrong answer later. msgspec checks and converts; this module finds the place of what it refuses, and says what stands
there. ``bool`` never passes for a number, NaN and infinities never pass, and a key is never left out for its default.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import lru_cache
from itertools import repeat
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from mope_deploy.errors import ConfigError, MopeError
from mope_deploy.limits import MAX_DIGITS

__all__ = [
    "MAY_LACK",
    "FieldError",
    "Number",
    "between",
    "check_distinct",
    "choice",
    "decode",
    "did_you_mean",
    "form",
    "hidden",
    "length",
    "line",
    "nearest",
    "parse_json",
    "shown",
    "text",
    "twice",
]

T = TypeVar("T")
# What no name holds: errors.printable, a line's end and a tab too.
_CONTROLS = r"\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
_LINE = rf"[^{_CONTROLS}]*"
MAY_LACK = {"may_lack": True}  # metadata of a dataclass's field whose key a file may leave out
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")  # in the text of a JSON document
_SHOWN = 60  # characters of a foreign value that an error message repeats
_NEAREST = 500  # names that a mistyped one is compared with at most, each in a tenth of a millisecond
_KEYS = 40  # of an object, that a message names
_HUGE = 1e300  # beyond it numbers are refused, infinities and integers that no float holds included


def decode(value: object, kind: type[T], where: str, error: type[MopeError]) -> T:
    """Parsed JSON as ``kind``, or the error that says which field is wrong, what stands there and what should.

    Args:
        value: as :func:`parse_json` returns it.
        kind: a dataclass, whose fields are annotated with the helpers below, or any other type that msgspec knows.
        where: the value's place, for messages: ``"manifest.json: preprocess.image"``.
        error: the class of :class:`MopeError` to raise.
    """
    for inner, its_kind, place in _nodes(value, kind, where, leaves=False):
        bare = _plain(its_kind)[0]
        if isinstance(inner, int) and abs(inner) > _HUGE:  # msgspec up to 0.20 stumbles over what no float holds
            raise error(place, received=shown(inner), expected=_expected(its_kind))
        if is_dataclass(bare) and isinstance(inner, Mapping):
            _check_keys(inner, bare, place, error)
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError:
        for inner, its_kind, place in _nodes(value, kind, where, leaves=True):
            try:
                msgspec.convert(inner, its_kind)
            except msgspec.ValidationError as found:
                if isinstance(cause := found.__cause__, FieldError):
                    raise error(f"{place}.{cause.what}", received=cause.received, expected=cause.expected) from None
                raise error(place, received=shown(inner), expected=_expected(its_kind)) from None
        raise


class FieldError(ConfigError, ValueError):
    """What a dataclass's ``__post_init__`` raises: a field that does not fit the others.

    Args:
        field: its name.
        received, expected: as of every :class:`MopeError`.
    """

    def __init__(self, field: str, *, received: object, expected: str) -> None:
        super().__init__(field, received=received, expected=expected)


# What a field may hold, as metadata of its type: ``Annotated[int, between(1, 4096)]``.


def between(low: float, high: float = _HUGE) -> Meta:
    """A number's range, both ends included."""
    return Meta(ge=low, le=high)


def text(most: int) -> Meta:
    """A string of at most ``most`` characters that is not blank and is what a terminal shows of it."""
    return Meta(min_length=1, max_length=most, pattern=rf"(?s)\A(?!\s*\Z){_LINE}\Z")


def line(most: int) -> Meta:
    """A string of at most ``most`` characters that is what a terminal shows of it."""
    return Meta(min_length=0, max_length=most, pattern=rf"\A{_LINE}\Z")


def form(pattern: str, expected: str) -> Meta:
    """A string that matches as a whole; ``expected`` is what messages say of it."""
    return Meta(pattern=rf"\A(?:{pattern})\Z", description=expected)


def choice(*options: str) -> Meta:
    """One of these strings."""
    return form("|".join(map(re.escape, options)), f"one of {', '.join(options)}")


def length(least: int, most: int) -> Meta:
    """Items of an array, or keys of an object."""
    return Meta(min_length=least, max_length=most)


Number = Annotated[float, between(-_HUGE)]


def check_distinct(field: str, names: Iterable[str]) -> None:
    """Raise :class:`FieldError` where a name is there twice."""
    if (again := twice(names)) is not None:
        raise FieldError(field, received=f"{shown(again)} twice", expected="every name once")


def twice(items: Iterable[T]) -> T | None:
    """The first of ``items`` that was there before, if any; looks at each of them once."""
    seen: set[T] = set()
    for item in items:
        if item in seen:
            return item
        seen.add(item)
    return None


def hidden(text: str) -> str | None:
    """The first character of a name that a terminal obeys or no encoding holds, as messages show it; None without."""
    found = re.search(f"[{_CONTROLS}]", text)
    return shown(found[0]) if found else None


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
    names = list(known)
    if len(names) > _NEAREST:  # to compare a row's label with 100,000 takes seconds, and every row may have a wrong one
        names = [one for one in names if one[:1].casefold() == name[:1].casefold()][:_NEAREST]
    found = difflib.get_close_matches(name[:200], names, n=1)
    return found[0] if found else None


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """The question that an error about a mistyped name ends with; see :func:`nearest`."""
    hint = nearest(name, known)
    return f"did you mean {hint!r}?" if hint else None


def parse_json(text: str) -> Any:
    """Parse one JSON document; stricter than :func:`json.loads`.

    Raises:
        ValueError: malformed JSON, a key twice in one object, NaN or an infinity, ``1e999``, an integer of more than
            300 digits, half of a surrogate pair, nesting too deep to parse.
    """
    try:
        value = json.loads(
            text,
            object_pairs_hook=_no_duplicates,
            parse_constant=_no_constant,
            parse_int=_short_integer,
            parse_float=_finite,
        )
        if _SURROGATE.search(text):  # only then: to look at every string of a row takes longer than to parse it
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair") from None
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"the key {shown(twice(key for key, _ in pairs))} occurs twice")
    return found


def _short_integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"an integer of {len(digits):,} digits")
    return int(digits)


def _finite(digits: str) -> float:
    if abs(value := float(digits)) == math.inf:
        raise ValueError(f"{shown(digits)} is more than any number holds")
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _nodes(value: object, kind: Any, where: str, *, leaves: bool) -> Iterator[tuple[object, Any, str]]:
    """Every value with its type and its place, inner ones first; of the ``leaves`` always floats."""
    bare, notes, _ = _plain(kind)
    if not leaves and not _is_checked(bare):
        return
    most = next((note.max_length for note in notes if note.max_length is not None), None)
    if most is not None and isinstance(value, Mapping | list | tuple) and len(value) > most:
        yield value, kind, where  # refused for that alone: what is inside may be millions
        return
    if isinstance(value, Mapping) and is_dataclass(bare):
        for name, inner in _hints(bare).items():  # type: ignore[arg-type]
            if name in value:
                yield from _nodes(value[name], inner, f"{where}.{name}", leaves=leaves)
    elif isinstance(value, Mapping) and get_origin(bare) in (dict, Mapping):
        key, inner = get_args(bare)
        for name, item in value.items():
            yield name, key, where
            place = f".{name}" if name.isidentifier() else f"[{shown(name)}]"
            yield from _nodes(item, inner, where + place, leaves=leaves)
    elif isinstance(value, list | tuple) and get_origin(bare) is tuple:
        kinds = get_args(bare)
        for i, (item, inner) in enumerate(zip(value, repeat(kinds[0]) if kinds[-1] is ... else kinds, strict=False)):
            yield from _nodes(item, inner, f"{where}[{i}]", leaves=leaves)
    yield value, kind, where


def _check_keys(value: Mapping[Any, object], kind: Any, where: str, error: type[MopeError]) -> None:
    """An object for a dataclass has its keys and no others."""
    known = {field.name: field for field in fields(kind)}
    for key in value:
        if key not in known:
            expected = f"one of {', '.join(known)}"
            raise error(f"{where}: unknown key {shown(key)}", expected=expected, todo=did_you_mean(str(key), known))
    missing = [name for name, field in known.items() if name not in value and not field.metadata.get("may_lack")]
    if missing:
        few = ", ".join(map(str, list(value)[:_KEYS])) + (" …" if len(value) > _KEYS else "")
        received = f"only {few or 'no keys'}"
        raise error(f"{where}: {', '.join(missing)} missing", received=received)


@lru_cache(maxsize=256)
def _plain(kind: Any) -> tuple[Any, tuple[Meta, ...], bool]:
    """A type without its metadata and null; the metadata; and whether null passes."""
    notes: tuple[Meta, ...] = ()
    nullable = False
    while True:
        rest = [one for one in get_args(kind) if one is not NoneType]
        if get_origin(kind) is Annotated:
            kind, *more = rest
            notes += tuple(more)
        elif get_origin(kind) in (Union, UnionType) and len(rest) == 1:
            (kind,), nullable = rest, True
        else:
            return kind, notes, nullable


@lru_cache(maxsize=256)
def _is_checked(bare: Any) -> bool:
    """Whether a type is a dataclass or a float, or an array or object of such: msgspec does not check all of these."""
    inside = [] if get_origin(bare) in (Union, UnionType) else get_args(bare)
    return is_dataclass(bare) or bare is float or any(_is_checked(_plain(kind)[0]) for kind in inside)


@lru_cache(maxsize=64)
def _hints(kind: type) -> dict[str, Any]:
    known = {field.name for field in fields(kind)}
    return {name: hint for name, hint in get_type_hints(kind, include_extras=True).items() if name in known}


def _expected(kind: Any) -> str:
    """What a type takes, in words."""
    bare, notes, nullable = _plain(kind)
    limits: dict[str, Any] = {"min_length": 0, "ge": -_HUGE, "le": _HUGE}
    for note in notes:
        names = ("description", "min_length", "max_length", "ge", "le")
        limits |= {name: found for name in names if (found := getattr(note, name)) is not None}
        if note.pattern is not None:
            limits["without"] = ", none of them a control character"
    return _in_words(bare, limits) + (" or null" if nullable else "")


def _in_words(bare: Any, limits: Mapping[str, Any]) -> str:
    if "description" in limits:
        return str(limits["description"])
    least, most = limits["min_length"], limits.get("max_length", 0)
    if bare is bool:
        return "true or false"
    if bare is int:
        return f"an integer from {limits['ge']:,} to {limits['le']:,}"
    if bare is float and limits["le"] >= _HUGE:
        return "a finite number" + (f" of at least {limits['ge']:g}" if limits["ge"] > -_HUGE else "")
    if bare is float:
        return f"a number from {limits['ge']:g} to {limits['le']:g}"
    if bare is str:
        return f"a string of {least} to {most:,} characters{limits.get('without', '')}" if most else "a string"
    if get_origin(bare) is tuple:
        kinds = get_args(bare)
        if kinds[-1] is ...:
            return f"an array of {least:,} to {most:,} items"
        return f"an array of {len(kinds)} {'integers' if _plain(kinds[0])[0] is int else 'numbers'}"
    if get_origin(bare) in (dict, Mapping):
        return f"an object of {f'{least:,} to' if least else 'at most'} {most:,} keys"
    return "a JSON object"
