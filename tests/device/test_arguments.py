"""Arguments of another type than is documented: one line that names the argument, from every public function."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mope_deploy.arguments import check_flag, check_integer, check_path, check_text
from mope_deploy.bundle import Bundle
from mope_deploy.data import open_samples
from mope_deploy.engines import open_session
from mope_deploy.errors import MopeError, UsageError
from mope_deploy.predictor import Predictor, load
from tests.device import tiny

pytestmark = pytest.mark.device


@pytest.fixture(scope="module")
def predictor(bundle_path: Path) -> Predictor:
    return load(bundle_path, threads=1)


def one_line(call: Callable[[], Any], words: str, kind: type[MopeError] = UsageError) -> None:
    with pytest.raises(kind) as caught:
        call()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"threads": "2"}, "threads; received '2'; expected an integer from 1 to 512"),
        ({"threads": 2.0}, "threads; received 2.0"),
        ({"threads": True}, "threads; received True"),
        ({"threads": float("nan")}, "threads; received nan"),
        ({"engine": None}, "engine; received None; expected auto or tensorrt, onnxruntime"),
        ({"engine": ["auto"]}, "engine; received list"),
        ({"graph": 5}, "graph; received 5; expected the name of one"),
        ({"arena": 1}, "arena; received 1; expected True or False"),
        ({"arena": "no"}, "arena; received 'no'"),
        ({"rebuild": "yes"}, "rebuild; received 'yes'"),
        ({"verify": 0}, "verify; received 0"),
        ({"cache_mb": 1.5}, "cache_mb; received 1.5; expected an integer from 0 to 1,048,576"),
        ({"providers": [5]}, "providers; received 5; expected a list of names"),
        ({"providers": "cpu"}, "providers; received 'cpu'"),
        ({"providers": 5}, "providers; received 5"),
        ({"providers": [("cpu",)]}, "providers; received an array of 1 items"),
        ({"providers": [("cpu", 5)]}, "providers; received an array of 2 items"),
        ({"providers": {"cpu": {}}}, "providers; received an object"),
    ],
)
def test_load(bundle_path: Path, given: dict[str, Any], words: str) -> None:
    one_line(lambda: load(bundle_path, **given), words)
    if "verify" not in given:
        one_line(lambda: open_session(Bundle.open(bundle_path), **given), words)


@pytest.mark.parametrize("path", [None, 5, b"bundle", "", "a\0b", io.StringIO("bundle"), ["bundle"], np.float32(1)])
def test_a_path(path: Any) -> None:
    for call in (load, Bundle.open):
        one_line(lambda call=call: call(path), "the bundle; received")


def test_numpy_numbers_pass(bundle_path: Path) -> None:
    predictor = load(bundle_path, threads=np.int64(1), arena=np.bool_(True), cache_mb=np.uint8(8), providers=("cpu",))
    found = predictor.predict(image=[tiny.picture(1, (8, 8))] * 3, text="red", batch_size=np.int32(2), routing=np.True_)
    assert len(found) == 3


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"batch_size": 2.0}, "batch_size; received 2.0; expected an integer of at least 1"),
        ({"batch_size": "2"}, "batch_size; received '2'"),
        ({"batch_size": True}, "batch_size; received True"),
        ({"batch_size": 0}, "batch_size; received 0"),
        ({"routing": "yes"}, "routing; received 'yes'; expected True or False"),
        ({"image": 5}, "image"),
        ({"image": io.BytesIO(b"x")}, "received BytesIO; expected a path"),
        ({"image": {"a": 1}}, "image"),
        ({"image": iter([])}, "image"),
        ({"image": np.full((8, 8, 3), np.nan)}, "float64 (8, 8, 3)"),
        ({"image": np.zeros((2, 8, 8, 3), np.uint8)}, "(2, 8, 8, 3)"),
        ({"image": [tiny.picture(1, (8, 8)), object()]}, "image[1]: image; received object"),
        ({"text": 5}, "text; received int"),
        ({"text": np.array(["a"])}, "text; received ndarray"),
        ({"text": ["red", None]}, "text[1]"),
        ({"text": iter(["red"])}, "text; received"),
    ],
)
def test_predict(predictor: Predictor, given: dict[str, Any], words: str) -> None:
    one_line(lambda: predictor.predict(**{"image": tiny.picture(1, (8, 8)), "text": "red", **given}), words, MopeError)


def test_predict_batches(predictor: Predictor, data_file: Path) -> None:
    samples = open_samples(data_file)
    for given, words in (
        ({"batch_size": 0}, "batch_size; received 0"),
        ({"batch_size": 1.0}, "batch_size; received 1.0"),
        ({"routing": None}, "routing; received None"),
    ):
        one_line(lambda given=given: predictor.predict_batches(samples, **given), words)
    one_line(lambda: predictor.predict_batches(data_file), "samples; received PosixPath; expected rows")
    one_line(lambda: predictor.predict_batches(str(data_file)), "samples; received str")
    one_line(lambda: predictor.predict_batches(None), "samples; received NoneType")
    one_line(lambda: list(predictor.predict_batches([{"image": 1}])), "samples; received a dict among them")


IDS = np.ones((2, 4), np.int64)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"attention_mask": [[1, 1, 0, 0], [0, 0, 0, 0]]}, "text_length; received row 1 starts with padding"),
        ({"attention_mask": [[0, 1, 1, 1], [1, 1, 1, 1]]}, "row 0 starts with padding; expected 1 for what is real"),
        ({"attention_mask": [[1, 1, 1, 1], [1, 0, 1, 0]]}, "row 1 goes on after padding"),
        ({"pixel_values": np.full((2, 3, 8, 8), np.nan, np.float32)}, "pixel_values; received NaN or infinity"),
        ({"pixel_values": np.full((2, 3, 8, 8), np.inf, np.float32)}, "pixel_values; received NaN or infinity"),
        ({"pixel_values": np.zeros((2, 3, 8, 8), np.float16)}, "received float16"),
        ({"pixel_values": None}, "received NoneType; expected a numpy array"),
        ({5: IDS}, "received 5, attention_mask"),
    ],
)
def test_arrays_of_a_session(predictor: Predictor, arrays: dict[Any, Any], words: str) -> None:
    feeds = {"pixel_values": np.zeros((2, 3, 8, 8), np.float32), "input_ids": IDS, "attention_mask": IDS}
    given = {name: np.array(value) if isinstance(value, list) else value for name, value in arrays.items()}
    one_line(lambda: predictor.session.run({**feeds, **given}), words)
    one_line(lambda: predictor.session.run(list(feeds)), "inputs of the graph; received list")
    one_line(lambda: predictor.session.run(feeds, "logits"), "outputs; received 'logits'")


def test_preprocessing() -> None:
    made = tiny.preprocessing()
    picture = made.load_image(tiny.picture(1, (8, 8)))
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: made.collate("red"), "samples; received 'red'; expected a list"),
        (lambda: made.collate([]), "samples; received an array of 0 items"),
        (lambda: made.collate({"image": picture}), "samples; received an object"),
        (lambda: made.collate([picture]), "among them; expected a list of a dict each"),
        (lambda: made.load("smell", "a"), "modality; received 'smell'; expected one of image, text"),
        (lambda: made.load("audio", "a"), "this model reads no audio"),
        (lambda: made.load(5, "a"), "modality; received 5"),
        (lambda: made.arrays("image", picture), "items of image; received ndarray"),
        (lambda: made.arrays("image", [picture / np.float32(255)]), "array of image; received float32; expected uint8"),
        (lambda: made.arrays("image", [picture[:4]]), "received uint8 (1, 4, 8, 3); expected uint8 (B, 8, 8, 3)"),
        (lambda: made.arrays("image", [picture, picture[:4]]), "shapes (8, 8, 3), (4, 8, 3)"),
        (lambda: made.arrays("image", ["a.png"]), "array of image; received 'a.png'"),
        (lambda: made.encode_text("red"), "texts; received 'red'"),
        (lambda: made.encode_text(iter(["red"])), "texts; received list_iterator"),
        (lambda: made.encode_text(["red"], pad_to="8"), "pad_to; received '8'"),
        (lambda: made.encode_text(["red"], pad_to=8.0), "pad_to; received 8.0"),
    ]
    for call, words in cases:
        one_line(call, words)
    assert made.encode_text(["red"], pad_to=np.int64(8))["input_ids"].shape == (1, 8)


def test_the_checks_themselves() -> None:
    assert type(check_integer("n", np.int16(3), 0)) is int
    assert type(check_flag("f", np.False_)) is bool
    assert check_path("p", Path("a"), expected="a path") == Path("a")
    assert check_text("t", "a", expected="a name") == "a"
    one_line(lambda: check_integer("n", 10**400, 0, 5), "n; received a huge integer; expected an integer from 0 to 5")
