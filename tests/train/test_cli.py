"""The command line: exit codes, one-line errors, what it prints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import mope_deploy
from mope_deploy.console import run_app
from train.cli import app

Main = Callable[..., tuple[int, str, str]]


@pytest.fixture
def main(capsys: pytest.CaptureFixture[str]) -> Main:
    """Run the command line in this process: exit code, standard output, standard error."""

    def run(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run_app(app, [str(item) for item in argv])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def source(values: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_training_from_a_recipe_file(main: Main, source: Path, values: dict[str, Any]) -> None:
    code, printed, log = main(source, "train.epochs=1", "baselines=true", "data.group_by=template")
    assert code == 0, log
    folder = Path(values["run"]["dir"])
    assert "late concatenation, MLP" in printed
    assert "accuracy by template: a " in printed
    assert "experts in use per layer, of 4:" in printed
    assert printed.endswith(f"run folder: {folder}\nnext: mope-export {folder} --format onnx\n")
    assert "epoch 1/1" in log
    assert "Traceback" not in log
    assert len(json.loads((folder / "baselines.json").read_text())["heads"]) == 6
    assert len(json.loads((folder / "evaluation.json").read_text())["baselines"]) == 6

    code, _, log = main(source)
    assert (code, log.count("\n")) == (2, 1)
    assert f"run folder {folder} exists and is not empty" in log
    assert f"python -m train --resume {folder}" in log

    code, _, log = main("--resume", folder, "optim.lr_main=1")
    assert code == 2
    assert "optim.lr_main (was 0.01, now 1.0)" in log

    code, _, log = main(source, "resume=true", "train.epochs=1", "baselines=true", "data.group_by=template")
    assert (code, log.count("\n")) == (2, 1)
    assert f"{folder} is finished" in log


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "no recipe given"),
        (("train.epochs=1",), 2, "no recipe given"),
        (("nowhere.yaml",), 2, "no recipe 'nowhere.yaml'"),
        (("RECIPE", "train.epoch=1"), 2, "unknown key train.epoch (did you mean train.epochs?)"),
        (("RECIPE", "data.test=gone.jsonl"), 2, "data.test=gone.jsonl: no such file"),
        (("RECIPE", "model.labels=[entailment, neutral]"), 1, "train.jsonl:"),
        (("RECIPE", "model.main.source=dir:gone"), 2, "no encoder at dir:gone"),
        (("RECIPE", "model.main.source=vit"), 2, "main.source: received 'vit'"),
        (("RECIPE", "resume=true", "run.dir=null"), 2, "resume=true needs run.dir=RUN"),
        (("--resume", "gone"), 2, "gone is no run folder"),
        (("RECIPE", "data.group_by=kind"), 1, "kind missing"),
        (("RECIPE", "train.device=tpu"), 2, "train.device: received 'tpu'"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing_behind(
    main: Main, source: Path, values: dict[str, Any], arguments: tuple[str, ...], code: int, message: str
) -> None:
    argv = [str(source) if argument == "RECIPE" else argument for argument in arguments]
    found, _, log = main(*argv)
    lines = [line for line in log.splitlines() if not line.startswith(("note:", "Writing model"))]
    assert found == code, log
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert not Path(values["run"]["dir"]).exists()


def test_a_run_folder_that_cannot_be_made(main: Main, source: Path, tmp_path: Path) -> None:
    code, _, log = main(source, f"run.dir={source}/run")
    assert (code, log.splitlines()[-1].count("cannot be made; received Not a directory")) == (2, 1), log
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("recipe")] == ["recipe.yaml"]


def test_a_label_that_only_validation_has(main: Main, source: Path, values: dict[str, Any], tmp_path: Path) -> None:
    rows = Path(values["data"]["validation"])
    row = json.loads(rows.read_text().splitlines()[0])
    bad = tmp_path / "v.jsonl"
    bad.write_text(json.dumps(row | {"image": str(rows.parent / row["image"]), "label": "maybe"}))
    code, _, log = main(source, f"data.validation={bad}", "model.labels=null")
    assert code == 1
    assert f"{bad}:1: unknown label; received 'maybe'; expected one of 'contradiction', 'entailment', 'neutral'" in log


def test_list_show_and_dry_run_write_nothing(main: Main, source: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert main("--version") == (0, f"mope-deploy {mope_deploy.__version__}\n", "")
    code, printed, _ = main("--list")
    assert code == 0
    assert "digits-ve" in printed
    code, printed, _ = main(source, "--show", "train.epochs=7")
    assert code == 0
    assert yaml.safe_load(printed)["train"]["epochs"] == 7
    code, printed, _ = main(source, "--dry-run")
    assert code == 0
    assert "train 60, validation 24, test 26" in printed
    code, printed, _ = main("digits-ve", "--dry-run", f"data.root={tmp_path / 'digits'}")
    assert code == 0
    assert "would be generated" in printed
    assert sorted(tmp_path.rglob("*")) == before


def test_an_unexpected_failure_is_one_line_too(main: Main, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.run.build_model", lambda *_, **__: 1 / 0)
    code, _, log = main(source)
    assert code == 1
    assert "unexpected ZeroDivisionError" in log
    assert "Traceback" not in log
