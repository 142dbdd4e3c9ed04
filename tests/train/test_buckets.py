"""Batches of similar text lengths: less padding, every row once, an order that only seed and epoch decide."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import train.evaluation
from mope_deploy.preprocess import Preprocessing
from tests.tiny import tiny_model
from tests.train.conftest import write_rows
from tests.train.test_data import split_of
from train.config import Recipe
from train.data import Batches, LengthBuckets, MediaCache, Split
from train.evaluation import predict
from train.trainer import buckets

WORDS = ["red", "blue", "card", "shows", "a", "seven", "two"]


@pytest.fixture
def split(tiny: Path, tmp_path: Path) -> Split:
    """101 rows, 7 to a picture, with texts of 1 to 13 words, most of them short."""
    rng = np.random.default_rng(0)
    counts = np.minimum(1 + rng.geometric(0.3, 101), 13)
    image = str(next((tiny / "images").iterdir()))
    rows = [{"image": image, "text": " ".join(rng.choice(WORDS, n)), "label": "neutral"} for n in counts]
    return split_of(write_rows(tmp_path / "train.jsonl", rows).parent)


def batches_of(split: Split, preprocessing: Preprocessing) -> Batches:
    return Batches(split, MediaCache(preprocessing, limit_mb=1))


def test_an_epoch_has_every_row_once_and_less_padding(split: Split, tiny: Path) -> None:
    batches = batches_of(split, tiny_model(tiny / "vit", tiny / "bert").preprocessing)
    lengths = batches.text_lengths()
    assert lengths.tolist() == [len(batches.inputs(np.array([row]))["input_ids"][0]) for row in range(101)]

    def computed(order: list[int]) -> int:
        """Tokens that the text encoder reads, padding included."""
        parts = [order[i : i + 8] for i in range(0, 101, 8)]
        return sum(batches.inputs(np.array(part))["input_ids"].numel() for part in parts)

    sampler = LengthBuckets(lengths.tolist(), batch_size=8, seed=3)
    epochs = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
        assert sorted(epochs[-1]) == list(range(101)) != epochs[-1]
    assert epochs[0] != epochs[1]
    again = LengthBuckets(lengths.tolist(), batch_size=8, seed=3)
    again.set_epoch(1)
    torch.rand(3)  # the global state has no say
    assert list(again) == epochs[1]
    assert list(LengthBuckets(lengths.tolist(), batch_size=8, seed=9)) != epochs[0]
    real, random = int(lengths.sum()), computed(np.random.default_rng(0).permutation(101).tolist())
    assert all(computed(order) - real < 0.5 * (random - real) for order in epochs)


def test_predictions_come_in_the_order_of_the_rows(split: Split, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(tiny / "vit", tiny / "bert").eval()
    batches = batches_of(split, model.preprocessing)
    seen: list[int] = []
    monkeypatch.setattr(
        train.evaluation,
        "track",
        lambda loader, what: (seen.append(batch["inputs"]["input_ids"].shape[1]) or batch for batch in loader),
    )
    found = predict(model, batches, batch_size=9, device=torch.device("cpu"))
    assert seen == sorted(seen, reverse=True)
    assert seen[0] > 2 * seen[-1]
    with torch.no_grad():
        whole = model(batches.inputs(np.arange(101)))
    np.testing.assert_allclose(found.logits, whole.logits.numpy(), atol=2e-5)
    assert whole.routing is not None
    assert found.routing is not None
    np.testing.assert_allclose(found.routing, whole.routing.numpy(), atol=2e-5)
    assert np.abs(found.logits - found.logits[::-1]).max() > 1e-2


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), True),
        (("model.complementary.0.prompts=0",), False),
        (("model.complementary.0.prompts=0", "train.cache_y=false"), False),
        (("model.complementary.0.prompts=0", "train.bucket_by_length=true"), True),
        (("train.bucket_by_length=false",), False),
    ],
)
def test_where_texts_are_bucketed(recipe: Callable[..., Recipe], overrides: Any, expected: bool) -> None:
    assert buckets(recipe(*overrides)) is expected
