"""Resume states, ``RUN/checkpoints/checkpoint-<step>``: written whole or not used, read back without pickle.

::

    model.safetensors     the trained tensors, and fitted statistics of y
    training.pt           optimiser, schedule and, with fp16, the loss's scale
    random-<process>.pt   torch's random states of each process
    progress.json         steps done, validations so far
    complete.json         the SHA-256 of all of these; written last
"""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mope_deploy.errors import CheckpointError
from mope_deploy.files import flush, json_bytes, reason, sha256, write_file
from mope_deploy.model.tensors import read_tensors
from mope_deploy.reading import read_json
from train.run_folder import COMPLETE, Run

__all__ = ["Progress", "ResumeState", "newest"]

KEPT = 2  # newest states


@dataclass
class Progress:
    """How far training has come: the only memory of a run, so that a resumed one decides as an uninterrupted one.

    Attributes:
        step: optimiser steps done.
        scores: the metric that decides which model is best, of every validation so far; higher is better.
        epochs: after which epoch each of them was, rounded.
    """

    step: int = 0
    scores: list[float] = field(default_factory=list)
    epochs: list[int] = field(default_factory=list)

    @property
    def best(self) -> tuple[float, int]:
        """The best score, of equal ones the first, and its epoch."""
        index = self.scores.index(max(self.scores))
        return self.scores[index], self.epochs[index]

    @property
    def since_best(self) -> int:
        """Validations after the best one; 0 before there is any."""
        return len(self.scores) - 1 - self.scores.index(max(self.scores)) if self.scores else 0


@dataclass(frozen=True)
class ResumeState:
    """One of them.

    Raises:
        CheckpointError: from every method that reads, where a file cannot be read.
    """

    folder: Path

    def begin(self) -> None:
        """An empty folder, whatever a run that was killed while writing this state left."""
        with _written(self.folder):
            _remove(self.folder)
            self.folder.mkdir(parents=True)

    def write(self, weights: dict[str, Tensor], training: dict[str, Any], progress: Progress) -> None:
        """What one process writes for all."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
        with _written(self.folder):
            save_file(tensors, self.folder / "model.safetensors")
            torch.save(training, self.folder / "training.pt")
        write_file(self.folder / "progress.json", json_bytes(asdict(progress)))

    def write_random(self, process: int) -> None:
        """The random states of one process."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        with _written(self.folder):
            torch.save({"cpu": torch.get_rng_state(), "cuda": cuda}, self.folder / f"random-{process}.pt")

    def seal(self, run: Run) -> None:
        """Mark the state as complete once all of it is on the disk, and remove all but the run's newest ones."""
        with _written(self.folder):
            written = sorted(self.folder.iterdir())
            for path in written:
                flush(path)
        write_file(self.folder / COMPLETE, json_bytes({path.name: sha256(path) for path in written}))
        flush(self.folder.parent)
        kept = list(run.states.values())[-KEPT:]
        for path in self.folder.parent.glob("checkpoint-*"):
            if path.name.removeprefix("checkpoint-").isdecimal() and path not in kept:
                _remove(path)

    def weights(self, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The trained tensors, which have names, shapes and types of ``expected``."""
        return read_tensors(self.folder / "model.safetensors", expected)

    def training(self) -> dict[str, Any]:
        """As it was given to :meth:`write`."""
        return self._load("training.pt")

    def progress(self) -> Progress:
        """As it was given to :meth:`write`."""
        with _read(self.folder / "progress.json") as path:
            return Progress(**read_json(path))

    def restore_random(self, process: int) -> None:
        """Go on with the random states of :meth:`write_random`; a process that there was not then keeps its own."""
        if not (self.folder / f"random-{process}.pt").exists():
            return
        states = self._load(f"random-{process}.pt")
        torch.set_rng_state(states["cpu"])
        if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(states["cuda"])

    def _load(self, name: str) -> dict[str, Any]:
        with _read(self.folder / name) as path:
            return torch.load(path, map_location="cpu", weights_only=True)


def newest(run: Run) -> ResumeState | None:
    """The newest complete resume state, or None if training has not reached one.

    Raises:
        CheckpointError: its files are not those that were written.
    """
    found = list(run.states.values())
    if not found:
        return None
    folder = found[-1]
    todo = f"remove {folder} to continue from an older state" if len(found) > 1 else "start a new run"
    try:
        expected = read_json(folder / COMPLETE)
        wrong = [name for name, digest in expected.items() if _digest(folder / name) != digest]
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"resume state {folder} cannot be read: {error}", todo=todo) from error
    if wrong:
        received = f"{', '.join(wrong)} with other content than was written"
        raise CheckpointError(f"resume state {folder} is damaged", received=received, todo=todo)
    return ResumeState(folder)


@contextmanager
def _written(folder: Path) -> Iterator[None]:
    """What torch, safetensors and the system say of a full disk, as a CheckpointError."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        todo = "make room; the run continues from the state before: python -m train --resume RUN"
        raise CheckpointError(f"resume state {folder} cannot be written", received=reason(error), todo=todo) from error


@contextmanager
def _read(path: Path) -> Iterator[Path]:
    """Whatever torch, safetensors or JSON say of a damaged file, as a CheckpointError."""
    damage = (OSError, ValueError, TypeError, KeyError, EOFError, RuntimeError, SafetensorError, pickle.UnpicklingError)
    try:
        yield path
    except damage as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _remove(state: Path) -> None:
    """From the mark on that it is complete: killed in between, what is left is passed over."""
    (state / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(state, ignore_errors=True)


def _digest(path: Path) -> str | None:
    return sha256(path) if path.is_file() else None
