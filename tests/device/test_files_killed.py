"""Files and folders stand kill -9 at every operation, and the next writer leaves nothing of a dead one behind."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.reliability.kills import count, run_killed
from mope_deploy.files import recover
from mope_deploy.files.locks import take
from tests.device.test_files import exchange, fill, quick, state, write

__all__ = ["exchange", "quick"]  # fixtures

pytestmark = pytest.mark.device


@pytest.mark.usefixtures("exchange")
@pytest.mark.parametrize("make", [write, fill])
def test_a_kill_at_any_operation_leaves_the_old_or_the_new_one(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "wanted")
    new = state(tmp_path / "wanted")
    kills, step, killed = 0, 0, True
    while killed:
        folder = tmp_path / str(step)
        folder.mkdir()
        target = folder / "target"
        if make is write:
            target.write_text("old")
        else:
            target.mkdir()
            (target / "file").write_text("old")
        old = state(target)
        killed = run_killed(lambda target=target: make(target), at=step, below=folder)
        recover(target)
        assert state(target) in (old, new)
        make(target)
        assert [path.name for path in folder.iterdir()] == ["target"]
        kills, step = kills + killed, step + 1
    assert kills >= 5


def test_a_folder_without_exchange_is_put_back_when_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the two renames nothing stands at its name."""
    monkeypatch.setattr("mope_deploy.files.place._exchange", lambda *_: False)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    gone = 0
    for step in range(count(lambda: _replace(tmp_path / "a"), below=tmp_path)):
        folder = tmp_path / str(step)
        folder.mkdir()
        assert run_killed(lambda folder=folder: _replace(folder / "a"), at=step, below=folder)
        if (folder / ".made").exists() and not (folder / "a").exists():
            gone += 1
            recover(folder / "a")
            assert state(folder / "a") == {"file": "old"}
    assert gone == 1


def test_what_a_living_writer_works_on_is_let_be(tmp_path: Path) -> None:
    """Two writers of one name: neither takes the other's away, and the last one wins."""
    left, other = tmp_path / ".target.0123abcd.tmp", tmp_path / ".target.other.tmp"
    for path in (left, other):
        path.mkdir()
    lock = take(left)
    assert lock is not None
    fill(tmp_path / "target")
    assert left.exists()
    lock.release()
    fill(tmp_path / "target")
    assert sorted(path.name for path in tmp_path.iterdir()) == [other.name, "target"], "only names of ours are swept"


def _replace(path: Path) -> None:
    path.mkdir()
    (path / "file").write_text("old")
    (path.parent / ".made").touch()
    fill(path)
