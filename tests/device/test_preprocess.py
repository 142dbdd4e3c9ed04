"""All modalities of a model together: samples to arrays, and what files say about them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mope_deploy.errors import ConfigError, UsageError
from mope_deploy.preprocess import ImageSpec, Preprocessing
from tests.device import tiny

pytestmark = pytest.mark.device

PLAIN = Preprocessing(ImageSpec(4, 6, 4, 6, "squash", "nearest", (0.5,) * 3, (0.5,) * 3), None)


def test_collate(tmp_path: Path) -> None:
    preparing = tiny.preprocessing()
    tiny.picture(0, (9, 9)).save(tmp_path / "a.png")
    cached = preparing.load_image(tmp_path / "a.png")
    fresh = preparing.collate([{"image": tmp_path / "a.png", "text": "red"}, {"image": cached, "text": "the card"}])
    assert list(fresh) == ["pixel_values", "input_ids", "attention_mask"]
    np.testing.assert_array_equal(fresh["pixel_values"][0], fresh["pixel_values"][1])
    np.testing.assert_array_equal(fresh["pixel_values"][0], preparing.normalise(cached[None])[0])


def test_modalities_that_the_model_does_not_read() -> None:
    only_text = Preprocessing(None, tiny.TEXT, tiny.tokenizer_json())
    assert list(only_text.collate([{"text": "red"}])) == ["input_ids", "attention_mask"]
    with pytest.raises(UsageError, match="no images"):
        only_text.load_image(np.zeros((4, 6, 3), np.uint8))
    with pytest.raises(UsageError, match="no text"):
        PLAIN.encode_text(["red"])


def test_to_dict_and_back() -> None:
    for preparing in (tiny.preprocessing(), PLAIN, Preprocessing(None, tiny.TEXT, tiny.tokenizer_json())):
        through = json.loads(json.dumps(preparing.to_dict()))
        assert Preprocessing.from_dict(through, tokenizer=preparing.tokenizer) == preparing


def test_pickles_without_its_tokenizer_object() -> None:
    preparing = tiny.preprocessing()
    preparing.encode_text(["red"])
    copy = pickle.loads(pickle.dumps(preparing))
    assert copy == preparing
    np.testing.assert_array_equal(copy.encode_text(["red"])["input_ids"], preparing.encode_text(["red"])["input_ids"])


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ("image.height", 0, "image.height; received 0"),
        ("image.height", 8.0, "image.height"),
        ("image.height", True, "image.height; received True"),
        ("image.height", 10**9, "4,096"),
        ("image.crop_mode", "centre", "center, squash, border"),
        ("image.interpolation", "random", "bicubic"),
        ("image.mean", [0.5, 0.5], "3 numbers"),
        ("image.mean", [0.5, 0.5, float("nan")], "image.mean"),
        ("image.std", [0.5, 0.5, 0.0], "image.std"),
        ("image.heigth", 8, "did you mean 'height'"),
        ("image", [1], "JSON object"),
        ("text.max_length", "12", "text.max_length"),
        ("text.pad_id", -1, "text.pad_id"),
        ("text", {"max_length": 12}, "pad_id missing"),
        ("sound", None, "unknown key 'sound'"),
    ],
)
def test_from_dict_is_strict(place: str, value: Any, words: str) -> None:
    document = tiny.preprocessing().to_dict()
    *path, last = place.split(".")
    target = document
    for key in path:
        target = target[key]
    target[last] = value
    with pytest.raises(ConfigError, match="preprocess") as caught:
        Preprocessing.from_dict(document, tokenizer=tiny.tokenizer_json())
    assert words in str(caught.value)


def test_text_and_tokenizer_go_together() -> None:
    with pytest.raises(ConfigError, match="both"):
        Preprocessing(None, tiny.TEXT, None)
    with pytest.raises(ConfigError, match="both"):
        Preprocessing(tiny.IMAGE, None, tiny.tokenizer_json())
