"""Damage to files, the same for the same seed: of their bytes, and of the values in documents."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from random import Random
from typing import Any

__all__ = ["mutate_bytes", "mutate_json"]

_MOST = 4 * 2**20  # bytes of a mutant
# Written into JSON as they stand here, which no serialiser would write.
_RAW = (
    "1e999",
    "-1e999",
    "NaN",
    "1" * 400,
    "-0",
    "1e-400",
    "tru",
    '"\\ud800"',
    '"\\u0000"',
    "[" * 3000,
    '{"a":' * 3000,
)
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, -(2**63), 2**64, 0.5, -1.0, 1e308, "", "a", " ", "../x", "/etc/passwd"),
    *("\x1b[2J", "a\nb", "\x00", "\u202e", "[red]", "x" * 5000, "é", "e\u0301", "\ufeff"),
    *([], {}, [[]], [0] * 2000, {"a": 0}, ["a", "a"], [None]),
)


def mutate_bytes(data: bytes, random: Random) -> bytes:
    """One to three faults somewhere in ``data``; at most 4 MiB come back."""
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        data = random.choice(_BYTES)(data, random)[:_MOST]
    return data


def mutate_json(text: str, random: Random) -> str:
    """One to three values of a JSON document replaced, dropped, repeated, nested or renamed."""
    document: Any = {"document": json.loads(text)}
    raw: dict[str, str] = {}
    for _ in range(random.choice((1, 1, 2, 3))):
        holder, key = _place(document, random)
        act = random.randrange(7)
        if act == 0 and holder is not document:
            del holder[key]
        elif act == 1:
            marker = f"raw-{len(raw)}-{random.random()}"
            raw[json.dumps(marker)] = random.choice(_RAW)
            holder[key] = marker
        elif act == 2:
            holder[key] = [copy.deepcopy(holder[key])]
        elif act == 3 and isinstance(holder[key], list) and holder[key]:
            holder[key].append(copy.deepcopy(random.choice(holder[key])))
        elif act == 4 and isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
            holder[key] = holder[key] * random.choice((-1, 2, 10, 1000, 0.5)) + random.choice((0, 1))
        elif act == 5 and isinstance(holder, dict) and holder is not document:
            marker = f"{key}-{random.random()}"
            raw[json.dumps(marker)] = json.dumps(key)
            holder[marker] = random.choice(_VALUES)
        else:
            holder[key] = copy.deepcopy(random.choice(_VALUES))
    made = json.dumps(document["document"], ensure_ascii=random.random() < 0.5)
    for marker, value in raw.items():
        made = made.replace(marker, value)
    return made


def _place(document: Any, random: Random) -> tuple[Any, Any]:
    """Some container within and a key of it."""
    places = []
    waiting = [document]
    while waiting:
        holder = waiting.pop()
        for key in holder if isinstance(holder, dict) else range(len(holder)):
            places.append((holder, key))
            if isinstance(holder[key], dict | list):
                waiting.append(holder[key])
    return random.choice(places)


def _span(data: bytes, random: Random, most: int) -> tuple[int, int]:
    start = random.randrange(len(data) + 1)
    return start, min(len(data), start + random.randint(1, most))


def _flip(data: bytes, random: Random) -> bytes:
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 8, 64)) if data else 0):
        changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def _cut(data: bytes, random: Random) -> bytes:
    return data[: random.randrange(len(data) + 1)]


def _drop(data: bytes, random: Random) -> bytes:
    start, end = _span(data, random, 64)
    return data[:start] + data[end:]


def _repeat(data: bytes, random: Random) -> bytes:
    start, end = _span(data, random, 256)
    return data[:start] + data[start:end] * random.choice((2, 10, 1000, 20_000)) + data[end:]


def _splice(data: bytes, random: Random) -> bytes:
    start, end = _span(data, random, 256)
    to = random.randrange(len(data) + 1)
    return data[:to] + data[start:end] + data[to + (end - start) :]


def _boundary(data: bytes, random: Random) -> bytes:
    """A number in a header that is as large, or as small, as it can be."""
    width = random.choice((1, 2, 4, 8))
    value = random.choice(
        (b"\xff" * width, b"\x00" * width, b"\x7f" + b"\xff" * (width - 1), b"\xff" * (width - 1) + b"\x7f")
    )
    at = random.randrange(min(len(data), random.choice((32, 256, 4096))) + 1)
    return data[:at] + value + data[at + width :]


def _noise(data: bytes, random: Random) -> bytes:
    start, end = _span(data, random, 64)
    return data[:start] + random.randbytes(end - start) + data[end:]


_BYTES: tuple[Callable[[bytes, Random], bytes], ...] = (_flip, _flip, _cut, _drop, _repeat, _splice, _boundary, _noise)
