"""The process's random state, which belongs to the caller."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["forked"]

_one_at_a_time = threading.RLock()


@contextmanager
def forked() -> Iterator[None]:
    """Draw from the CPU's generator, which is afterwards as it was.

    One thread at a time: of two that overlapped, one would put back what the other had drawn from.
    """
    with _one_at_a_time, torch.random.fork_rng(devices=[]):
        yield
