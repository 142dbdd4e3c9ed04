"""What every modality's preparation shares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["Notice", "Tensors", "jsonable", "one_line"]

Tensors = dict[str, tuple[str, tuple[int | str, ...]]]  # name → dtype and axes: sizes, or names of those that vary
Notice = Callable[[str], None]  # told what a user should know about an input that was used all the same


def jsonable(spec: Mapping[str, Any]) -> dict[str, Any]:
    """``dataclasses.asdict`` of a specification with tuples as JSON has them."""
    return {
        key: list(value) if isinstance(value, tuple) else jsonable(value) if isinstance(value, dict) else value
        for key, value in spec.items()
    }


def one_line(error: BaseException) -> str:
    """A library's error as part of one of our messages."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
