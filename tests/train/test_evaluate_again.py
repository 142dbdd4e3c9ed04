"""What is found after training never costs the run: it stays trained, and its evaluation can be repeated."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mope_deploy.errors import CheckpointError, ConfigError, DataError, UsageError
from mope_deploy.preprocess import Preprocessing
from tests.train.tools import moved_rows, resumed, trained, write_rows
from train.cli import main
from train.config import Recipe
from train.run import Outcome, evaluate_again
from train.run_folder import Run, open_trained

Make = Callable[..., Recipe]
pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture
def rows(tiny: Path, tmp_path: Path) -> list[dict[str, Any]]:
    rows = moved_rows(tiny / "test.jsonl")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    write_rows(tmp_path / "test.jsonl", [*rows, rows[0] | {"image": str(tmp_path / "bad.png")}])
    return rows


def test_a_row_that_fails_after_training_is_mended_and_read_again(
    recipe: Make, rows: list[dict[str, Any]], finished: Outcome, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "test.jsonl"
    with pytest.raises(DataError, match=f"{file}:27: "):
        trained(recipe(f"data.test={file}", "data.check_images=false", "data.group_by=template"))
    run = Run(Path(recipe().run.dir or ""))
    assert f"repeat the evaluation: python -m train --evaluate {run.folder}" in " ".join(
        capsys.readouterr().err.split()
    )
    assert run.read()["status"] == "trained"
    assert main(["--evaluate", str(run.folder)]) == 1
    assert f"error: {file}:27: " in capsys.readouterr().err
    assert run.read()["status"] == "trained"

    assert main(["--evaluate", str(run.folder), "data.skip_bad=true", "data.check_images=true"]) == 0
    assert json.loads((run.folder / "evaluation.json").read_text()) == finished.evaluation
    write_rows(file, rows)
    with pytest.raises(DataError, match=f"changed since it was started: test.*--evaluate {run.folder}"):
        resumed(run, "train.early_stopping=9")
    assert main(["--evaluate", str(run.folder)]) == 0
    assert "accuracy by template: a " in capsys.readouterr().out
    assert json.loads((run.folder / "evaluation.json").read_text()) == finished.evaluation
    described = run.read()
    assert (described["status"], described["data"]["rows"]["test"]) == ("finished", 26)
    assert described["metrics"] == finished.run.read()["metrics"]


def test_with_baselines_and_without_test_rows(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    heads = iter([["first"], ["second"]])
    monkeypatch.setattr("train.reporting.run_baselines", lambda *_, **__: next(heads))
    run = trained(recipe("data.test=null", "data.validation=null", "baselines=true", "train.epochs=1")).run
    first = json.loads((run.folder / "evaluation.json").read_text())
    again = evaluate_again(open_trained(run.folder, overrides=())[1], run).evaluation
    assert again == json.loads((run.folder / "evaluation.json").read_text()) == first | {"baselines": ["second"]}


@pytest.mark.parametrize(("check_images", "key"), [("true", "image"), ("false", "text")])
def test_rows_that_were_skipped_in_training_are_skipped_again(
    recipe: Make, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check_images: str, key: str
) -> None:
    """What only decoding finds, in every split; texts are looked at even where pictures are not."""
    monkeypatch.setattr("train.reporting.run_baselines", lambda *_, **__: [])
    (tmp_path / "bad.png").write_bytes(b"no picture")
    bad = {"image": str(tmp_path / "bad.png"), "text": "\u200b"}[key]
    overrides = ["data.skip_bad=true", f"data.check_images={check_images}", "baselines=true", "train.max_steps=1"]
    for name in ("train", "validation", "test"):
        rows = moved_rows(tiny / f"{name}.jsonl")
        write_rows(tmp_path / f"{name}.jsonl", [*rows, rows[0] | {key: bad}])
        overrides.append(f"data.{name}={tmp_path / name}.jsonl")
    if key == "text":
        real = Preprocessing.check_text

        def check(self: Preprocessing, text: str) -> None:
            if text == bad:
                raise DataError("text has no tokens")
            real(self, text)

        monkeypatch.setattr(Preprocessing, "check_text", check)
    run = trained(recipe(*overrides)).run
    before = run.read()
    assert before["data"]["rows"] == {"train": 60, "validation": 24, "test": 26}
    evaluate_again(open_trained(run.folder, overrides=())[1], run)
    assert run.read()["data"] == before["data"]
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(DataError, match="changed since it was started: train"):
        evaluate_again(open_trained(run.folder, overrides=())[1], run)


def test_what_run_json_does_not_say_is_one_line(recipe: Make) -> None:
    run = Run(Path(recipe().run.dir or ""))
    run.create(recipe(), command="test", resumed=False, describe=dict)
    run.finish("trained")
    with pytest.raises(CheckpointError, match=r"run\.json: data\.labels; received None; expected "):
        evaluate_again(open_trained(run.folder, overrides=())[1], run)


def test_only_trained_runs_and_only_what_concerns_the_evaluation(recipe: Make, finished: Outcome) -> None:
    open_trained(finished.run.folder, overrides=["train.eval_batch_size=3"])
    with pytest.raises(ConfigError, match=r"optim\.lr_main \(was 0\.01, now 1\.0\)"):
        open_trained(finished.run.folder, overrides=["optim.lr_main=1"])
    run = Run(Path(recipe().run.dir or ""))
    with pytest.raises(UsageError, match="is no run folder"):
        open_trained(run.folder, overrides=())
    run.create(recipe(), command="test", resumed=False, describe=dict)
    with pytest.raises(UsageError, match=r"is not trained to its end.*running.*--resume"):
        open_trained(run.folder, overrides=())
    assert main(["--evaluate", str(finished.run.folder), "--dry-run"]) == 2
