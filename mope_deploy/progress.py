"""Progress of long work: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mope_deploy.console import err

__all__ = ["track"]

T = TypeVar("T")
_PLAIN_EVERY_S = 5.0


def track(items: Iterable[T], *, what: str, total: int | None = None) -> Iterator[T]:
    """Yield ``items``, reporting progress on standard error.

    Args:
        items: the work.
        what: a few words naming it, shown beside the bar.
        total: number of items, if ``items`` has no length.
    """
    if total is None and hasattr(items, "__len__"):
        total = len(items)  # type: ignore[arg-type]
    if err.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=err, transient=True) as bar:
            yield from bar.track(items, total=total, description=what)
        return
    last = time.monotonic()
    for count, item in enumerate(items, start=1):
        yield item
        if time.monotonic() - last > _PLAIN_EVERY_S:
            last = time.monotonic()
            err.print(f"{what}: {count}" + (f"/{total}" if total else ""), markup=False)
