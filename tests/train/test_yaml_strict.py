"""YAML that strangers wrote: read as it is written, or refused in one line, at once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mope_deploy.errors import ConfigError, UsageError
from mope_deploy.fields import parse_json
from mope_deploy.limits import MAX_DIGITS
from train.recipe import check_recipe, read_recipe
from train.yaml_strict import YamlError, dump_yaml, load_yaml

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(8)
)
MERGED = "a: &a {k: 1}\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} {{<<: [{','.join(['*' + chr(97 + i)] * 9)}]}}\n" for i in range(8)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "more than 200,000 values"),
        (MERGED, "more than 200,000 values"),
        ("a: &a [*a]", "contains itself"),
        ("a: &a {b: *a}", "contains itself"),
        ("&a ? *a : 1", ""),
        ("a: *b", "undefined alias"),
        ("a: !!timestamp x", "tags are not taken"),
        ("a: !!float x", "tags are not taken"),
        ("a: !!int ''", "tags are not taken"),
        ("a: !!python/object:os.system x", "tags are not taken"),
        ("a: !!binary x", "tags are not taken"),
        ("a: ! x", "tags are not taken"),
        ("!!map {a: 1}", "tags are not taken"),
        ("!!set {a, b}", "tags are not taken"),
        ("a: " + "9" * 5000, "an integer of 5,000 digits"),
        ("a: 1" + ":1" * 5000, "digits"),
        ("a: 0x" + "f" * 5000, "digits"),
        ("a: 1e999", "more than any number holds"),
        ('a: "\\ud800"', "control character"),
        ('a: "\\e[2J"', "control character"),
        ('"\\u202e": 1', "control character"),
        ("a: \x1b", ""),
        ("a: 1\na: 2", "given twice"),
        ("1: 2", "no string"),
        ("{[a]: 1}", ""),
        ("? {a: b}\n: c", ""),
        ("a: 1\n---\nb: 2", "another document"),
        ("[" * 100_000, "nested too deeply"),
        ("{a: " * 100_000, "nested too deeply"),
        ("- " * 100_000, ""),
        ("a: [1,", ""),
        ("%YAML 9.9\n---\na: 1", ""),
    ],
    ids=lambda value: value[:20],
)
def test_refused_in_one_line(text: str, words: str) -> None:
    with pytest.raises(YamlError) as caught:
        load_yaml(text)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 300


def test_as_it_is_written() -> None:
    text = "a: 3e-4\nb: 2001-99-99\nc: 2001-01-01\nd: =\ne: [&x {f: 1}, *x]\nf: 'no'\ng: 1:30\nh: null\ni: ~\nj: -7"
    found = load_yaml(text)
    assert found["a"] == 3e-4
    assert (found["b"], found["c"], found["d"]) == ("2001-99-99", "2001-01-01", "=")
    assert found["e"] == [{"f": 1}, {"f": 1}]
    assert (found["f"], found["h"], found["i"], found["j"]) == ("no", None, None, -7)
    for value in ("2001-01-01", "1e5", "=", "<<", "1:30", "no", "0x1f", "数", "1_000"):
        assert load_yaml(dump_yaml({value: value})) == {value: value}
    assert load_yaml("") is None


def test_a_merge_key_is_a_key_like_any_other() -> None:
    assert load_yaml("a: {<<: {b: 1}}") == {"a": {"<<": {"b": 1}}}


def test_recipes_are_regular_files_of_a_stated_size(tmp_path: Path) -> None:
    large = tmp_path / "large.yaml"
    with large.open("wb") as file:
        file.truncate(2**20 + 1)
    with pytest.raises(ConfigError, match="too large"):
        read_recipe(str(large))
    (tmp_path / "bomb.yaml").write_text(BOMB)
    with pytest.raises(ConfigError, match="values"):
        read_recipe(str(tmp_path / "bomb.yaml"))
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(UsageError, match="no recipe"):
        read_recipe(str(tmp_path / "pipe.yaml"))


def test_of_very_many_problems_the_first_are_named() -> None:
    data = {f"k{i}": 1 for i in range(3000)}
    with pytest.raises(ConfigError, match=r"unknown key data\.k0\n(.|\n)*2,961 more") as caught:
        check_recipe({"name": "a", "data": data}, what="recipe")
    assert str(caught.value).count("\n") == 41


@pytest.mark.parametrize("value", ["!!float x", "!!timestamp x", "[" * 5000, "&a [*a]", "1e999", "9" * 5000])
def test_overrides_are_read_by_the_same_rules(value: str) -> None:
    with pytest.raises(ConfigError, match="expected a YAML value"):
        check_recipe({"name": "a"}, [f"train.epochs={value}"], what="recipe")


def test_yaml_and_json_have_integers_of_equal_length() -> None:
    most = "9" * MAX_DIGITS
    assert load_yaml(most) == parse_json(most) == int(most)
    for read in (load_yaml, parse_json):
        with pytest.raises(ValueError, match=f"an integer of {MAX_DIGITS + 1} digits"):
            read(most + "9")
