"""Progress lines and the metrics file, step by step."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from train.record import Metrics, ProgressLines
from train.run_folder import Run


def run_through(monkeypatch: pytest.MonkeyPatch, **console: object) -> str:
    """What two epochs of two steps print."""
    text = io.StringIO()
    monkeypatch.setattr("train.record.err", Console(file=text, width=110, highlight=False, **console))  # type: ignore[arg-type]
    with ProgressLines("accuracy", step=0, steps=4, epochs=2) as lines:
        for step in range(1, 5):
            lines.step(step, epoch=(step - 1) // 2)
            lines.loss(1.0 / step)
            if step % 2 == 0:
                lines.validation(step / 2, {"loss": 0.5, "accuracy": 0.6 if step == 2 else 0.55}, (0.6, 1))
    return text.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_one_line_an_epoch_and_a_bar_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    printed = run_through(monkeypatch, force_terminal=terminal)
    assert "epoch 1/2  loss 0.500, validation 0.500  accuracy 60.00%, best 60.00% in 1" in printed
    assert "epoch 2/2  loss 0.250, validation 0.500  accuracy 55.00%, best 60.00% in 1" in printed
    assert ("━" in printed) == terminal
    assert ("\x1b" in printed) == terminal


def test_long_epochs_get_a_plain_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.record.PLAIN_EVERY_S", -1.0)
    printed = run_through(monkeypatch)
    assert "step 1/4  epoch 1/2\n" in printed
    assert "step 3/4  epoch 2/2  loss 0.500\n" in printed


def test_other_processes_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their console is quiet, see ``train.run``."""
    assert run_through(monkeypatch, force_terminal=True, quiet=True) == ""


def test_metrics_after_the_resume_state_are_dropped_and_a_cut_line_too(tmp_path: Path) -> None:
    run = Run(tmp_path)
    lines = [json.dumps({"kind": "train", "step": step}) for step in (2, 4, 6)]
    run.metrics.write_text("\n".join(lines) + '\n{"kind": "tr')
    Metrics(run, step=4, tensorboard=False)
    assert run.metrics.read_text() == "".join(f"{line}\n" for line in lines[:2])
