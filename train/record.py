"""What is said about training while it runs: ``RUN/metrics.jsonl``, TensorBoard, and progress on the terminal."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from mope_deploy.console import err
from mope_deploy.errors import MopeError
from mope_deploy.files import reason, write_file
from train.run_folder import Run

__all__ = ["Metrics", "ProgressLines"]

PLAIN_EVERY_S = 15.0


class Metrics:
    """One JSON object per log step in ``RUN/metrics.jsonl``, and the same for TensorBoard; closed by ``with``.

    Args:
        run: where it is written.
        step: optimiser steps done; lines of later ones are dropped, because a resumed run is about to repeat them.
        tensorboard: whether TensorBoard's files are written.
    """

    def __init__(self, run: Run, *, step: int, tensorboard: bool) -> None:
        self.run = run
        self._board = SummaryWriter(log_dir=str(run.tensorboard)) if tensorboard else None
        if run.metrics.is_file():
            lines = run.metrics.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _step(line) <= step]
            write_file(run.metrics, "".join(f"{line}\n" for line in kept))

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Add the values of ``train`` or of a ``validation``."""
        entry = {"kind": kind, "step": step, "time": round(time.time(), 3), **values}
        try:
            with self.run.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise MopeError(f"{self.run.metrics} cannot be written", received=reason(error)) from error
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"{'eval' if kind == 'validation' else kind}/{name}", value, step)
            self._board.flush()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        if self._board is not None:
            self._board.close()


class ProgressLines:
    """A bar on a terminal, a plain line now and then elsewhere, and one line an epoch on both; closed by ``with``.

    Args:
        metric: name of the validation metric that is shown.
        step, steps: optimiser steps done, and in all.
        epochs: number of epochs in all.
    """

    def __init__(self, metric: str, *, step: int, steps: int, epochs: int) -> None:
        self.metric, self.steps, self.epochs = metric, steps, epochs
        self._loss: float | None = None
        self._started = self._last = time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=err, transient=True, disable=not err.is_terminal)
        self._task = self._bar.add_task("training", total=steps, completed=step)

    def __enter__(self) -> ProgressLines:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def step(self, step: int, *, epoch: int) -> None:
        """After an optimiser step, in an epoch counted from 0."""
        described = f"epoch {epoch + 1}/{self.epochs}" + ("" if self._loss is None else f"  loss {self._loss:.3f}")
        self._bar.update(self._task, completed=step, description=described)
        if not err.is_terminal and time.monotonic() - self._last > PLAIN_EVERY_S:
            self._last = time.monotonic()
            err.print(f"step {step}/{self.steps}  {described}", markup=False)

    def loss(self, loss: float) -> None:
        """The training loss to show from now on."""
        self._loss = loss

    def validation(self, epoch: float, found: Mapping[str, Any], best: tuple[float, int]) -> None:
        """After a validation: the epoch as far as it went, the metrics, and the best score with its epoch."""
        self._last = time.monotonic()
        number = f"{epoch:.0f}" if abs(epoch - round(epoch)) < 1e-6 else f"{epoch:.1f}"
        err.print(  # within 80 columns
            f"epoch {number}/{self.epochs}  loss {self._loss or 0.0:.3f}, validation {found['loss']:.3f}  "
            f"{self.metric} {found[self.metric]:.2%}, best {best[0]:.2%} in {best[1]}  "
            f"{time.monotonic() - self._started:.0f} s",
            markup=False,
        )


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return float("inf")  # cut short when the run was killed: written again
