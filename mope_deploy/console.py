"""What the three command lines share: errors as one line with an exit code, and a terminal or a plain log.

Exit codes: 0 success, 1 failure, 2 misuse, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text
from typer.main import get_command

from mope_deploy.errors import MopeError, printable

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Screen", "err", "out", "print_table", "run_app"]


class Screen(Console):
    """Shows every text as it is, whoever wrote it: no markup is read, and nothing reaches a terminal to be obeyed."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, emoji=False, markup=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)  # before lines are broken and columns measured

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for one in super().render(renderable, options):
            yield one if one.control else Segment(printable(one.text), one.style)


out = Screen(soft_wrap=True)
err = Screen(stderr=True, soft_wrap=True)


def print_table(table: Table) -> None:
    """At its full width, so that nothing is cut where output is piped or the terminal is narrow."""
    Screen(width=10_000).print(table)


def run_app(app: typer.Typer, argv: Sequence[str] | None = None, *, name: str | None = None) -> int:
    """Run a typer application and return its exit code; never lets a traceback reach the user.

    Set ``MOPE_DEBUG=1`` to see the traceback of any failure.

    Args:
        app: the application.
        argv: its arguments; the process's own by default.
        name: what its help calls it; the process's own name by default.
    """
    try:
        result = get_command(app).main(args=None if argv is None else list(argv), prog_name=name, standalone_mode=False)
    except MopeError as error:
        if os.environ.get("MOPE_DEBUG"):
            raise
        err.print(f"error: {error}", markup=False)
        return error.exit_code
    except KeyboardInterrupt:
        err.print("interrupted", markup=False)
        return 130
    except BrokenPipeError:
        # The reader of our output left (`mope info … | head`): not an error of ours.
        sys.stderr.close()
        return 0
    except Exception as error:
        if os.environ.get("MOPE_DEBUG"):
            raise
        return _click_exit_code(error)
    return result if isinstance(result, int) else 0


def _click_exit_code(error: Exception) -> int:
    """Exit code for click's own exceptions (bad option, missing argument) and for what nobody foresaw."""
    show, code = getattr(error, "show", None), getattr(error, "exit_code", None)
    if callable(show) and isinstance(code, int):
        show()
        return code
    if type(error).__name__ == "Abort":
        err.print("interrupted", markup=False)
        return 130
    err.print(
        f"error: unexpected {type(error).__name__}: {error}\nset MOPE_DEBUG=1 to see where, and please report it",
        markup=False,
    )
    return 1
