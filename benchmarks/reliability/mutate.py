"""Inputs made worse, the same ones for the same seed: what strangers, disks and networks do to files.

Trees (JSON, YAML once parsed) lose, repeat and exchange values, or get ones of another type, size or alphabet; bytes
are flipped, cut, spliced and repeated. Nothing here knows what a file is for.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["bytes_of", "mutated_bytes", "mutated_trees"]

_STRANGE: tuple[Any, ...] = (  # what stands where something else should
    *(None, True, False, 0, -1, 1, 0.5, -0.0, 1e-320, 1e308, 2**31, 2**63, -(2**63) - 1, 10**299, float("nan")),
    *(float("inf"), float("-inf"), "", " ", "x", "x" * 10_000, "\0", "\n", "\x1b[2J", "\x9b31m", "\u202egnp.exe"),
    *(
        "\ud800",
        "[red]x[/red]",
        "../x",
        "/etc/passwd",
        "C:\\x",
        "$(id)",
        "%s",
        "数",
        "e\u0301",
        [],
        {},
        [[]],
        {"": None},
    ),
)
_DEPTH, _LONG = 200, 5_000  # levels, items


def mutated_trees(tree: Any, count: int, *, seed: int) -> Iterator[tuple[str, Any]]:
    """``count`` copies of a JSON-like tree, each with one to three mutations: what was done, and the copy."""
    draw = random.Random(seed)
    for _ in range(count):
        box = {"": _copy(tree)}
        done = [_mutate(box, draw) for _ in range(draw.choice((1, 1, 1, 2, 3)))]
        yield ", ".join(done), box.get("")


def mutated_bytes(data: bytes, count: int, *, seed: int) -> Iterator[tuple[str, bytes]]:
    """``count`` copies of some bytes, each with one to three mutations: what was done, and the copy."""
    draw = random.Random(seed)
    for _ in range(count):
        made, done = data, []
        for _ in range(draw.choice((1, 1, 2, 3))):
            name = draw.choice(sorted(_BYTES))
            made = _BYTES[name](made, draw)
            done.append(name)
        yield ", ".join(done), made


def bytes_of(tree: Any) -> bytes:
    """A mutated tree as JSON that Python writes, NaN and lone surrogates (as escapes) included."""
    return json.dumps(tree).encode("ascii")


def _copy(tree: Any) -> Any:
    return json.loads(json.dumps(tree))  # copy.deepcopy takes three levels of Python for one of the tree


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a tree; without recursion, for trees that are deep."""
    stack = [tree]
    while stack:
        at = stack.pop()
        keys = list(at) if isinstance(at, dict) else range(len(at)) if isinstance(at, list) else ()
        for key in keys:
            yield at, key
            stack.append(at[key])


def _mutate(tree: Any, draw: random.Random) -> str:
    places = list(_places(tree))
    if not places:
        return "nothing"
    at, key = draw.choice(places)
    name = draw.choice(sorted(_TREES))
    _TREES[name](at, key, draw, places)
    return f"{name} {str(key)[:40]!r}"


Places = list[tuple[Any, Any]]


def _drop(at: Any, key: Any, draw: random.Random, places: Places) -> None:
    del at[key]


def _double(at: Any, key: Any, draw: random.Random, places: Places) -> None:
    """The same again: beside itself in a list, under a similar name in an object."""
    if isinstance(at, list):
        at.insert(key, _copy(at[key]))
    else:
        at[f"{key}{draw.choice(('2', ' ', 's', chr(0x301)))}"] = _copy(at[key])


def _retype(at: Any, key: Any, draw: random.Random, places: Places) -> None:
    value = at[key]
    at[key] = draw.choice(([value], {"value": value}, str(value)[:1000], value is None, len(str(value)), None))


def _strange(at: Any, key: Any, draw: random.Random, places: Places) -> None:
    at[key] = _copy(draw.choice(_STRANGE))


def _near(at: Any, key: Any, draw: random.Random, places: Places) -> None:
    """A value of the same type that is a little different, as one flipped bit makes it."""
    value = at[key]
    if isinstance(value, bool):
        at[key] = not value
    elif isinstance(value, int):
        at[key] = value ^ (1 << draw.randrange(max(1, value.bit_length())))
    elif isinstance(value, float):
        at[key] = value * draw.choice((0.5, 2, -1, 1 + 2**-40, 1e300))
    elif isinstance(value, str) and value:
        i = draw.randrange(len(value))
        at[key] = value[:i] + chr(ord(value[i]) ^ (1 << draw.randrange(7))) + value[i + 1 :]
    elif isinstance(value, list):
        draw.shuffle(value)


def _exchange(at: Any, key: Any, draw: random.Random, places: Places) -> None:
    """Two values stand in each other's place."""
    other, its = draw.choice(places)
    first, second = _copy(at[key]), _copy(other[its])
    at[key], other[its] = second, first


def _rename(at: Any, key: Any, draw: random.Random, places: Places) -> None:
    if isinstance(at, dict):
        new = draw.choice((f"{key}x", str(key)[:-1], str(key).upper(), f"{key}\x1b[0m", f"\u202e{key}", ""))
        at[new] = at.pop(key)


def _deep(at: Any, key: Any, draw: random.Random, places: Places) -> None:
    value, as_list = at[key], draw.random() < 0.5
    for _ in range(_DEPTH):
        value = [value] if as_list else {"x": value}
    at[key] = value


def _long(at: Any, key: Any, draw: random.Random, places: Places) -> None:
    value = at[key]
    if isinstance(value, str):
        at[key] = (value or "x") * _LONG
    elif isinstance(value, dict):
        value.update((f"k{i}", i) for i in range(_LONG))
    else:
        at[key] = [value if isinstance(value, int | float | None) else i for i in range(_LONG)]


_TREES: dict[str, Callable[[Any, Any, random.Random, Places], None]] = {
    "drop": _drop,
    "double": _double,
    "retype": _retype,
    "strange": _strange,
    "near": _near,
    "exchange": _exchange,
    "rename": _rename,
    "deep": _deep,
    "long": _long,
}


def _flip(data: bytes, draw: random.Random) -> bytes:
    made = bytearray(data)
    for _ in range(draw.choice((1, 1, 8, 64)) if made else 0):
        made[draw.randrange(len(made))] ^= 1 << draw.randrange(8)
    return bytes(made)


def _cut(data: bytes, draw: random.Random) -> bytes:
    """The end, the beginning or a piece in between is gone."""
    first, last = sorted(draw.randrange(len(data) + 1) for _ in range(2))
    return draw.choice((data[:first], data[first:], data[:first] + data[last:]))


def _splice(data: bytes, draw: random.Random) -> bytes:
    """A piece of the file over another place of it."""
    size = draw.randrange(1, max(2, len(data) // 8))
    source, target = (draw.randrange(len(data) + 1) for _ in range(2))
    return data[:target] + data[source : source + size] + data[target + size :]


def _repeat(data: bytes, draw: random.Random) -> bytes:
    """A piece many times."""
    first = draw.randrange(len(data) + 1)
    piece = data[first : first + draw.choice((1, 4, 64, 1024))]
    return data[:first] + piece * draw.choice((2, 16, 256)) + data[first:]


def _overwrite(data: bytes, draw: random.Random) -> bytes:
    """A few bytes that lengths and counts like to be: all ones, all zeros, random."""
    first, size = draw.randrange(len(data) + 1), draw.choice((1, 2, 4, 8))
    new = draw.choice((b"\xff" * size, b"\0" * size, b"\x7f" + b"\xff" * (size - 1), draw.randbytes(size)))
    return data[:first] + new + data[first + size :]


_BYTES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "flip": _flip,
    "cut": _cut,
    "splice": _splice,
    "repeat": _repeat,
    "overwrite": _overwrite,
}
