"""Energy of a stretch of work: the difference of counters, or power sampled beside the work and integrated."""

from __future__ import annotations

import itertools
import threading
import time

from mope_deploy.bench.board import Board, Reading

__all__ = ["EnergyMeter"]

_EVERY_S = 0.05


class EnergyMeter:
    """Measures between ``with`` and its end, with a board's sensors."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self.seconds = 0.0
        self.joules: dict[str, float] = {}  # what each source spent; empty if none is reported

    def __enter__(self) -> EnergyMeter:
        self._before: Reading = self._board.read()
        self._samples = [(time.perf_counter(), self._before.watts)]
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        if self._before.watts:  # sampled from beside the work, which lets other threads run while an engine computes
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        self._began = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._began
        self._done.set()
        if self._thread is not None:
            self._thread.join()
        after = self._board.read()
        self._samples.append((time.perf_counter(), after.watts))
        self.joules = self._board.joules_between(self._before, after)
        self.joules |= {name: self._mean(name) * self.seconds for name in self._before.watts}

    def _sample(self) -> None:
        while not self._done.wait(_EVERY_S):
            self._samples.append((time.perf_counter(), self._board.watts()))

    def _mean(self, name: str) -> float:
        """Mean power by trapezoids; a sample that could not be read is passed over."""
        known = [(at, watts[name]) for at, watts in self._samples if name in watts]
        spent = sum((t1 - t0) * (p0 + p1) / 2 for (t0, p0), (t1, p1) in itertools.pairwise(known))
        span = known[-1][0] - known[0][0]
        return spent / span if span > 0 else known[0][1]
