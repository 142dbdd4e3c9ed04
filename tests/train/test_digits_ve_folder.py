"""digits-ve on disk: the same bytes from the same seed; whole, or not there; nothing else is touched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mope_deploy.console import run_app
from mope_deploy.errors import DataError, UsageError
from tests.train.tools import read_rows
from train.embedded.digits_ve import ensure_digits_ve, generate
from train.embedded.digits_ve.cli import app

SMALL = {"train_pairs": 60, "validation_pairs": 12, "test_pairs": 12}


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    one, two = (ensure_digits_ve(tmp_path / name, seed=7, **SMALL) for name in ("one", "two"))
    other = ensure_digits_ve(tmp_path / "other", seed=8, **SMALL)
    assert _bytes(one) == _bytes(two)
    assert _bytes(one)["train.jsonl"] != _bytes(other)["train.jsonl"]
    assert _bytes(one)["images/train/000001.png"] != _bytes(other)["images/train/000001.png"]


def test_layout(tmp_path: Path) -> None:
    folder = ensure_digits_ve(tmp_path / "new" / "digits-ve", **SMALL)
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["images", "info.json", "scenes.jsonl", "test.jsonl", "train.jsonl", "validation.jsonl"]
    )
    rows = read_rows(folder / "train.jsonl")
    assert len(rows) == 60
    assert set(rows[0]) == {"image", "text", "label", "template"}
    assert (folder / rows[0]["image"]).is_file()
    info = json.loads((folder / "info.json").read_text())
    assert info["pairs"] == {"train": 60, "validation": 12, "test": 12}
    assert {"version", "seed", "source", "licence"} <= set(info)


def test_a_whole_folder_is_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ensure_digits_ve(tmp_path / "data", **SMALL)
    monkeypatch.setattr(generate, "render", _never)
    assert ensure_digits_ve(folder, **SMALL) == folder


def _never(*_: object) -> None:
    raise AssertionError("made again")


@pytest.mark.parametrize("change", [{"seed": 1}, {"train_pairs": 63}])
def test_another_data_set_is_refused_and_untouched(tmp_path: Path, change: dict[str, int]) -> None:
    folder = ensure_digits_ve(tmp_path / "data", **SMALL)
    before = _bytes(folder)
    with pytest.raises(UsageError, match=r"holds another digits-ve; received .*; expected"):
        ensure_digits_ve(folder, **{**SMALL, **change})
    assert _bytes(folder) == before


@pytest.mark.parametrize("content", ["notes.txt", "info.json"])
def test_a_folder_with_other_things_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / content).write_text("[]")
    with pytest.raises(UsageError, match="does not hold digits-ve"):
        ensure_digits_ve(tmp_path, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == [content]


def test_a_damaged_folder_is_named(tmp_path: Path) -> None:
    folder = ensure_digits_ve(tmp_path / "data", **SMALL)
    rows = (folder / "test.jsonl").read_text()
    (folder / "test.jsonl").write_text(rows.replace("neutral", "entailment", 1))
    with pytest.raises(DataError, match=r"test\.jsonl is missing or was altered"):
        ensure_digits_ve(folder, **SMALL)
    (folder / "test.jsonl").write_text(rows)
    (folder / "images" / "train" / "000003.png").unlink()
    with pytest.raises(DataError, match=r"train is not whole; received 19; expected 20 PNG"):
        ensure_digits_ve(folder, **SMALL)


def test_an_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "render", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        ensure_digits_ve(tmp_path / "data", **SMALL)
    assert list(tmp_path.iterdir()) == []


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_two_at_once_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that comes second finds the folder there when it renames, and puts the same in its place."""
    folder, write = tmp_path / "data", generate._write

    def slow(new: Path, request: dict) -> None:
        write(new, request)
        folder.mkdir()
        write(folder, request)

    monkeypatch.setattr(generate, "_write", slow)
    assert ensure_digits_ve(folder, **SMALL) == folder
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    monkeypatch.setattr(generate, "_write", _never)
    assert ensure_digits_ve(folder, **SMALL) == folder


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 0, "60 train pairs, 12 validation pairs, 12 test pairs"),
        (["--seed", "-1"], 2, "seed of digits-ve is negative"),
        (["--test-pairs", "2"], 2, "test split of digits-ve is too small; received 2 pairs"),
    ],
)
def test_command_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], code: int, said: str
) -> None:
    sizes = ["--train-pairs", "60", "--validation-pairs", "12", "--test-pairs", "12"]
    assert run_app(app, [str(tmp_path / "data"), *sizes, *arguments]) == code
    printed = capfd.readouterr()
    assert said in printed.out + printed.err
    assert (tmp_path / "data").exists() == (code == 0)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        ensure_digits_ve(tmp_path / "file" / "data", **SMALL)
