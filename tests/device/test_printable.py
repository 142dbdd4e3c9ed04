"""What strangers wrote is shown as it is: no terminal obeys it, and no markup is read into it."""

from __future__ import annotations

import io
import json

import pytest
from rich.table import Table
from rich.text import Text

from mope_deploy import console
from mope_deploy.errors import MopeError, printable

pytestmark = pytest.mark.device

HOSTILE = {
    "\x1b[2J": "\\u001b[2J",
    "\x07\x08\r": "\\u0007\\u0008\\u000d",
    "\x9b31m": "\\u009b31m",
    "\u202egnp.exe": "\\u202egnp.exe",
    "\u2066x\u2069": "\\u2066x\\u2069",
    "a\u2028b": "a\\u2028b",
    "\ud800": "\\ud800",
    "[red]x[/red]": "[red]x[/red]",
    "[/]": "[/]",
    ":smile:": ":smile:",
    "数 café 😀 \u200d": "数 café 😀 \u200d",
}


@pytest.mark.parametrize(("text", "seen"), HOSTILE.items())
def test_escapes(text: str, seen: str) -> None:
    assert printable(text) == seen
    assert str(MopeError(f"label {text}", received=text, todo=text)) == f"label {seen}; received {seen}; {seen}"
    quoted = json.dumps(text, ensure_ascii=False)
    assert json.loads(printable(quoted)) == text


@pytest.mark.parametrize(("text", "seen"), HOSTILE.items())
def test_whatever_is_printed(text: str, seen: str) -> None:
    screen = console.Screen(file=io.StringIO(), width=200)
    screen.print(text)
    screen.print(Text(text))
    table = Table(title=text)
    table.add_column(text)
    table.add_row(text)
    screen.print(table)
    shown = screen.file.getvalue()  # type: ignore[attr-defined]
    assert shown.count(seen) >= 4  # Text itself leaves out a bell and the like
    assert printable(shown) == shown
    assert isinstance(console.out, console.Screen)
    assert isinstance(console.err, console.Screen)
