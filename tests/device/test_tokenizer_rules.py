"""Rules of a ``tokenizer.json`` that would take all memory or all time are refused before the library has them."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from mope_deploy.bundle import Bundle
from mope_deploy.errors import BundleError, ConfigError, MediaError
from mope_deploy.preprocess import Preprocessing, TextSpec
from tests.device import tiny
from tests.device.damage import exchange

pytestmark = pytest.mark.device


def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def sequence(*rules: dict[str, Any], key: str = "normalizers") -> dict[str, Any]:
    return {"type": "Sequence", key: list(rules)}


def table(longest: int) -> dict[str, Any]:
    data = (0).to_bytes(4, "little") + b"ab\0" + b"x" * longest + b"\0"
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}


def deep(levels: int) -> dict[str, Any]:
    rule: dict[str, Any] = {"type": "Lowercase"}
    for _ in range(levels):
        rule = sequence(rule)
    return rule


def tokenizer(**changes: Any) -> str:
    document = json.loads(tiny.tokenizer_json())
    document["model"] |= changes.pop("model", {})
    return json.dumps(document | changes)


def reader(text: str) -> Preprocessing:
    made = Preprocessing(None, TextSpec(12, 0), text)
    made.check_tokenizer()
    return made


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"normalizer": replace({"String": "e"}, "e" * 65)}, "65 times as long"),
        ({"normalizer": replace({"Regex": "e"}, "e" * 64)}, "65 times as long"),
        ({"normalizer": replace({"String": ""}, "e" * 64)}, "65 times as long"),
        ({"normalizer": sequence(*[replace({"String": "e"}, "ee")] * 20)}, "128 times as long"),
        ({"normalizer": sequence(sequence(*[replace({"Regex": "e"}, "e")] * 4), *[deep(3)] * 4, table(65))}, "times"),
        ({"normalizer": table(100_000)}, "100,000 times as long"),
        ({"normalizer": {"type": "Prepend", "prepend": "e" * 100}}, "101 times as long"),
        ({"pre_tokenizer": sequence(replace({"String": "e"}, "e" * 99), key="pretokenizers")}, "99 times as long"),
        ({"normalizer": deep(60)}, "nested too deeply"),
        ({"model": {"max_input_chars_per_word": 10**9}}, "10,000 at most"),
        ({"model": {"dropout": 0.1}}, "model.dropout; received 0.1"),
    ],
)
def test_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        reader(tokenizer(**changes))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "normalizer",
    [
        None,
        sequence({"type": "Prepend", "prepend": "▁"}, replace({"String": " "}, "▁")),  # Llama
        sequence(replace({"String": "``"}, '"'), {"type": "NFKD"}, replace({"Regex": " {2,}"}, " ")),  # ALBERT
        sequence({"type": "NFC"}, replace({"Regex": "\\s+"}, " "), {"type": "Lowercase"}),  # CLIP
        sequence(*[replace({"Regex": "[0-9]"}, "0")] * 6),
    ],
)
def test_taken(normalizer: dict[str, Any] | None) -> None:
    assert reader(tokenizer(normalizer=normalizer)).encode_text(["the card is red"])["input_ids"].shape[0] == 1


def test_a_text_may_not_grow_without_limit() -> None:
    made = reader(tokenizer(normalizer=replace({"String": "e"}, "e" * 64)))
    made.check_text("the card " * 10)
    with pytest.raises(MediaError, match="after the tokenizer's rules"):
        made.check_text("the card " * 100_000)


@pytest.mark.parametrize("bad", [b"[", b"[]", b"{}", b"[" * 100_000, b"\xff", b'{"a": NaN}'])
def test_bundles_say_it_too(bundle_copy: Path, bad: bytes) -> None:
    exchange(bundle_copy, "tokenizer.json", bad)
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        _ = Bundle.open(bundle_copy).preprocessing
