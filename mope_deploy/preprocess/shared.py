"""What every modality's preparation shares."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from mope_deploy.errors import MediaError

__all__ = ["Notice", "Tensors", "check_file", "describe", "one_line"]

Tensors = dict[str, tuple[str, tuple[int | str, ...]]]  # name → dtype and axes: sizes, or names of those that vary
Notice = Callable[[str], None]  # told what a user should know about an input that was used all the same


def describe(kind: str, source: object) -> str:
    """What an error message calls an input: ``audio clips/a.wav``."""
    return f"{kind} {os.fspath(source)}" if isinstance(source, str | os.PathLike) else f"{kind} given as an array"


def check_file(path: Path, name: str, *, expected: str) -> None:
    """A file that can be opened and is not empty.

    Raises:
        MediaError: it is not; ``name`` is what the message calls it, ``expected`` what should be there.
    """
    try:
        if path.is_dir():
            raise MediaError(f"{name} is a folder", expected=expected)
        if path.stat().st_size == 0:
            raise MediaError(f"{name} is empty (0 bytes)")
        with path.open("rb"):
            pass
    except FileNotFoundError as error:
        raise MediaError(f"{name} does not exist") from error
    except PermissionError as error:
        raise MediaError(f"{name} cannot be read", received="permission denied") from error
    except (OSError, ValueError) as error:
        raise MediaError(f"{name} cannot be read", received=one_line(error)) from error


def one_line(error: BaseException) -> str:
    """A library's error as part of one of our messages."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
