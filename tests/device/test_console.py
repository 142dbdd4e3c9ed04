"""What every command line does with signals, with errors of the system, and with a standard output that fails."""

from __future__ import annotations

import errno
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import typer
from rich.table import Table

from mope_deploy import console
from mope_deploy.cli.printing import print_json

pytestmark = pytest.mark.device

WAITS = """
import sys, time, typer
from mope_deploy.console import run_app
app = typer.Typer()
@app.command()
def wait():
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        time.sleep(0.3)
        print("cleaned", flush=True)
sys.exit(run_app(app))
"""


@pytest.mark.parametrize(
    ("signals", "code", "line"),
    [
        ([signal.SIGINT], 130, "interrupted"),
        ([signal.SIGINT, signal.SIGINT], 130, "interrupted"),
        ([signal.SIGTERM], 143, "ended by SIGTERM"),
        ([signal.SIGHUP, signal.SIGINT], 129, "ended by SIGHUP"),
    ],
)
def test_a_signal_ends_a_command_after_its_clean_up_in_one_line(signals: Sequence[int], code: int, line: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WAITS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        for number in signals:
            process.send_signal(number)
            time.sleep(0.1)
        assert process.stdout.read() == "cleaned\n"
        assert process.stderr.read() == f"{line}\n"
    assert process.returncode == code


def test_an_ignored_signal_stays_ignored() -> None:
    """As nohup has it."""
    script = f"import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n{WAITS.replace('60', '0.5')}"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGHUP)
        process.communicate()
    assert process.returncode == 0


def failing(error: BaseException, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    app = typer.Typer()

    @app.command()
    def fail() -> None:
        raise error

    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    code = console.run_app(app, [])
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    return code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/x.bin"), ["/data/x.bin: No space left", "free space"]),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/root/x"), ["/root/x: Permission", "permissions"]),
        (OSError(errno.EROFS, os.strerror(errno.EROFS), "/ro/x"), ["/ro/x: Read-only", "can be written"]),
        (OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), "x" * 300), ["too long", "shorter"]),
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE), "a"), ["Too many open files", "ulimit"]),
        (OSError(errno.EXDEV, os.strerror(errno.EXDEV), "a", None, "b"), ["a and b: "]),
        (OSError("odd"), ["odd"]),
        (MemoryError(), ["out of memory"]),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you"), ["out of memory", "smaller"]),
    ],
)
def test_what_the_machine_refuses_is_one_line(
    error: Exception, words: Sequence[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, shown = failing(error, capsys)
    assert code == 1
    assert shown.startswith("error: ")
    assert shown.count("\n") == 1
    assert "unexpected" not in shown
    for word in words:
        assert word in shown


def test_what_nobody_foresaw_says_how_to_report_it(capsys: pytest.CaptureFixture[str]) -> None:
    code, shown = failing(LookupError("odd"), capsys)
    assert code == 1
    assert "unexpected LookupError: odd" in shown
    assert "MOPE_DEBUG" in shown


@pytest.mark.parametrize(
    ("redirect", "words"), [(">/dev/full", "No space left on device"), (">&-", "standard output is closed")]
)
@pytest.mark.parametrize("command", ["--help", "--version"])
def test_a_standard_output_that_fails(redirect: str, words: str, command: str) -> None:
    line = f'"{sys.executable}" -m mope_deploy {command} {redirect}'
    found = subprocess.run(["sh", "-c", line], capture_output=True, text=True)
    assert found.returncode == 1
    assert found.stderr.startswith("error: standard output")
    assert words in found.stderr
    assert found.stderr.count("\n") == 1


def test_json_is_utf8_in_any_locale(monkeypatch: pytest.MonkeyPatch) -> None:
    binary = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(binary, encoding="ascii"))
    print_json({"label": "größer"})
    sys.stdout.flush()
    assert binary.getvalue().decode("utf-8") == '{\n  "label": "größer"\n}\n'


def test_a_narrow_terminal_gets_no_padding(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_row("short", "x")
    table.add_row("long", "y" * 300)
    console.print_table(table)
    assert capsys.readouterr().out.splitlines() == ["short  x", f"long   {'y' * 300}"]


def test_a_missing_dependency_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise ModuleNotFoundError(name='typer')\n", encoding="utf-8")
    found = entry("mope", path=tmp_path)
    assert (found.returncode, found.stderr.count("\n")) == (2, 1)
    assert found.stderr.startswith("error: the package 'typer'")


@pytest.mark.parametrize(("command", "needs"), [("mope", (3, 10)), ("mope_train", (3, 11)), ("mope_export", (3, 11))])
def test_an_old_python_is_named(
    command: str, needs: tuple[int, int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mope_deploy import entry

    monkeypatch.setattr(sys, "version_info", (needs[0], needs[1] - 1, 9))
    assert getattr(entry, command)() == 2
    assert f"received 3.{needs[1] - 1}; expected 3.{needs[1]} or newer" in capsys.readouterr().err


def entry(command: str, *, path: Path) -> subprocess.CompletedProcess[str]:
    """The installed command in a process of its own, with a folder first on its path."""
    root = Path(console.__file__).parent.parent
    script = f"import sys; from mope_deploy.entry import {command}; sys.exit({command}())"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(path), str(root)))}
    command_line = [sys.executable, "-c", script, "--help"]
    return subprocess.run(command_line, capture_output=True, text=True, env=environment, cwd=path)
