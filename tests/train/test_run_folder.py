"""Whose a run folder is: two runs never share one, and a start that came to nothing stands in nobody's way."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.reliability.kills import run_killed
from mope_deploy.errors import CheckpointError, ConfigError, UsageError
from mope_deploy.files import json_bytes, locked
from tests.train.tools import assert_same, resumed, trained, weights
from train.config import Recipe
from train.resume import newest
from train.run import Outcome
from train.run_folder import Run, free_folder, open_run, working_in

Make = Callable[..., Recipe]
pytestmark = pytest.mark.usefixtures("no_pictures")
SHORT = ("train.epochs=2", "train.batch_size=30")  # four steps


def create(run: Run, recipe: Recipe, *, resumed: bool = False) -> None:
    run.create(recipe, command="test", resumed=resumed, describe=lambda: {"fingerprint": {}})


def test_two_runs_that_start_in_one_second_have_a_folder_each(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "strftime", lambda *_: "20260131-120000")
    unnamed = recipe("run.dir=null", f"run.root={tmp_path / 'runs'}")
    with working_in(unnamed, resume=None) as first, working_in(unnamed, resume=None) as second:
        assert [run.folder.name for run in (first, second)] == ["tiny-20260131-120000", "tiny-20260131-120000-2"]
        create(first, unnamed)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [first.folder.name], "nothing was put in the other"


def test_two_trainings_in_one_folder_are_refused(recipe: Make, tmp_path: Path) -> None:
    with working_in(recipe(), resume=None) as run:
        create(run, recipe())
        for resume in (None, run):
            with pytest.raises(UsageError, match="in use by process"), working_in(recipe(), resume=resume):
                pytest.fail("two in one folder")
    with locked(run.folder), pytest.raises(UsageError, match="in use by process"):
        trained(recipe())
    assert run.read()["status"] == "running", "the other's record is untouched"


def test_killed_at_every_third_operation_while_it_is_made_it_starts_anew(recipe: Make, tmp_path: Path) -> None:
    """With the same command; where it got far enough, it can be continued as well."""

    short = recipe()

    def work() -> None:
        with working_in(short, resume=None) as run:
            create(run, short)

    folder = Path(short.run.dir or "")
    continued, step, killed = 0, 0, True
    while killed:
        killed = run_killed(work, at=step, below=tmp_path)
        assert free_folder(short) == folder
        if (folder / "config.yaml").exists():
            continued += open_run(folder, recipe=None, overrides=())[1].resume
        elif (folder / "run.json").exists():
            with pytest.raises(UsageError, match=r"is no run folder.*start it again with the command that began it"):
                open_run(folder, recipe=None, overrides=())
        work()
        assert (folder / "config.yaml").exists()
        shutil.rmtree(folder)
        step += 3
    assert continued > 1
    assert step > 10


def test_killed_while_a_finished_run_is_extended_it_can_be_asked_again(recipe: Make, tmp_path: Path) -> None:
    """The recipe and ``run.json`` are two files: the one that says "finished" never meets the longer recipe."""
    longer = ("optim.schedule=multistep", "train.epochs=1")
    run, short = Run(Path(recipe().run.dir or "")), recipe(*longer)
    create(run, short)
    for step in range(0, 100, 3):
        run.finish("finished")
        _, more = open_run(run.folder, recipe=None, overrides=["train.epochs=2"])
        killed = run_killed(lambda more=more: create(run, more, resumed=True), at=step, below=tmp_path)
        assert open_run(run.folder, recipe=None, overrides=["train.epochs=2"])[1].train.epochs == 2
        if not killed:
            break
        create(run, short, resumed=True)
    assert step > 6


def test_what_is_not_a_run_that_came_to_nothing_is_never_taken(recipe: Make, tmp_path: Path) -> None:
    run = Run(Path(recipe().run.dir or ""))
    with pytest.raises(UsageError, match="is no run folder"):
        open_run(run.folder, recipe=None, overrides=())
    (run.folder / "samples").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"exists and is not empty; choose another run\.dir"):
        free_folder(recipe())  # somebody's own folder of that name
    create(run, recipe())
    assert free_folder(recipe()) == run.folder
    run.best.mkdir()
    assert free_folder(recipe()) == run.folder, "killed between the first model and the first resume state"
    run.finish("interrupted")
    with pytest.raises(UsageError, match=f"or continue it: python -m train --resume {run.folder}"):
        free_folder(recipe())
    run.best.rmdir()
    (run.folder / "notes.txt").touch()
    with pytest.raises(UsageError, match="not empty"):
        free_folder(recipe())
    (run.folder / "notes.txt").unlink()
    (run.checkpoints / "checkpoint-3").mkdir(parents=True)
    assert free_folder(recipe()) == run.folder
    (run.checkpoints / "checkpoint-3" / "complete.json").touch()
    with pytest.raises(UsageError, match="continue it"):
        free_folder(recipe())


def test_what_a_killed_exchange_of_models_left_stands_in_nobody_s_way(recipe: Make) -> None:
    run = Run(Path(recipe().run.dir or ""))
    old = run.folder / ".best.0123abcd.old"
    old.mkdir(parents=True)
    with pytest.raises(UsageError, match="not empty"):
        free_folder(recipe())  # a model, and nothing says whose
    create(run, recipe())
    assert free_folder(recipe()) == run.folder
    run.finish("interrupted")
    with pytest.raises(UsageError, match="continue it"):
        free_folder(recipe())  # the only copy of the best model


def test_a_record_that_is_none_is_one_line(recipe: Make) -> None:
    run = Run(Path(recipe().run.dir or ""))
    create(run, recipe())
    values = run.read()
    for key, value in (("status", 3), ("started", None), ("data", []), ("metrics", "none")):
        run.description.write_bytes(json_bytes(values | {key: value}))
        with pytest.raises(CheckpointError, match=rf"run\.json: {key}; received .*; expected "):
            run.read()
        run.description.write_bytes(json_bytes({name: values[name] for name in values if name != key}))
        with pytest.raises(CheckpointError, match=rf"run\.json: {key}; received None; expected "):
            open_run(run.folder, recipe=None, overrides=())
    run.description.unlink()
    os.mkfifo(run.description)
    with pytest.raises(CheckpointError, match=r"run\.json cannot be read: .*not a regular file"):
        run.read()


def test_a_second_start_has_nothing_of_the_first(recipe: Make, finished: Outcome) -> None:
    run = Run(Path(recipe().run.dir or ""))
    create(run, recipe())
    run.metrics.write_text('{"kind": "train", "step": 1}\n')
    (run.checkpoints / "checkpoint-3").mkdir(parents=True)
    trained(recipe())
    assert_same(weights(run), weights(finished.run))
    assert '"step": 1,' not in run.metrics.read_text()
    assert {path.name for path in run.checkpoints.iterdir()} == {"checkpoint-16", "checkpoint-24"}


def test_folders_with_other_names_stop_no_resume_and_stay(recipe: Make) -> None:
    first = trained(recipe("optim.schedule=multistep", "train.epochs=1"))
    names = ("checkpoint-70-backup", "checkpoint-3756 (copy)", "checkpoint-", "checkpoint-x", f"checkpoint-{'9' * 40}")
    for name in names:
        (first.run.checkpoints / name).mkdir()
        (first.run.checkpoints / name / "complete.json").write_text("{}")
    assert resumed(first.run, "train.epochs=2").status == "finished"
    state = newest(first.run)
    assert state is not None
    assert state.folder.name == "checkpoint-16"
    assert {path.name for path in first.run.checkpoints.iterdir()} >= set(names) - {names[-1]}


def test_what_changes_bits_may_not_change(recipe: Make) -> None:
    run = Run(Path(recipe().run.dir or ""))
    create(run, recipe())
    for change in ("train.eval_batch_size=5", "train.y_cache_mb=1"):
        with pytest.raises(ConfigError, match=change.partition("=")[0]):
            open_run(run.folder, recipe=None, overrides=[change])
    open_run(run.folder, recipe=None, overrides=["data.check_images=false", "data.workers=2"])
    create(run, recipe("data.skip_bad=true"))
    with pytest.raises(ConfigError, match=r"data\.check_images"):
        open_run(run.folder, recipe=None, overrides=["data.check_images=false"])


KILLED = """
import json, sys
from pathlib import Path
from benchmarks.reliability.kills import run_killed
from train.recipe import check_recipe
from train.run import fit
values, overrides, at, below = json.loads(sys.argv[1])
recipe = check_recipe(values, overrides, what="the test's recipe")
sys.exit(not run_killed(lambda: fit(recipe, command="test"), at=at, below=Path(below)))
"""


def test_killed_at_some_operations_of_a_training_it_comes_to_the_same(
    recipe: Make, values: dict[str, Any], tmp_path: Path
) -> None:
    """In a process of its own: autograd does not work in a fork of one that has threads of it already.

    ``python -m benchmarks reliability`` kills at many more.
    """
    whole = trained(recipe(*SHORT, f"run.dir={tmp_path / 'whole'}")).run
    run = Run(tmp_path / "run")
    for at in (80, 150):
        told = json.dumps([values, SHORT, at, str(run.folder)])
        subprocess.run([sys.executable, "-c", KILLED, told], check=True)
        again = trained(recipe(*SHORT)) if newest(run) is None else resumed(run)
        assert again.status == "finished"
        assert_same(weights(run), weights(whole))
        assert_same(weights(run, "best"), weights(whole, "best"))
        run.folder.rename(tmp_path / f"killed-at-{at}")
