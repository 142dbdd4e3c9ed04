"""Work that is killed with SIGKILL at any of its file operations.

The work runs in a forked child, so that what it imports is imported once. Python's audit events count its operations on
files below one folder; what libraries in C or Rust do (a safetensors file being written) is one of them at most.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["OPERATIONS", "count", "run_killed"]

OPERATIONS = frozenset(
    {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.scandir"}
)


def run_killed(work: Callable[[], object], *, at: int, below: Path) -> bool:
    """Run ``work`` in a child that dies just before its operation number ``at``, counted from 0.

    Args:
        work: what is done; what it raises is printed, and ends the child with 1.
        at: which operation; more than there are kill nothing.
        below: only what is done in this folder counts.

    Returns:
        Whether it was killed.

    Raises:
        RuntimeError: it ended otherwise than whole.
    """
    child = os.fork()
    if child == 0:
        _run_child(work, at=at, below=below)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return True
    if status != 0:
        raise RuntimeError(f"the work that was to be killed at operation {at} ended with status {status}")
    return False


def count(work: Callable[[], object], *, below: Path) -> int:
    """How many operations ``work`` does, found by letting it do them in a child."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _run_child(work, at=-1, below=below, report=writer)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    if status != 0:
        raise RuntimeError(f"the work whose operations were to be counted ended with status {status}")
    return int(said)


def _run_child(work: Callable[[], object], *, at: int, below: Path, report: int | None = None) -> None:
    """Never returns; nothing of the parent's (a test runner's, for instance) is unwound."""
    code, done, me, root = 1, 0, os.getpid(), str(below.resolve())

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal done
        if event not in OPERATIONS or os.getpid() != me or not _inside(arguments, root):
            return
        if done == at:
            os.kill(me, signal.SIGKILL)
        done += 1

    try:
        sys.addaudithook(hook)
        work()
        if report is not None:
            os.write(report, str(done).encode())
        code = 0
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _inside(arguments: tuple[Any, ...], root: str) -> bool:
    """Whether the first argument of an event is a path below ``root``, or relative to an open folder, as rmtree's."""
    if not arguments or isinstance(arguments[0], int):
        return False
    path = os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes | os.PathLike) else ""
    by_folder = any(isinstance(one, int) and one > 2 for one in arguments[1:]) and not os.path.isabs(path)
    return path.startswith(root) or by_folder
