"""What stops a run, and that it continues to the same result, to the bit."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from mope_deploy.errors import CheckpointError, ConfigError, MopeError, UsageError
from tests.train.tools import assert_same, at_step, logged, resumed, signal_at, trained, weights
from train.config import Recipe
from train.objective import Objective
from train.resume import Progress, ResumeState, newest
from train.run import Outcome
from train.run_folder import Run

Make = Callable[..., Recipe]
pytestmark = pytest.mark.usefixtures("no_pictures")


def steps_of(run: Run, kind: str) -> list[int]:
    return [line["step"] for line in logged(run, kind)]


def newest_name(run: Run) -> str:
    state = newest(run)
    assert state is not None
    return state.folder.name


SLOW = """
import sys, time
from train.cli import main
from train.loop import Loop
step = Loop.step
def slow(self, batches):
    time.sleep(0.1)
    step(self, batches)
Loop.step = slow
sys.exit(main())
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_run_continues_to_the_same_result(
    values: dict[str, Any], finished: Outcome, tmp_path: Path, number: signal.Signals
) -> None:
    """Killed in the middle of the second epoch: dropout, routing noise, order of samples and Adam all go on."""
    source = tmp_path / "recipe.yaml"
    source.write_text(yaml.safe_dump(values))
    run = Run(Path(values["run"]["dir"]))
    command = [sys.executable, "-c", SLOW, str(source), "train.save_every=3", "data.group_by=template"]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and '"step": 10' not in (
            run.metrics.read_text() if run.metrics.exists() else ""
        ):
            assert process.poll() is None, process.stderr.read()  # type: ignore[union-attr]
            time.sleep(0.02)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    step = int(newest_name(run).rpartition("-")[2])
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert errors.splitlines()[-1] == f"interrupted; continue with: python -m train --resume {run.folder}"
        assert run.read()["status"] == "interrupted"
        assert 10 <= step < 16
        assert step == run.read()["step"]
    else:
        assert run.read()["status"] == "running"
        assert step == 9
    assert not (run.folder / "evaluation.json").exists()

    again = resumed(run)
    assert again.status == "finished"
    assert_same(weights(run), weights(finished.run))
    assert_same(weights(run, "best"), weights(finished.run, "best"))
    assert again.evaluation == finished.evaluation
    assert steps_of(run, "validation") == [8, 16, 24]
    steps = steps_of(run, "train")
    assert steps == sorted(set(steps)), "steps that were repeated are listed once"


@pytest.mark.parametrize("step", [3, 7, 23], ids=["within an epoch", "last step of an epoch", "last step of all"])
def test_sigterm_at_any_step_loses_nothing(
    recipe: Make, finished: Outcome, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Step 7 is the last of the first epoch: its validation must happen exactly once."""
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        signal_at(patch, step, signal.SIGTERM)
        first = trained(recipe("data.group_by=template"))
    assert first.status == ("finished" if step == 23 else "interrupted")
    if step < 23:
        assert first.run.read()["step"] == step + 1
        assert newest_name(first.run) == f"checkpoint-{step + 1}"
        again = resumed(first.run)
        assert again.evaluation == finished.evaluation
    assert_same(weights(first.run), weights(finished.run))
    assert steps_of(first.run, "validation") == [8, 16, 24]
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_signal_ends_at_once(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.interruption.SAME_SIGNAL_S", -1.0)

    def impatient() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the second signal did nothing")

    at_step(monkeypatch, 10, impatient)
    outcome = trained(recipe())
    assert outcome.status == "interrupted"
    assert outcome.run.read()["status"] == "interrupted"
    assert newest_name(outcome.run) == "checkpoint-8"


def test_a_finished_run_can_be_given_more_epochs(recipe: Make) -> None:
    longer = ("optim.schedule=multistep", "optim.milestones=[2]")
    first = trained(recipe(*longer, "train.epochs=1"))
    again = resumed(first.run, "train.epochs=2")
    assert again.run.read()["steps"] == 16
    whole = trained(recipe(*longer, "train.epochs=2", f"run.dir={first.run.folder}-whole"))
    assert_same(weights(again.run), weights(whole.run))


def test_a_finished_run_is_not_trained_further_unasked(recipe: Make, capsys: pytest.CaptureFixture[str]) -> None:
    first = trained(
        recipe("train.epochs=9", "train.early_stopping=1", "optim.lr_main=1e-9", "optim.lr_complementary=1e-9")
    )
    assert "stopping early: 1 epochs without a better validation accuracy" in capsys.readouterr().err
    before = (first.run.folder / "run.json").read_bytes()
    with pytest.raises(UsageError, match=r"is finished; look at .*evaluation\.json; for more, raise train\.epochs"):
        resumed(first.run)
    assert (first.run.folder / "run.json").read_bytes() == before


def test_a_run_without_a_resume_state_starts_again(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Objective, "forward", lambda *_, **__: (_ for _ in ()).throw(MopeError("broken")))
        with pytest.raises(MopeError, match="broken"):
            trained(recipe("train.epochs=1"))
    run = Run(Path(recipe().run.dir or ""))
    assert run.read()["status"] == "failed"
    assert newest(run) is None
    assert resumed(run).status == "finished"


@pytest.fixture
def interrupted(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run interrupted at step 10 of 24."""
    with monkeypatch.context() as patch:
        signal_at(patch, 9, signal.SIGINT)
        return trained(recipe()).run


def test_a_changed_recipe_is_refused_and_harmless_changes_are_not(interrupted: Run) -> None:
    with pytest.raises(ConfigError) as caught:
        resumed(interrupted, "optim.lr_main=0.1", "train.epochs=5", "train.log_every=7")
    message = str(caught.value)
    assert "optim.lr_main (was 0.01, now 0.1)" in message
    assert "train.epochs (was 3, now 5)" in message  # cosine: every step's rate would change
    assert "log_every (was" not in message
    assert resumed(interrupted, "train.log_every=7", "data.workers=1").status == "finished"


def test_a_damaged_resume_state_is_refused_and_a_half_written_one_passed_over(interrupted: Run) -> None:
    state = newest(interrupted)
    assert state is not None
    for name in ("model.safetensors", "training.pt", "random-0.pt", "progress.json"):
        content = (state.folder / name).read_bytes()
        damaged = bytearray(content)
        damaged[len(content) // 2] ^= 1
        (state.folder / name).write_bytes(damaged)
        with pytest.raises(CheckpointError, match=f"checkpoint-10 is damaged; received {name}.*remove .*checkpoint-10"):
            resumed(interrupted)
        (state.folder / name).unlink()
        with pytest.raises(CheckpointError, match="checkpoint-10 is damaged"):
            resumed(interrupted)
        (state.folder / name).write_bytes(content)
    (state.folder / "complete.json").unlink()
    assert newest_name(interrupted) == "checkpoint-8"


@pytest.mark.parametrize("call", ["save_file", "torch.save", "flush"])
def test_a_disk_that_fills_up_is_one_line_and_costs_only_the_last_steps(
    recipe: Make, finished: Outcome, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """At the second state, in the words of torch, of safetensors and of the system."""

    def full(*_: Any, **__: Any) -> None:
        if call == "torch.save":
            raise RuntimeError("[enforce fail at inline_container.cc:626] . unexpected pos 64 vs 0")
        raise OSError(28, "No space left on device")

    run = Run(Path(recipe().run.dir or ""))
    with monkeypatch.context() as patch:
        at_step(patch, 9, lambda: patch.setattr(f"train.resume.{call}", full))
        with pytest.raises(CheckpointError, match=r"checkpoint-16 cannot be written; received .*--resume") as caught:
            trained(recipe("data.group_by=template"))
    assert "\n" not in str(caught.value)
    assert run.read()["status"] == "failed"
    assert newest_name(run) == "checkpoint-8"
    assert resumed(run).evaluation == finished.evaluation


def test_tensors_and_progress_that_are_not_the_model_s_are_one_line(tmp_path: Path) -> None:
    state, file = ResumeState(tmp_path), tmp_path / "model.safetensors"
    for content in ({}, {"a": torch.full((2,), torch.nan)}):
        save_file(content, file)
        with pytest.raises(CheckpointError, match=re.escape(f"{file}: ")) as caught:
            state.weights({"a": torch.zeros(2)})
        assert "\n" not in str(caught.value)
    os.mkfifo(tmp_path / "progress.json")
    with pytest.raises(CheckpointError, match=r"progress\.json cannot be read: .*not a regular file"):
        state.progress()


def test_early_stopping_counts_over_an_interruption(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a learning rate of almost nothing no validation is better than the first."""
    still = ("optim.lr_main=1e-12", "optim.lr_complementary=1e-12", "train.early_stopping=2", "train.epochs=9")
    whole = trained(recipe(*still, "run.dir=" + str(recipe().run.dir) + "-whole"))
    assert whole.run.read()["steps"] == 24
    with monkeypatch.context() as patch:
        signal_at(patch, 17, signal.SIGINT)
        first = trained(recipe(*still))
    assert first.status == "interrupted"
    assert resumed(first.run).run.read()["steps"] == 24


def test_the_first_of_equal_validations_is_best() -> None:
    progress = Progress(step=9, scores=[0.3, 0.7, 0.5, 0.7], epochs=[1, 2, 3, 4])
    assert (progress.best, progress.since_best) == ((0.7, 2), 2)
    progress = Progress(step=9, scores=[0.3, 0.7], epochs=[1, 2])
    assert (progress.best, progress.since_best) == ((0.7, 2), 0)
    assert Progress().since_best == 0
