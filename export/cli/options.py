"""Options that both commands have."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from export.limits import GATE_SAMPLES
from mope_deploy import __version__
from mope_deploy.console import out
from mope_deploy.errors import UsageError

__all__ = ["Data", "GateSamples", "Report", "Run", "Samples", "Seed", "Version", "check_report", "new_app", "unset"]


def new_app() -> typer.Typer:
    return typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)


def _print_version(asked: bool) -> None:
    if asked:
        out.print(f"mope-export {__version__}", markup=False)
        raise typer.Exit


unset = partial(typer.Option, show_default=False)  # without a value it is None

Run = Annotated[str, typer.Argument(metavar="RUN", help="What to export.", show_default=False)]
Data = Annotated[
    Path | None,
    typer.Option(metavar="JSONL", help="Real samples for the comparison; default: the run's test split."),
]
Samples = Annotated[int | None, unset(min=1, help="How many of them; default: enough for 128 logits.")]
GateSamples = Annotated[
    int | None,
    unset(
        min=1, help=f"Real samples that precisions below fp32 are judged on, or all there are. Default: {GATE_SAMPLES}."
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Of generated inputs and of the choice of samples.")]
Report = Annotated[
    Path | None, typer.Option(metavar="JSON", help="Also write the full report of the comparison, passed or not.")
]
Version = Annotated[
    bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and stop.")
]


def check_report(report: Path | None) -> None:
    """A report that could not be written is found out before any work."""
    if report is not None and not report.absolute().parent.is_dir():
        raise UsageError("--report", received=report, expected="a file in a folder that is there")
