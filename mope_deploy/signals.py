"""How a command line ends when it is told to: what it holds is put away, and no traceback is shown."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["Interrupted", "interrupts"]

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_RETRY_S = 0.05


class Interrupted(KeyboardInterrupt):
    """A signal told this process to end.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def interrupts(*, last: bool) -> Iterator[None]:
    """Inside this block SIGINT, SIGTERM and SIGHUP raise :class:`Interrupted`, so that every ``finally`` runs.

    A second signal does not interrupt that; a third one ends the process at once. Signals that are ignored stay so,
    handlers of an application stay, and elsewhere than in the main thread nothing is changed.

    Args:
        last: whether the process ends after the block: once interrupted, it then stays deaf to more of it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received, process = 0, os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal received
        if os.getpid() != process:  # a forked child, a worker for instance: the signal ends it at once
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        received += 1
        if received == 1:
            raise Interrupted(number)
        if received > 2:
            os._exit(128 + number)

    def lost(unraisable: Any) -> None:
        """An exception is dropped where it is raised in a finaliser; the signal is then sent again, outside of it."""
        nonlocal received
        if not isinstance(unraisable.exc_value, Interrupted):
            hook(unraisable)
            return
        received = 0
        threading.Timer(_RETRY_S, os.kill, (os.getpid(), unraisable.exc_value.number)).start()

    hook, sys.unraisablehook = sys.unraisablehook, lost
    ours = (signal.SIG_DFL, signal.default_int_handler)
    before = {number: handler for number in _SIGNALS if (handler := signal.getsignal(number)) in ours}
    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if last and received else handler)
        sys.unraisablehook = hook
