"""SIGTERM as an interrupt: what was begun is undone as after Ctrl-C, and the exit code says which of both it was."""

from __future__ import annotations

import functools
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import ParamSpec

__all__ = ["INTERRUPTED", "TERMINATED", "Terminated", "ends_on_sigterm"]

INTERRUPTED, TERMINATED = 130, 143  # 128 + the signal's number, as shells have it

P = ParamSpec("P")


class Terminated(KeyboardInterrupt):
    """SIGTERM came; whoever cleans up after Ctrl-C cleans up after this."""


def ends_on_sigterm(main: Callable[P, int]) -> Callable[P, int]:
    """A command's ``main``, which returns an exit code, so that SIGTERM interrupts it and the code is 143.

    Another handler than the system's own, and a call outside the main thread, are let be; so are forked children, which
    SIGTERM ends at once.
    """

    @functools.wraps(main)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> int:
        main_thread = threading.current_thread() is threading.main_thread()
        if not main_thread or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
            return main(*args, **kwargs)
        received, process = False, os.getpid()

        def handle(number: int, frame: FrameType | None) -> None:
            nonlocal received
            if os.getpid() != process:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            received = True
            raise Terminated

        signal.signal(signal.SIGTERM, handle)
        try:
            code = main(*args, **kwargs)
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return TERMINATED if received and code == INTERRUPTED else code

    return wrapped
