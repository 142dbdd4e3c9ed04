"""Warnings and logs are switched on again, whatever overlaps."""

from __future__ import annotations

import logging
import threading
import warnings

import pytest
import torch
from torch import nn

from mope_deploy.errors import ConfigError
from mope_deploy.model.backbones.exported.dry import check_traceable
from mope_deploy.model.quiet import quiet


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


def test_a_trial_trace_waits_for_whoever_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """One lock for all: the trial of an encoder may run beside an export."""
    tracing, disabled = threading.Event(), logging.root.manager.disable

    def export(*args: object, **kwargs: object) -> None:
        tracing.set()
        assert logging.root.manager.disable == logging.CRITICAL
        raise ValueError("no graph")

    def trial() -> None:
        with pytest.raises(ConfigError, match="cannot be exported: ValueError: no graph"):
            check_traceable(nn.Linear(2, 2), lambda x: x, {"x": torch.zeros(2, 2)}, "dir:linear")

    monkeypatch.setattr(torch.export, "export", export)
    thread = threading.Thread(target=trial)
    with quiet():
        thread.start()
        assert not tracing.wait(0.2)
        assert logging.root.manager.disable == logging.WARNING
    thread.join()
    assert tracing.is_set()
    assert logging.root.manager.disable == disabled
