"""Batches of similar text lengths: less padding, every row once, an order that only seed and epoch decide."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import train.evaluation
from tests.tiny import tiny_model
from tests.train.tools import NOUNS, split_of, write_rows
from train.config import Recipe
from train.data import Batches, EpochOrder, MediaCache, Split
from train.evaluation import predict
from train.loop import buckets


@pytest.fixture
def split(tiny: Path, tmp_path: Path) -> Split:
    """101 rows, 7 to a picture, with texts of 1 to 13 words, most of them short."""
    rng = np.random.default_rng(0)
    counts = np.minimum(1 + rng.geometric(0.3, 101), 13)
    image = str(next((tiny / "images").iterdir()))
    rows = [{"image": image, "text": " ".join(rng.choice(NOUNS, n)), "label": "neutral"} for n in counts]
    return split_of(write_rows(tmp_path / "train.jsonl", rows).parent)


def test_an_epoch_has_every_row_once_and_less_padding(split: Split, media: MediaCache) -> None:
    batches = Batches(split, media)
    lengths = batches.text_lengths()
    assert lengths.tolist() == [len(batches.inputs(np.array([row]))["input_ids"][0]) for row in range(101)]

    def computed(order: list[int]) -> int:
        """Tokens that the text encoder reads, padding included."""
        parts = [order[i : i + 8] for i in range(0, 101, 8)]
        return sum(batches.inputs(np.array(part))["input_ids"].numel() for part in parts)

    def order(epoch: int, *, seed: int = 3, plain: bool = False) -> list[int]:
        torch.rand(3)  # the global state has no say
        made = EpochOrder(101, batch_size=8, seed=seed, lengths=None if plain else lengths.tolist())
        made.epoch = epoch
        return list(made)

    for plain in (False, True):
        epochs = [order(epoch, plain=plain) for epoch in range(2)]
        assert all(sorted(rows) == list(range(101)) != rows for rows in epochs)
        assert epochs[0] != epochs[1] == order(1, plain=plain)
        assert order(0, seed=9, plain=plain) != epochs[0]
    epochs = [order(epoch) for epoch in range(2)]
    real, random = int(lengths.sum()), computed(np.random.default_rng(0).permutation(101).tolist())
    assert all(computed(rows) - real < 0.5 * (random - real) for rows in epochs)


def test_predictions_come_in_the_order_of_the_rows(split: Split, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(tiny / "vit", tiny / "bert").eval()
    batches = Batches(split, MediaCache(model.preprocessing, limit_mb=1))
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
