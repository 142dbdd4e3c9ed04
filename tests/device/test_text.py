"""Everything between a text and the encoder's arrays."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from mope_deploy import limits
from mope_deploy.errors import ConfigError, MediaError, UsageError
from mope_deploy.preprocess import Preprocessing, TextSpec
from tests.device import tiny

pytestmark = pytest.mark.device


def test_encode_text() -> None:
    found = tiny.preprocessing().encode_text(["the card", "Red", "café xyz 数"])
    v = tiny.VOCABULARY
    assert found["input_ids"].dtype == found["attention_mask"].dtype == np.int64
    assert found["input_ids"].tolist() == [
        [2, v["the"], v["card"], 3, 0],
        [2, v["red"], 3, 0, 0],
        [2, v["café"], 1, v["数"], 3],
    ]
    assert found["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]


def test_pad_to() -> None:
    found = tiny.preprocessing().encode_text(["red"], pad_to=tiny.MAX_LENGTH)
    assert found["input_ids"].shape == (1, tiny.MAX_LENGTH)
    assert found["attention_mask"].sum() == 3
    for wrong in (2, tiny.MAX_LENGTH + 1):
        with pytest.raises(UsageError, match=str(wrong)):
            tiny.preprocessing().encode_text(["red"], pad_to=wrong)


def test_long_text_is_cut_with_its_special_tokens_kept() -> None:
    cut = []
    found = tiny.preprocessing().encode_text(["red", "red " * 10_000], on_truncate=lambda *call: cut.append(call))
    assert found["input_ids"].shape == (2, tiny.MAX_LENGTH)
    assert found["input_ids"][1].tolist() == [2, *[tiny.VOCABULARY["red"]] * 10, 3]
    assert cut == [(1, 10_002)]
    exact = []
    tiny.preprocessing().encode_text(["red " * (tiny.MAX_LENGTH - 2)], on_truncate=lambda *call: exact.append(call))
    assert exact == []


def test_the_specification_overrules_the_tokenizer_file() -> None:
    """Truncation and padding saved inside tokenizer.json belong to whoever saved it."""
    tokenizer = json.loads(tiny.tokenizer_json())
    tokenizer["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    tokenizer["padding"] = {
        "strategy": {"Fixed": 20},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 5,
        "pad_type_id": 0,
        "pad_token": "[SEP]",
    }
    altered = Preprocessing(tiny.IMAGE, tiny.TEXT, json.dumps(tokenizer))
    texts = ["the card is red", "red"]
    for name, array in tiny.preprocessing().encode_text(texts).items():
        np.testing.assert_array_equal(altered.encode_text(texts)[name], array)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        (" \t\n", "empty"),
        ("red\0card", "NUL"),
        ("red \ud800", "surrogate"),
        ("a" * (limits.MAX_TEXT_CHARS + 1), "1,000,001 characters"),
        (None, "NoneType"),
        (7, "int"),
    ],
)
def test_unusable_text(text: Any, words: str) -> None:
    with pytest.raises(MediaError, match=words) as caught:
        tiny.preprocessing().encode_text(["red", text])
    assert len(str(caught.value)) < 300
    with pytest.raises(MediaError, match=words):
        tiny.preprocessing().check_text(text)


def test_a_list_is_asked_for() -> None:
    for wrong in ("red", []):
        with pytest.raises(UsageError):
            tiny.preprocessing().encode_text(wrong)


@pytest.mark.parametrize("tokenizer", ["", "{}", "[" * 1000, tiny.tokenizer_json()[:-50]])
def test_damaged_tokenizer(tokenizer: str) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json cannot be read") as caught:
        Preprocessing(tiny.IMAGE, tiny.TEXT, tokenizer).check_tokenizer()
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_fails_on_a_word() -> None:
    tokenizer = tiny.tokenizer_json().replace('"[UNK]":1', '"other":1')
    damaged = Preprocessing(tiny.IMAGE, tiny.TEXT, json.dumps(json.loads(tokenizer)))
    assert damaged.encode_text(["red"])["input_ids"].shape == (1, 3)
    if "[UNK]" in json.loads(tokenizer)["model"]["vocab"]:
        pytest.fail("the tokenizer was not damaged")
    with pytest.raises(MediaError, match="text cannot be tokenised; received 'unheard-of'"):
        damaged.encode_text(["unheard-of"])


def test_a_tokenizer_that_panics() -> None:
    """Damage can make its Rust code panic, which Python sees as no Exception at all."""
    tokenizer = json.loads(tiny.tokenizer_json())
    tokenizer["post_processor"]["special_tokens"].pop("[SEP]")
    damaged = Preprocessing(tiny.IMAGE, tiny.TEXT, json.dumps(tokenizer))
    with pytest.raises((MediaError, ConfigError)):
        damaged.encode_text(["red"])


def test_max_length_leaves_room_for_a_word() -> None:
    with pytest.raises(ConfigError, match="special"):
        Preprocessing(None, TextSpec(2, 0), tiny.tokenizer_json()).check_tokenizer()
