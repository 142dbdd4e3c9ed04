"""What happens around the training steps: readable progress, metrics on disk, the best model, stopping."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from mope_deploy.console import err
from mope_deploy.model import MoPE
from train.run_folder import Run

__all__ = ["BestModel", "Interruption", "MetricsFile", "ProgressLines", "best_so_far"]

PLAIN_EVERY_S = 15.0
SAME_SIGNAL_S = 2.0  # torchrun passes on the interrupt that a terminal has sent to its processes already


def best_so_far(history: list[dict[str, Any]], metric: str) -> tuple[float, int, int] | None:
    """Best validation metric in a Trainer's log, its epoch (rounded), and how many evaluations came after it."""
    evaluations = [entry for entry in history if f"eval_{metric}" in entry]
    if not evaluations:
        return None
    values = [entry[f"eval_{metric}"] for entry in evaluations]
    index = values.index(max(values))
    return values[index], round(evaluations[index]["epoch"]), len(values) - 1 - index


class BestModel(TrainerCallback):
    """Writes ``RUN/last`` after every validation and ``RUN/best`` after the best one; stops when nothing improves.

    The Trainer's log, which resume states hold, is the only memory: a resumed run decides as an uninterrupted one.

    Args:
        model: what is trained.
        run: where it is saved.
        metric: the validation metric, higher is better.
        patience: validations without improvement before training stops; None never stops.
    """

    def __init__(self, model: MoPE, run: Run, *, metric: str, patience: int | None) -> None:
        self.model, self.run, self.metric, self.patience = model, run, metric, patience

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        found = best_so_far(state.log_history, self.metric)
        assert found is not None
        _, _, since = found
        if state.is_world_process_zero:
            self.model.save_pretrained(self.run.last)
            if since == 0:
                self.model.save_pretrained(self.run.best)
        if self.patience is not None and since >= self.patience:
            control.should_training_stop = True
            if state.is_world_process_zero:
                err.print(f"stopping early: {since} epochs without a better validation {self.metric}", markup=False)


class Interruption(TrainerCallback):
    """Ends training after the current step on SIGINT or SIGTERM, with a resume state; a second signal ends it at once.

    Outside the training loop either signal is a KeyboardInterrupt. Also saves a state every ``save_every`` steps.

    Attributes:
        received: whether a signal came (to this process or, with several, to any of them).
    """

    def __init__(self, *, save_every: int | None) -> None:
        self.received = False
        self.save_every = save_every
        self._first = 0.0
        self._training = False
        self._process = os.getpid()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the signals inside this block; elsewhere than in the main thread nothing is changed."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a worker of the data loader: its parent ends it
        if not self._training or (self.received and time.monotonic() - self._first > SAME_SIGNAL_S):
            raise KeyboardInterrupt
        if not self.received:
            self.received, self._first = True, time.monotonic()
            if os.environ.get("RANK", "0") == "0":
                err.print("stopping after this step; interrupt again to stop at once", markup=False)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._training = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._training = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.received = self._anywhere(args.device)
        # At an epoch's end validation and saving follow anyway, and must: a resumed run starts with the next epoch.
        if _epoch_ends(state):
            control.should_training_stop |= self.received
            return
        if self.received:
            control.should_training_stop = control.should_save = True
        elif self.save_every is not None and state.global_step % self.save_every == 0:
            control.should_save = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.received and not _epoch_ends(state):
            control.should_evaluate = control.should_save = control.should_log = False

    def _anywhere(self, device: torch.device) -> bool:
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return self.received
        flag = torch.tensor(float(self.received), device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())


class MetricsFile(TrainerCallback):
    """One JSON object per log step in ``RUN/metrics.jsonl``; a resumed run first drops what it is about to repeat."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not self.run.metrics.is_file():
            return
        lines = self.run.metrics.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if _step(line) <= state.global_step]
        self.run.metrics.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_log = True  # an epoch's last steps too, however few they are

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or logs is None or "train_runtime" in logs:
            return
        validation = any(key.startswith("eval_") for key in logs)
        values = {key.removeprefix("eval_"): value for key, value in logs.items() if not key.endswith("per_second")}
        entry = {
            "kind": "validation" if validation else "train",
            "step": state.global_step,
            "time": round(time.time(), 3),
        }
        with self.run.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry | values) + "\n")


class ProgressLines(TrainerCallback):
    """A bar on a terminal, a plain line now and then elsewhere, and one line an epoch on both.

    Args:
        metric: the validation metric that is shown.
    """

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self._bar: Progress | None = None
        self._task: Any = None
        self._loss: float | None = None
        self._started = self._last = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = self._last = time.monotonic()
        if state.is_world_process_zero and err.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=err, transient=True)
            self._task = self._bar.add_task("training", total=state.max_steps, completed=state.global_step)
            self._bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step, description=self._describe(state))
        elif state.is_world_process_zero and time.monotonic() - self._last > PLAIN_EVERY_S:
            self._last = time.monotonic()
            err.print(f"step {state.global_step}/{state.max_steps}  {self._describe(state)}", markup=False)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self._loss = (logs or {}).get("loss", self._loss)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or metrics is None:
            return
        found = best_so_far(state.log_history, self.metric)
        assert found is not None
        best, epoch, _ = found
        self._last = time.monotonic()
        err.print(
            f"epoch {_epoch(state):>3}/{state.num_train_epochs}  loss {self._loss or 0.0:.3f}  "
            f"validation loss {metrics['eval_loss']:.3f}  {self.metric} {metrics[f'eval_{self.metric}']:.2%}  "
            f"best {best:.2%} (epoch {epoch})  {time.monotonic() - self._started:.0f} s",
            markup=False,
        )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar off the terminal, also after a failure."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _describe(self, state: Any) -> str:
        epoch = f"epoch {min(int(state.epoch or 0) + 1, state.num_train_epochs)}/{state.num_train_epochs}"
        return epoch if self._loss is None else f"{epoch}  loss {self._loss:.3f}"


def _epoch(state: Any) -> str:
    return f"{state.epoch:.0f}" if abs(state.epoch - round(state.epoch)) < 1e-6 else f"{state.epoch:.1f}"


def _epoch_ends(state: Any) -> bool:
    return abs(state.epoch - round(state.epoch)) < 1e-9 or state.global_step >= state.max_steps


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return float("inf")  # cut short when the run was killed: written again
