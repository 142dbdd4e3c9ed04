"""Libraries that tell about their own steps."""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings
from collections.abc import Iterator

__all__ = ["quiet"]


_one_at_a_time = threading.RLock()


@contextlib.contextmanager
def quiet(*, level: int = logging.WARNING) -> Iterator[None]:
    """Without warnings, and without logs up to ``level``: nothing in them that a user can act on.

    Both are switched off for the whole process, by one thread at a time: two that overlapped would put back what the
    other had set, and leave it so for good.
    """
    with _one_at_a_time:
        before = logging.root.manager.disable
        logging.disable(max(before, level))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            logging.disable(before)
