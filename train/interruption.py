"""SIGINT and SIGTERM: training ends after the current step; a second signal ends it at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist

from mope_deploy.console import err
from mope_deploy.signals import Interrupted

__all__ = ["Interruption"]

SAME_SIGNAL_S = 2.0  # torchrun passes on the interrupt that a terminal has sent to its processes already


class Interruption:
    """Whether this run was told to stop. Outside :meth:`postponed` either signal is a KeyboardInterrupt.

    Attributes:
        received: whether a signal came (to this process or, after :meth:`anywhere`, to any of them).
    """

    def __init__(self) -> None:
        self.received = False
        self._first = 0.0
        self._postponed = False
        self._process = os.getpid()

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle the signals inside this block; elsewhere than in the main thread nothing is changed."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def postponed(self) -> Iterator[None]:
        """Inside this block a first signal only sets :attr:`received`."""
        self._postponed = True
        try:
            yield
        finally:
            self._postponed = False

    def anywhere(self, device: torch.device) -> bool:
        """Whether any process was told to stop; every one of them must ask."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            flag = torch.tensor(float(self.received), device=device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            self.received = bool(flag.item())
        return self.received

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a worker of the data loader: its parent ends it
        if not self._postponed or (self.received and time.monotonic() - self._first > SAME_SIGNAL_S):
            raise Interrupted(number)
        if not self.received:
            self.received, self._first = True, time.monotonic()
            if os.environ.get("RANK", "0") == "0":
                err.print("stopping after this step; interrupt again to stop at once", markup=False)
