"""SIGTERM is an interrupt with an exit code of its own; tests/device/test_console.py has it in processes."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
import typer

from mope_deploy.console import run_app
from mope_deploy.files import whole_folder
from mope_deploy.signals import Interrupted, interrupts

pytestmark = pytest.mark.device


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_command_that_is_ended_cleans_up(tmp_path: Path, number: signal.Signals, code: int) -> None:
    app = typer.Typer()

    @app.command()
    def work() -> None:
        with whole_folder(tmp_path / "target") as folder:
            (folder / "half").touch()
            os.kill(os.getpid(), number)
            signal.pause()

    assert run_app(app, []) == code
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_handler_that_is_there_stays() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    try:
        with interrupts(last=False):
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM]


def test_other_threads_and_forked_children_are_let_be() -> None:
    def in_a_thread() -> None:
        with interrupts(last=False):
            handlers.append(signal.getsignal(signal.SIGTERM))

    handlers: list[object] = []
    thread = threading.Thread(target=in_a_thread)
    thread.start()
    thread.join()
    assert handlers == [signal.SIG_DFL]
    with interrupts(last=False):
        child = os.fork()
        if child == 0:
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                signal.pause()
            finally:
                os._exit(9)
        assert os.waitpid(child, 0)[1] == signal.SIGTERM, "ended by the signal itself"
    with pytest.raises(Interrupted), interrupts(last=False):
        signal.raise_signal(signal.SIGTERM)
