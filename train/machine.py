"""The machine that training runs on: device, processes, threads."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list

from mope_deploy.errors import ConfigError, UsageError
from train.config import Recipe

__all__ = ["Machine", "check_room", "set_up"]

PACKAGES = ("mope-deploy", "torch", "timm", "transformers", "accelerate")  # whose versions a run records


@dataclass(frozen=True)
class Machine:
    """Where training runs, and whether this process is the one that writes files."""

    state: PartialState
    device: torch.device
    processes: int
    writes: bool
    threads: int

    @property
    def cpu(self) -> bool:
        return self.device.type == "cpu"

    def agree(self, choice: Path | None) -> Path:
        """The main process's choice, in every process."""
        chosen = [choice]
        if self.processes > 1:
            broadcast_object_list(chosen)
        assert chosen[0] is not None
        return chosen[0]

    def describe(self) -> dict[str, Any]:
        """For ``run.json``."""
        return {
            "device": platform.machine() if self.cpu else torch.cuda.get_device_name(self.device),
            "processes": self.processes,
            "threads": self.threads,
            "python": platform.python_version(),
            "versions": {name: version(name) for name in PACKAGES},
        }


def check_room(folder: Path, *, trained: int, total: int) -> None:
    """Whether a run can be written: three resume states, three checkpoints, and the encoders where they are stored.

    Args:
        folder: of the run, which need not be there.
        trained: parameters that are trained; a resume state has three numbers for each.
        total: parameters of stored encoders, else 0.

    Raises:
        UsageError: nothing can be written there, or the disk is too full.
    """
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"run folder {folder} cannot be made", received=f"{there} cannot be written to")
    needed, free = 4 * (12 * trained + 2 * total), shutil.disk_usage(there).free
    if free < needed:
        raise UsageError(
            f"too little room on the disk of {there}",
            received=f"{free / 1e6:,.0f} MB free",
            expected=f"about {needed / 1e6:,.0f} MB for resume states and checkpoints",
            todo="make room, or choose another run.dir",
        )


def set_up(recipe: Recipe) -> Machine:
    """Set up device, processes and threads as the recipe asks.

    Raises:
        ConfigError: the machine has not what the recipe needs.
    """
    section = recipe.train
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    gpu = torch.cuda.is_available()
    problems = []
    if section.device == "cuda" and not gpu:
        problems.append("train.device: received cuda, but PyTorch finds no GPU here")
    cpu = section.device == "cpu" or not gpu
    if section.precision == "bf16" and not cpu and not torch.cuda.is_bf16_supported():
        problems.append("train.precision: received bf16, which this GPU cannot compute; expected fp16 or fp32")
    if section.precision == "fp16" and cpu:
        problems.append("train.precision: received fp16, which needs a GPU; expected bf16 or fp32 on a CPU")
    parts = processes * section.accumulation
    if section.batch_size % parts:
        what = f"{processes} processes × {section.accumulation} accumulation steps"
        problems.append(f"train.batch_size: received {section.batch_size}, expected a multiple of {parts} ({what})")
    if problems:
        raise ConfigError("; ".join(problems))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", str(processes)))
    if section.threads is not None:
        torch.set_num_threads(section.threads)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local))
    AcceleratorState._reset_state()  # accelerate keeps one precision a process, but a script may train twice
    state = PartialState(cpu=cpu)
    return Machine(state, state.device, processes, state.is_main_process, torch.get_num_threads())
