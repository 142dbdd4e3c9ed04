"""What may be exported, and one clear line for everything else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from export.source import find_source
from mope_deploy.errors import CheckpointError, MopeError, UsageError
from tests.export.runs import write_data


def fake_run(folder: Path, **changes: object) -> Path:
    (folder / "best").mkdir(parents=True)
    (folder / "best" / "config.json").write_text("{}")
    (folder / "best" / "model.safetensors").write_bytes(b"")
    data = folder.parent / "data"
    if not data.exists():
        write_data(data, rows=3)
    description = {
        "schema": 1,
        "status": "finished",
        "checkpoint": "best",
        "data": {"test": str(data / "test.jsonl"), "validation": str(data / "test.jsonl")},
    }
    (folder / "run.json").write_text(json.dumps(description | changes))
    return folder


def test_a_run_brings_its_best_checkpoint_and_its_test_split(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "mine")
    source = find_source(run)
    assert source.name == "mine"
    assert source.checkpoint == str(run / "best")
    assert source.data == tmp_path / "data" / "test.jsonl"


def test_data_inside_the_run_is_found_relative_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = fake_run(tmp_path / "mine", data={"test": None, "validation": "split/validation.jsonl"})
    (run / "split").mkdir()
    (run / "split" / "validation.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    assert find_source("mine").data.resolve() == run / "split" / "validation.jsonl"


def test_one_checkpoint_of_a_run_even_if_it_is_unfinished(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "mine", status="interrupted")
    source = find_source(run / "best")
    assert (source.name, source.checkpoint) == ("mine", str(run / "best"))
    assert source.data == tmp_path / "data" / "test.jsonl"


def test_a_checkpoint_on_its_own_needs_data(tmp_path: Path) -> None:
    checkpoint = fake_run(tmp_path / "mine").joinpath("best").rename(tmp_path / "alone")
    with pytest.raises(UsageError, match=r"comes without data .* add --data"):
        find_source(checkpoint)
    data = tmp_path / "data" / "test.jsonl"
    assert find_source(checkpoint, data=data).data == data
    assert find_source(checkpoint, data=data).name == "alone"


def test_a_hub_id_needs_data(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="comes without data"):
        find_source("someone/mope-food")
    data = write_data(tmp_path / "data", rows=3)
    source = find_source("someone/mope-food", data=data)
    assert (source.name, source.checkpoint) == ("mope-food", "someone/mope-food")


def test_other_data_than_the_runs_own(tmp_path: Path) -> None:
    run, other = fake_run(tmp_path / "mine"), write_data(tmp_path / "other", rows=3)
    assert find_source(run, data=other).data == other


@pytest.mark.parametrize("status", ["running", "interrupted", "failed", None])
def test_an_unfinished_run_says_how_to_go_on(tmp_path: Path, status: str | None) -> None:
    run = fake_run(tmp_path / "mine", status=status)
    with pytest.raises(CheckpointError, match=r"is not finished; received status .*--resume .*mine/best") as error:
        find_source(run)
    assert error.value.exit_code == 1


def test_wrong_things_are_named(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "manifest.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    (tmp_path / "runs").mkdir()
    fake_run(tmp_path / "runs" / "one")
    (tmp_path / "file.txt").write_text("x")
    cases = {
        "bundle": (UsageError, "is a bundle, exported already"),
        "empty": (UsageError, "received an empty folder"),
        "runs": (UsageError, "did you mean .*runs/one?"),
        "file.txt": (UsageError, "is a file"),
        "nowhere/at/all": (UsageError, "there is nothing at"),
    }
    for name, (kind, message) in cases.items():
        with pytest.raises(kind, match=message) as error:
            find_source(tmp_path / name)
        assert error.value.exit_code == 2
        assert "\n" not in str(error.value)


def test_damaged_runs_are_named(tmp_path: Path) -> None:
    cut = fake_run(tmp_path / "cut")
    (cut / "run.json").write_text('{"schema": 1, "sta')
    newer = fake_run(tmp_path / "newer", schema=2)
    bare = fake_run(tmp_path / "bare")
    (bare / "best" / "model.safetensors").unlink()
    moved = fake_run(tmp_path / "moved", data={"test": str(tmp_path / "gone.jsonl")})
    without = fake_run(tmp_path / "without", data={})
    for run, message in (
        (cut, "run.json cannot be read"),
        (newer, "schema; received 2; expected 1"),
        (bare, "has no checkpoint best"),
        (moved, r"is not at .*gone\.jsonl any more; give its place: --data"),
        (without, "comes without data"),
    ):
        with pytest.raises(MopeError, match=message):
            find_source(run)
    with pytest.raises(UsageError, match=r"--data .* is not a file"):
        find_source(fake_run(tmp_path / "fine"), data=tmp_path / "no.jsonl")
