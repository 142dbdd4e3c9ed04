"""Sizes of an engine: parsed, checked against the bundle, and batches cut and padded to them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mope_deploy.bundle import Bundle
from mope_deploy.engines.tensorrt.profiles import Sizes, TopK, check_topk, chunks, make_profile, profile_shapes
from mope_deploy.errors import EngineError, UsageError
from mope_deploy.manifest import Manifest, TensorSpec
from tests.device import tiny
from tests.device.test_engines import feeds

pytestmark = pytest.mark.device


@pytest.fixture(scope="module")
def manifest(bundle_path: Any) -> Manifest:
    return Bundle.open(bundle_path).manifest


def test_sizes() -> None:
    assert Sizes.parse("1:4:16", axis="batch") == Sizes(1, 4, 16)
    assert Sizes.parse("7", axis="batch") == Sizes(7, 7, 7)
    assert str(Sizes(1, 4, 16)) == "1:4:16"


@pytest.mark.parametrize(
    "text", ["", ":", "1:2", "1:2:3:4", "-1:2:3", "1.0:2:3", "1: 2:3", "0:1:2", "3:2:4", "1:5:4", "１"]
)
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="--batch; received"):
        Sizes.parse(text, axis="batch")


def test_profile_of_a_bundle(manifest: Manifest) -> None:
    inputs = manifest.graphs[0].inputs
    assert make_profile(manifest, inputs) == {"batch": Sizes(1, 4, 16), "text_length": Sizes(1, 12, 12)}
    made = make_profile(manifest, inputs, batch="2:3:4", text_length="5:6:12")
    shapes = {spec.name: profile_shapes(spec, made) for spec in inputs}
    assert shapes["pixel_values"] == ((2, 3, 8, 8), (3, 3, 8, 8), (4, 3, 8, 8))
    assert shapes["input_ids"] == shapes["attention_mask"] == ((2, 5), (3, 6), (4, 12))
    assert profile_shapes(TensorSpec("x", "float32", (1, 3)), made) is None
    with pytest.raises(UsageError, match="this bundle cuts longer texts to 12 tokens"):
        make_profile(manifest, inputs, text_length="1:8:13")
    with pytest.raises(UsageError, match="no axis text_length"):
        make_profile(manifest, inputs[:1], text_length="1:8:12")
    with pytest.raises(EngineError, match="unknown meaning; received frames"):
        make_profile(manifest, [TensorSpec("x", "float32", ("frames",))])


def test_topk() -> None:
    profile = {"batch": Sizes(2, 4, 8), "text_length": Sizes(4, 8, 12)}
    check_topk([TopK("a", 4, 4), TopK("b", 4, "text_length"), TopK("c", 2, None), TopK("d", 2, "batch")], profile)
    with pytest.raises(
        UsageError, match=r"--text-len; received 4:8:12 .* expected a least size of 5, as TopK b takes 5"
    ):
        check_topk([TopK("b", 5, "text_length")], profile)
    with pytest.raises(UsageError, match="--batch"):
        check_topk([TopK("c", 3, None)], profile)  # an axis that varies and has no name may be either
    with pytest.raises(EngineError, match="K = 5 of 4 values"):
        check_topk([TopK("a", 5, 4)], profile)
    with pytest.raises(EngineError, match="K that is computed"):
        check_topk([TopK("a", -1, 4)], profile)


@pytest.mark.parametrize(
    ("batch", "length", "sizes"),
    [(1, 3, [1]), (4, 12, [4]), (5, 5, [4, 1]), (13, 7, [4, 4, 4, 1]), (8, 1, [4, 4])],
)
def test_chunks_give_the_numbers_of_the_whole(manifest: Manifest, batch: int, length: int, sizes: list[int]) -> None:
    """Through the oracle: what is padded changes nothing, what is cut comes back in order."""
    profile = {"batch": Sizes(2, 3, 4), "text_length": Sizes(5, 8, 12)}
    arrays = feeds(batch, length, seed=batch)
    want, got = tiny.oracle(arrays), []
    for chunk in chunks(arrays, manifest.graphs[0].inputs, profile, pad_id=0):
        rows, columns = chunk.feeds["input_ids"].shape
        assert 2 <= rows <= 4
        assert columns == max(length, 5)
        assert all(array.flags.c_contiguous and len(array) == rows for array in chunk.feeds.values())
        assert {name: array.dtype for name, array in chunk.feeds.items()} == {n: a.dtype for n, a in arrays.items()}
        got.append({name: array[: chunk.rows] for name, array in tiny.oracle(chunk.feeds).items()})
    assert [len(part["logits"]) for part in got] == sizes
    for name, array in want.items():
        np.testing.assert_allclose(np.concatenate([part[name] for part in got]), array, rtol=1e-12)


def test_padding_is_that_of_the_tokenizer(manifest: Manifest) -> None:
    (chunk,) = chunks(
        feeds(1, 2), manifest.graphs[0].inputs, {"batch": Sizes(1, 1, 1), "text_length": Sizes(4, 4, 4)}, pad_id=9
    )
    assert chunk.feeds["input_ids"][0, 2:].tolist() == [9, 9]
    assert chunk.feeds["attention_mask"][0, 2:].tolist() == [0, 0]


def test_a_text_too_long_for_the_engine(manifest: Manifest) -> None:
    profile = {"batch": Sizes(1, 1, 1), "text_length": Sizes(1, 4, 8)}
    with pytest.raises(UsageError, match=r"texts of 9 tokens; expected at most 8.*--text-len"):
        list(chunks(feeds(2, 9), manifest.graphs[0].inputs, profile))
