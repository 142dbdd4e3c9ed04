"""What both commands show while they work, and what they leave: steps, rows of text, the report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mope_deploy.console import err, out
from mope_deploy.errors import ExportError
from mope_deploy.files import json_bytes, write_file

if TYPE_CHECKING:
    from export.gate import ParityReport, PrecisionReport
    from export.source import Source
    from mope_deploy.model import MoPE

__all__ = ["load", "print_rows", "size", "steps", "write_report"]

PLAIN_EVERY_S = 5.0


@contextmanager
def steps() -> Iterator[Callable[[str | None], None]]:
    """Show what is being done: a spinner on a terminal, plain lines elsewhere; None clears the way for other output."""
    if not err.is_terminal:
        last, shown = "", 0.0

        def plain(text: str | None) -> None:
            """A line for each new step; of the batches within one only now and then."""
            nonlocal last, shown
            step = (text or "").partition(" (")[0]
            if step and (step != last or time.monotonic() - shown > PLAIN_EVERY_S):
                err.print(f"{text if step == last else step} …", markup=False)
                last, shown = step, time.monotonic()

        yield plain
        return
    status = err.status("starting")

    def show(text: str | None) -> None:
        if text is None:
            status.stop()
        else:
            status.update(f"{text} …")
            status.start()

    try:
        yield show
    finally:
        status.stop()


def load(source: Source) -> MoPE:
    """The trained model, without progress bars of its single weights: our own steps are shown."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    return source.load()


def write_report(path: Path, reports: Mapping[str, ParityReport | PrecisionReport]) -> None:
    """The full reports as JSON, by name."""
    write_file(path, json_bytes({name: report.to_dict() for name, report in reports.items()}), error=ExportError)


def print_rows(rows: Mapping[str, str]) -> None:
    """A name and a text a line."""
    for name, text in rows.items():
        out.print(f"{name:<12}{text}", markup=False)


def size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
