"""Strict reading: what passes, what does not, and what is said about it. (Real files: test_manifest.py and others.)"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import pytest

from mope_deploy import fields
from mope_deploy.errors import BundleError, ConfigError
from mope_deploy.fields import (
    MAY_LACK,
    FieldError,
    Number,
    between,
    check_distinct,
    choice,
    decode,
    form,
    length,
    parse_json,
    shown,
    text,
    twice,
)

pytestmark = pytest.mark.device


@dataclass(frozen=True)
class Inner:
    low: Annotated[int, between(0, 9)]
    high: Annotated[int, between(0, 9)] = 9

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise FieldError("low", received=self.low, expected="at most high")


@dataclass(frozen=True)
class Outer:
    count: Annotated[int, between(1, 1000)]
    ratio: Annotated[float, between(0, 1)]
    any: Number
    name: Annotated[str, text(5)]
    kind: Annotated[str, choice("", "a.b", "c")]
    digest: Annotated[str, form("[0-9a-f]{2}", "two hexadecimal digits")]
    flag: bool
    inner: Inner | None
    many: Annotated[tuple[Inner, ...], length(1, 2)]
    pair: tuple[Number, Number]
    named: Annotated[Mapping[Annotated[str, length(0, 3)], Inner], length(0, 2)]
    extra: str = field(default="", metadata=MAY_LACK)


GOOD: dict[str, Any] = {
    "count": 1,
    "ratio": 1,
    "any": -3,
    "name": " a ",
    "kind": "",
    "digest": "0f",
    "flag": False,
    "inner": None,
    "many": [{"low": 1, "high": 2}],
    "pair": [1, 2.5],
    "named": {"x": {"low": 0, "high": 0}},
}
BAD: list[tuple[str, Any, str]] = [
    *(
        ("count", value, f"f.count; received {shown(value)}; expected an integer from 1 to 1,000")
        for value in (0, 1001, 1.0, 2.5, True, None, "1", [1], 10**30, -(10**30), 10**400)
    ),
    *(
        ("ratio", value, f"f.ratio; received {shown(value)}; expected a number from 0 to 1")
        for value in (-0.1, 1.1, float("nan"), float("inf"), True, "1", 10**30)
    ),
    *(
        ("any", value, f"f.any; received {shown(value)}; expected a finite number")
        for value in (float("nan"), float("inf"), -float("inf"), 1e305, 10**350, False, None)
    ),
    *(
        ("name", value, f"f.name; received {shown(value)}; expected a string of 1 to 5 characters")
        for value in ("", "  \n", "abcdef", 3, None)
    ),
    ("kind", "aXb", "f.kind; received 'aXb'; expected one of , a.b, c"),
    ("kind", "c\n", "f.kind; received 'c\\n'"),
    ("digest", "0f0", "f.digest; received '0f0'; expected two hexadecimal digits"),
    ("flag", 0, "f.flag; received 0; expected true or false"),
    ("inner", 3, "f.inner; received 3; expected a JSON object or null"),
    (
        "inner",
        {"low": "1", "high": 2},
        "f.inner.low; received 1; expected an integer from 0 to 9".replace("received 1", "received '1'"),
    ),
    ("inner", {"low": 3, "high": 2}, "f.inner.low; received 3; expected at most high"),
    ("inner", {"low": 3}, "f.inner: high missing; received only low"),
    (
        "inner",
        {"low": 3, "high": 4, "hihg": 4},
        "f.inner: unknown key 'hihg'; expected one of low, high; did you mean 'high'?",
    ),
    ("inner", {"low": 3, "hihg": 4}, "f.inner: unknown key 'hihg'"),
    ("many", [], "f.many; received an array of 0 items; expected an array of 1 to 2 items"),
    ("many", [{"low": 1, "high": 2}, {"low": 1, "high": 11}], "f.many[1].high; received 11"),
    ("pair", [1], "f.pair; received an array of 1 items; expected an array of 2 numbers"),
    ("pair", [1, "2"], "f.pair[1]; received '2'; expected a finite number"),
    ("named", {"x": {"low": 10, "high": 2}}, "f.named.x.low; received 10"),
    ("named", {"a b": {"low": 10, "high": 2}}, "f.named['a b'].low; received 10"),
    ("named", {"long": {"low": 1, "high": 2}}, "f.named; received 'long'; expected a string of 0 to 3 characters"),
    (
        "named",
        {c: {"low": 1, "high": 2} for c in "abc"},
        "f.named; received an object of 3 keys; expected an object of at most 2 keys",
    ),
]


def test_what_fits_is_read() -> None:
    made = decode(GOOD, Outer, "f", BundleError)
    assert made.many == (Inner(1, 2),)
    assert made.pair == (1.0, 2.5)
    assert type(made.ratio) is float
    assert made.named == {"x": Inner(0, 0)}
    assert made.extra == ""


@pytest.mark.parametrize(("key", "value", "words"), BAD, ids=[f"{i}-{key}" for i, (key, _, _) in enumerate(BAD)])
def test_what_does_not_is_named(key: str, value: Any, words: str) -> None:
    with pytest.raises(BundleError) as caught:
        decode({**GOOD, key: value}, Outer, "f", BundleError)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", sorted(GOOD))
def test_no_key_may_be_left_out_whatever_its_default(key: str) -> None:
    document = {name: value for name, value in GOOD.items() if name != key}
    with pytest.raises(BundleError, match=f"f: {key} missing"):
        decode(document, Outer, "f", BundleError)


def test_what_a_field_is_asked_outside_a_file() -> None:
    with pytest.raises(ConfigError, match="low; received 3; expected at most high"):
        Inner(3, 2)
    with pytest.raises(FieldError, match="names; received 'a' twice; expected every name once"):
        check_distinct("names", ["b", "a", "a"])


class Counted(str):
    """Counts how often it is looked up."""

    looks = 0

    def __hash__(self) -> int:
        Counted.looks += 1
        return super().__hash__()


def test_names_that_occur_twice_are_found_in_one_pass() -> None:
    """By the number of look-ups: one for each name, or twice that, never that times the number of names."""
    names = [Counted(i) for i in range(3000)]
    pairs: list[tuple[str, Any]] = [(name, 0) for name in [*names, *names]]
    assert twice(name for name, _ in pairs) == "0"
    assert 0 < Counted.looks < 5 * len(pairs)
    Counted.looks = 0
    with pytest.raises(ValueError, match="the key '0' occurs twice"):
        fields._no_duplicates(pairs)
    assert 0 < Counted.looks < 5 * len(pairs)


def test_many_keys_twice_are_refused_at_once() -> None:
    document = "{" + ", ".join(f'"k{i % 60_000}": 0' for i in range(120_000)) + "}"
    with pytest.raises(ValueError, match="the key 'k0' occurs twice"):
        parse_json(document)


def test_a_mistyped_name_is_compared_with_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row of a file may have one, beside 100,000 labels."""
    compared = []
    close = difflib.get_close_matches
    monkeypatch.setattr(
        difflib, "get_close_matches", lambda name, known, n: compared.append(len(known)) or close(name, known, n=n)
    )
    labels = [f"{letter} label {i}" for i in range(20_000) for letter in "abcde"]
    assert fields.did_you_mean("c lable 77", labels) == "did you mean 'c label 77'?"
    assert fields.did_you_mean("z", labels) is None
    assert max(compared) <= 500


@pytest.mark.parametrize(
    "name", ["a\x1b[2J", "a\nb", "\x9b1m", "\u202egnp", "\u2066", "a\u2028", "\ud800", "a\0", "a\x7f"]
)
def test_names_are_what_a_terminal_shows_of_them(name: str) -> None:
    for kind in (Annotated[str, fields.text(50)], Annotated[str, fields.line(50)]):
        with pytest.raises(ConfigError, match="none of them a control character") as caught:
            fields.decode(name, kind, "name", ConfigError)
        assert str(caught.value).isprintable()
    assert fields.hidden(name) is not None
    assert fields.decode("数 café 😀 \u200d", Annotated[str, fields.text(50)], "name", ConfigError)
    assert fields.hidden("数 café 😀 \u200d") is None


def test_what_is_too_long_is_not_looked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Few:
        items: Annotated[tuple[Inner, ...], fields.length(0, 3)]

    monkeypatch.setattr(fields, "_check_keys", lambda value, kind, *_: None if kind is Few else pytest.fail("looked"))
    with pytest.raises(ConfigError, match="an array of 100000 items; expected an array of 0 to 3 items"):
        fields.decode({"items": [{}] * 100_000}, Few, "f", ConfigError)


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' occurs twice"),
        ('{"a": NaN}', "NaN is not JSON"),
        ("[-Infinity]", "-Infinity is not JSON"),
        ("1" * 401, "an integer of 401 digits"),
        ("[1e999]", "'1e999' is more than any number holds"),
        ("[-1e999]", "more than any number holds"),
        ('["\\ud800"]', "half of a surrogate pair"),
        ('{"\\uDFFF": 1}', "half of a surrogate pair"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ' * 100_000, "nested too deeply"),
        ('{"a": 1', "delimiter"),
        ("", "Expecting value"),
    ],
)
def test_json_is_read_strictly(document: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_json(document)
