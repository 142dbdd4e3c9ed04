"""Progress lines, the metrics file and the memory of the best validation, step by step."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from train.callbacks import MetricsFile, ProgressLines, best_so_far
from train.run_folder import Run


def state(**values: Any) -> SimpleNamespace:
    usual = {"is_world_process_zero": True, "global_step": 0, "max_steps": 4, "epoch": 0.0, "num_train_epochs": 2}
    return SimpleNamespace(**(usual | {"log_history": []} | values))


def run_through(callback: ProgressLines) -> None:
    """Two epochs of two steps."""
    history: list[dict[str, Any]] = []
    callback.on_train_begin(None, state(), None)
    for step in range(1, 5):
        now = state(global_step=step, epoch=step / 2, log_history=history)
        callback.on_step_end(None, now, None)
        callback.on_log(None, now, None, logs={"loss": 1.0 / step})
        if step % 2 == 0:
            metrics = {"eval_loss": 0.5, "eval_accuracy": 0.6 if step == 2 else 0.55}
            history.append(metrics | {"epoch": step / 2})
            callback.on_evaluate(None, now, None, metrics=metrics)
    callback.on_train_end(None, state(global_step=4), None)


@pytest.mark.parametrize("terminal", [True, False])
def test_one_line_an_epoch_and_a_bar_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    text = io.StringIO()
    monkeypatch.setattr("train.callbacks.err", Console(file=text, force_terminal=terminal, width=110, highlight=False))
    run_through(ProgressLines("accuracy"))
    printed = text.getvalue()
    assert "epoch   1/2  loss 0.500  validation loss 0.500  accuracy 60.00%  best 60.00% (epoch 1)" in printed
    assert "epoch   2/2  loss 0.250  validation loss 0.500  accuracy 55.00%  best 60.00% (epoch 1)" in printed
    assert ("━" in printed) == terminal
    assert ("\x1b" in printed) == terminal


def test_long_epochs_get_a_plain_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    text = io.StringIO()
    monkeypatch.setattr("train.callbacks.err", Console(file=text, width=110))
    monkeypatch.setattr("train.callbacks.PLAIN_EVERY_S", -1.0)
    run_through(ProgressLines("accuracy"))
    assert "step 1/4  epoch 1/2\n" in text.getvalue()
    assert "step 3/4  epoch 2/2  loss 0.500\n" in text.getvalue()


def test_other_processes_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    text = io.StringIO()
    monkeypatch.setattr("train.callbacks.err", Console(file=text, force_terminal=True))
    callback = ProgressLines("accuracy")
    callback.on_train_begin(None, state(is_world_process_zero=False), None)
    callback.on_step_end(None, state(is_world_process_zero=False, global_step=1), None)
    callback.on_evaluate(None, state(is_world_process_zero=False), None, metrics={"eval_loss": 1.0})
    assert text.getvalue() == ""


def test_the_first_of_equal_validations_is_best() -> None:
    history = [{"eval_accuracy": value, "epoch": float(i + 1)} for i, value in enumerate((0.3, 0.7, 0.5, 0.7))]
    assert best_so_far(history, "accuracy") == (0.7, 2, 2)
    assert best_so_far(history[:2], "accuracy") == (0.7, 2, 0)
    assert best_so_far([{"loss": 1.0}], "accuracy") is None


def test_metrics_after_the_resume_state_are_dropped_and_a_cut_line_too(tmp_path: Path) -> None:
    run = Run(tmp_path)
    lines = [json.dumps({"kind": "train", "step": step}) for step in (2, 4, 6)]
    run.metrics.write_text("\n".join(lines) + '\n{"kind": "tr')
    MetricsFile(run).on_train_begin(None, state(global_step=4), None)
    assert run.metrics.read_text() == "".join(f"{line}\n" for line in lines[:2])
