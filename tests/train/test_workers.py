"""Processes that prepare batches change no bit, need no shared memory, and say in one line what went wrong."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from mope_deploy.errors import DataError, MopeError
from tests.train.tools import assert_same, read_rows, resumed, signal_at, split_of, trained, weights, write_rows
from train.config import Recipe
from train.data import Batches, MediaCache, made_by_workers
from train.run import Outcome

Make = Callable[..., Recipe]
pytestmark = pytest.mark.usefixtures("no_pictures")


def test_the_same_bits_for_any_number_of_workers_resumed_or_not(
    recipe: Make, finished: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three epochs, interrupted in the second one and continued by another number of them."""
    with monkeypatch.context() as patch:
        signal_at(patch, 9, signal.SIGTERM)
        first = trained(recipe("data.workers=1", "data.group_by=template"))
    assert first.status == "interrupted"
    assert resumed(first.run, "data.workers=2").evaluation == finished.evaluation
    assert_same(weights(first.run), weights(finished.run))


def test_batches_of_workers_come_without_shared_memory(
    tiny: Path, media: MediaCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container's /dev/shm is often full; torch then loses the batch and waits for it for ever."""

    def full(*_: object) -> None:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", full)
    split = split_of(tiny)
    batches = Batches(split, media, y={"text": torch.rand(len(split.values["text"]), 3)})
    one, two = (
        list(DataLoader(batches, batch_size=25, collate_fn=Batches.ready, num_workers=n, timeout=20 * n))  # type: ignore[arg-type]
        for n in (0, 1)
    )
    assert [sorted(batch) for batch in one] == [["inputs", "labels", "y"]] * 3
    for a, b in zip(one, two, strict=True):
        assert_same(a["inputs"] | a["y"] | {"labels": a["labels"]}, b["inputs"] | b["y"] | {"labels": b["labels"]})


@pytest.mark.parametrize("workers", [0, 1])
def test_a_row_that_a_worker_cannot_use_is_one_line(recipe: Make, tiny: Path, tmp_path: Path, workers: int) -> None:
    rows = [row | {"image": str(tiny / row["image"])} for row in read_rows(tiny / "train.jsonl")]
    (tmp_path / "bad.png").write_bytes(b"no picture")
    file = write_rows(tmp_path / "train.jsonl", [*rows, rows[0] | {"image": str(tmp_path / "bad.png")}])
    with pytest.raises(DataError) as caught:
        trained(recipe(f"data.train={file}", "data.check_images=false", f"data.workers={workers}", "train.epochs=1"))
    assert str(caught.value).startswith(f"{file}:61: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OSError(28, "No space left on device"),
            "2 processes that prepare batches cannot be started; received No space",
        ),
        (
            RuntimeError("DataLoader worker (pid 5) is killed by signal: Killed."),
            "a process that prepares batches died",
        ),
    ],
)
def test_workers_that_cannot_live_are_one_line(error: Exception, said: str) -> None:
    def batches() -> Any:
        yield {}
        raise error

    with pytest.raises(MopeError, match=f"{said}.*data.workers=0"):
        list(made_by_workers(batches(), workers=2))
    with pytest.raises(type(error)):
        list(made_by_workers(batches(), workers=0))
