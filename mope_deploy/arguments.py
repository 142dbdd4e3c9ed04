"""Arguments of public functions: of the type that is documented, or one line that names the argument.

numpy's integers and booleans pass for Python's; a bool never passes for a number, nor a number for a bool.
"""

from __future__ import annotations

import operator
import os
from pathlib import Path

import numpy as np

from mope_deploy.errors import UsageError
from mope_deploy.fields import shown

__all__ = ["check_flag", "check_integer", "check_path", "check_text"]


def check_integer(name: str, value: object, least: int, most: int | None = None) -> int:
    """``value`` as an int of at least ``least`` and at most ``most``.

    Raises:
        UsageError: it is none.
    """
    try:
        found = least - 1 if isinstance(value, bool | np.bool_) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        found = least - 1
    if found < least or (most is not None and found > most):
        expected = f"an integer of at least {least:,}" if most is None else f"an integer from {least:,} to {most:,}"
        raise UsageError(name, received=_said(value), expected=expected)
    return found


def check_flag(name: str, value: object) -> bool:
    """``value`` as a bool. Raises :class:`UsageError` if it is none."""
    if not isinstance(value, bool | np.bool_):
        raise UsageError(name, received=_said(value), expected="True or False")
    return bool(value)


def check_text(name: str, value: object, *, expected: str) -> str:
    """``value`` as a string. Raises :class:`UsageError` if it is none; ``expected`` says what should be there."""
    if not isinstance(value, str):
        raise UsageError(name, received=_said(value), expected=expected)
    return value


def check_path(name: str, value: object, *, expected: str) -> Path:
    """``value`` as a path. Raises :class:`UsageError` if it is none, an open file say, or no path can be so."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str) or "\0" in value or not value:
        raise UsageError(name, received=_said(value), expected=expected)
    return Path(value)


def _said(value: object) -> str:
    """A string as it is written, so that "2" is not taken for 2; of anything large the type."""
    return shown(value) if value is None or isinstance(value, str | int | float) else type(value).__name__
