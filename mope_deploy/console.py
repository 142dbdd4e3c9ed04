"""What the three command lines share: errors as one line with an exit code, and a terminal or a plain log.

Exit codes: 0 success, 1 failure, 2 misuse, 130 interrupted, 143 ended by SIGTERM.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment, Segments
from rich.text import Text
from typer.main import get_command

from mope_deploy.errors import MopeError, printable
from mope_deploy.signals import Interrupted, interrupts
from mope_deploy.system import of_output, of_system, out_of_memory

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


_NOT_FOR_USERS = r"PIL\.|mope_deploy\.bench\.plot"  # modules whose warnings these are


def print_table(table: Table) -> None:
    """At its full width, so that nothing is cut where output is piped or the terminal is narrow.

    Lines end where their text does: padded to the longest one, each would take two lines of a narrow terminal.
    """
    screen = Screen(width=10_000)
    for line in screen.render_lines(table, pad=False):
        while line and not line[-1].text.strip():
            line.pop()
        if line:
            line[-1] = Segment(line[-1].text.rstrip(), line[-1].style)
        screen.print(Segments([*line, Segment.line()]), end="")


def run_app(
    app: typer.Typer, argv: Sequence[str] | None = None, *, name: str | None = None, last: bool | None = None
) -> int:
    """Run a typer application and return its exit code; never lets a traceback reach the user.

    Set ``MOPE_DEBUG=1`` to see the traceback of any failure, and ``PYTHONWARNINGS`` to see libraries' warnings that are
    not for the user of a command: Pillow's on pictures that are read all the same, letters that a font lacks. They are
    hidden here, not where they arise: filters are the whole process's, which is a command line's own.

    Args:
        app: the application.
        argv: its arguments; the process's own by default.
        name: what its help calls it; the process's own name by default.
        last: whether the process ends afterwards; by default where ``argv`` is the process's own.
    """
    if sys.stdout is None:
        err.print("error: standard output is closed; send it to a file, or to /dev/null", markup=False)
        return 1
    if argv is None and isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that lacks a letter shows its number
    command = get_command(app)
    invoke = command.invoke

    def invoke_or_stop(context: Any) -> Any:
        """typer would turn an interrupt into an exit code without a word."""
        try:
            return invoke(context)
        except KeyboardInterrupt as interrupt:
            raise _Stopped(interrupt) from None

    command.invoke = invoke_or_stop  # type: ignore[method-assign, assignment]
    try:
        with interrupts(last=argv is None if last is None else last), warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.filterwarnings("ignore", module=_NOT_FOR_USERS)
            arguments = None if argv is None else list(argv)
            result = command.main(args=arguments, prog_name=name, standalone_mode=False)
            sys.stdout.flush()  # while there is someone to say that it could not be
    except (_Stopped, KeyboardInterrupt) as stop:
        return _interrupted(stop.interrupt if isinstance(stop, _Stopped) else stop)
    except Exception as error:
        if os.environ.get("MOPE_DEBUG"):
            raise
        return _failed(error)
    return result if isinstance(result, int) else 0


class _Stopped(BaseException):
    """An interrupt on its way past typer."""

    def __init__(self, interrupt: KeyboardInterrupt) -> None:
        super().__init__()
        self.interrupt = interrupt


def _interrupted(interrupt: KeyboardInterrupt) -> int:
    number = interrupt.number if isinstance(interrupt, Interrupted) else signal.SIGINT
    err.print("interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}", markup=False)
    return 128 + number


def _failed(error: Exception) -> int:
    """Exit code for an exception, after one line about it."""
    show, code = getattr(error, "show", None), getattr(error, "exit_code", None)
    if isinstance(error, MopeError):
        code, line = error.exit_code, str(error)
    elif isinstance(error, BrokenPipeError):
        # The reader of our output left (`mope info … | head`): not an error of ours.
        _drop_output()
        return 0
    elif isinstance(error, OSError):
        code, line = 1, of_system(error)
        if of_output(error):
            _drop_output()
    elif callable(show) and isinstance(code, int):  # click's own: a bad option, a missing argument
        show()
        return code
    elif type(error).__name__ == "Abort":
        code, line = 130, None
    elif (line := out_of_memory(error)) is not None:
        code = 1
    elif isinstance(error, ModuleNotFoundError):
        code, line = 2, f"the package {error.name!r} is not installed; install mope-deploy with its dependencies"
    else:
        told = f"{type(error).__name__}: {error}"
        code, line = 1, f"unexpected {told}\nset MOPE_DEBUG=1 to see where, and please report it"
    err.print("interrupted" if line is None else f"error: {line}", markup=False)
    return code


def _drop_output() -> None:
    """What standard output still holds has nowhere to go; Python would try again at its end, and say so."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
