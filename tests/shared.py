"""What takes seconds to make, and is the same for every worker of a run: made by the first that asks for it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

__all__ = ["once", "shared_folder"]


def shared_folder(factory: pytest.TempPathFactory, name: str) -> Path:
    """A folder of this name that all workers of the run have in common."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    folder.mkdir(exist_ok=True)
    return folder


def once(file: Path, make: Callable[[Path], object]) -> Path:
    """``file``, made by ``make`` (at a path that it is given) where no worker has made it; others wait meanwhile."""
    with file.with_name(f"{file.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists():
            unfinished = file.with_name(f"unfinished-{file.name}")
            make(unfinished)
            unfinished.rename(file)
    return file
