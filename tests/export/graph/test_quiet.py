"""Warnings and logs are switched on again, whatever overlaps."""

from __future__ import annotations

import logging
import threading
import warnings

from export.graph.quiet import quiet


def test_two_that_overlap_put_back_what_was_there() -> None:
    """The first one in leaves first: it must not end the second's quiet, nor the second restore the first's."""
    before, disabled = list(warnings.filters), logging.root.manager.disable
    inside, others = threading.Event(), threading.Event()

    def second() -> None:
        inside.wait()
        others.set()
        with quiet():
            assert logging.root.manager.disable == logging.WARNING

    thread = threading.Thread(target=second)
    thread.start()
    with quiet():
        inside.set()
        others.wait()
        with quiet():  # of the same thread
            pass
        assert logging.root.manager.disable == logging.WARNING
    thread.join()
    assert (list(warnings.filters), logging.root.manager.disable) == (before, disabled)


def test_what_the_caller_had_switched_off_stays_off() -> None:
    logging.disable(logging.CRITICAL)
    try:
        with quiet():
            assert logging.root.manager.disable == logging.CRITICAL
        assert logging.root.manager.disable == logging.CRITICAL
    finally:
        logging.disable(logging.NOTSET)
