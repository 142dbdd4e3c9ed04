"""What commands print: results on standard output, all else on standard error, and no markup read into either."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from rich.table import Table
from rich.text import Text

from mope_deploy import console
from mope_deploy.errors import printable
from mope_deploy.files import json_bytes

__all__ = ["print_json", "print_rows", "print_utf8", "say", "tell"]

say = partial(console.out.print, markup=False)
tell = partial(console.err.print, markup=False)


def print_json(value: Any) -> None:
    """To standard output, indented."""
    print_utf8(json_bytes(value).decode())


def print_utf8(text: str) -> None:
    """To standard output as it is, in UTF-8 whatever the locale: programs read it."""
    binary = getattr(sys.stdout, "buffer", None)
    if binary is None:  # an application's own stream of text
        sys.stdout.write(text)
        return
    sys.stdout.flush()
    binary.write(text.encode("utf-8"))


def print_rows(
    rows: Iterable[Sequence[object]], *, header: Sequence[str] = (), left: int = 1, title: str | None = None
) -> None:
    """Print a table at its full width; of the columns with a name, ``left`` begin at the left and others end right."""
    table = Table(
        show_header=bool(header), box=None, pad_edge=False, title=title and Text(printable(title)), title_justify="left"
    )
    for i, name in enumerate(header):
        table.add_column(Text(name), justify="left" if i < left else "right")
    for row in rows:
        table.add_row(*(Text(printable(str(cell))) for cell in row))
    console.print_table(table)
