"""What the reports of both gates are made of."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from rich.table import Table
from rich.text import Text

from mope_deploy.errors import ParityError

__all__ = ["InterfaceCheck", "Report", "json_safe", "percent", "require", "table_of", "verdict", "wrong"]


@dataclass(frozen=True)
class InterfaceCheck:
    """One property of the file that can only be right or wrong: a name, a dtype, the axes, that it runs."""

    what: str
    received: str
    expected: str

    @property
    def passed(self) -> bool:
        return self.received == self.expected


class Report(ABC):
    """What a gate found on a file."""

    file: str

    @abstractmethod
    def problems(self) -> list[str]:
        """Everything that failed as a phrase."""

    @property
    def passed(self) -> bool:
        return not self.problems()


R = TypeVar("R", bound=Report)


def require(report: R, otherwise: str) -> R:
    """``report`` if it passed.

    Raises:
        ParityError: ``otherwise``, and what failed.
    """
    if not report.passed:
        shown = report.problems()
        more = f"; and {len(shown) - 4} more" if len(shown) > 4 else ""
        raise ParityError(f"{report.file} {otherwise}: {'; '.join(shown[:4])}{more}")
    return report


def wrong(checks: Sequence[InterfaceCheck]) -> list[str]:
    """Those that failed, as phrases."""
    return [
        f"{check.what}: received {check.received}, expected {check.expected}" for check in checks if not check.passed
    ]


def table_of(title: str, required: str, interface: Sequence[InterfaceCheck]) -> Table:
    """For a terminal, one line a check: so far what is wrong with the interface."""
    table = Table(title=title, title_justify="left", caption_justify="left")
    for column in ("check", "compared", "result", required, ""):
        table.add_column(column, justify="left" if column == "check" else "right")
    for check in interface:
        if not check.passed:
            table.add_row(check.what, "", check.received, check.expected, verdict(False))
    return table


def percent(share: float) -> str:
    """Rounded down, so that what failed never reads as what was required."""
    return f"{math.floor(round(share * 1e4, 6)) / 100:.2f} %"


def verdict(passed: bool) -> Text:
    """For a cell of a table."""
    return Text("pass", "green") if passed else Text("FAIL", "red")


def json_safe(value: Any) -> Any:
    """``value`` with NaN and infinities as text: JSON has none."""
    if isinstance(value, dict):
        return {key: json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(item) for item in value]
    return str(value) if isinstance(value, float) and not np.isfinite(value) else value
