"""Processes of their own, for what a process can only show once: its start, and its peak of memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from mope_deploy.errors import MopeError

__all__ = ["environment", "run_child"]

_ROOT = Path(__file__).parents[1]


def environment(*, threads: int) -> dict[str, str]:
    """For a process that runs this tree's code, with as many threads of OpenMP, which do not spin in wait of work."""
    paths = os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}


def run_child(code: str, *arguments: object, threads: int) -> dict[str, Any]:
    """Run Python ``code``, whose ``sys.argv[1:]`` are ``arguments``, and return the JSON of its last line.

    ``threads`` is for OpenMP, and so for PyTorch.

    Raises:
        MopeError: it failed; with the end of what it said.
    """
    call = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(call, capture_output=True, text=True, env=environment(threads=threads), check=False)
    if done.returncode:
        said = " ".join(done.stderr.split())[-300:]
        raise MopeError(f"a process that was to be measured left with exit code {done.returncode}: {said}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found
