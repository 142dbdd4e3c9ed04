"""Timing calls against each other: in turn, in one process, warm; the ratio of medians is the figure to quote."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["Ratio", "interleave", "ratio_of_medians", "summary", "warm_up"]

K = TypeVar("K")
Times = NDArray[np.float64]

_BLOCKS = 20  # of neighbouring rounds, whose ratios tell how steady a ratio is
_ROUNDS_PER_BLOCK = 3


@dataclass(frozen=True)
class Ratio:
    """Median of one ÷ median of the other, over all rounds."""

    value: float
    error: float | None  # standard, from the ratios of blocks of neighbouring rounds; None if rounds were too few

    def to_dict(self) -> dict[str, float | None]:
        """JSON-ready."""
        return {"value": self.value, "error": self.error}


def warm_up(calls: Mapping[K, Callable[[], object]], *, calls_each: int = 3, seconds: float = 0.0) -> None:
    """Call each in turn, ``calls_each`` times and for at least ``seconds`` in all, without timing anything."""
    began, done = time.perf_counter(), 0
    while done < calls_each or time.perf_counter() - began < seconds:
        for call in calls.values():
            call()
        done += 1


def interleave(calls: Mapping[K, Callable[[], object]], *, seconds: float, rounds: int = 1) -> dict[K, Times]:
    """Time every call, one of each per round, so that a slow spell of the machine meets all of them.

    The order is drawn anew for every round: what a call finds in the caches depends on the one before it.

    Args:
        calls: what to time, by name; warm already.
        seconds: how long to go on.
        rounds: at least so many, however long they take.

    Returns:
        Name → milliseconds of each round (rounds,).
    """
    taken: dict[K, list[float]] = {name: [] for name in calls}
    named = list(calls.items())
    random = np.random.default_rng(0)
    began, done = time.perf_counter(), 0
    while done < rounds or time.perf_counter() - began < seconds:
        for index in random.permutation(len(named)):
            name, call = named[index]
            start = time.perf_counter()
            call()
            taken[name].append((time.perf_counter() - start) * 1e3)
        done += 1
    return {name: np.array(values) for name, values in taken.items()}


def summary(times: Times, *, samples: int) -> dict[str, Any]:
    """Percentiles and throughput of calls (calls,) in milliseconds, with so many ``samples`` in each; JSON-ready."""
    return {
        **{f"p{share}_ms": float(np.percentile(times, share)) for share in (50, 95, 99)},
        "samples_per_s": samples * len(times) / (float(times.sum()) / 1e3),
        "calls": len(times),
    }


def ratio_of_medians(a: Times, b: Times) -> Ratio:
    """Median of ``a`` ÷ median of ``b``, both from the same rounds of :func:`interleave`."""
    assert len(a) == len(b)
    value = float(np.median(a) / np.median(b))
    blocks = min(_BLOCKS, len(a) // _ROUNDS_PER_BLOCK)
    if blocks < 2:
        return Ratio(value, None)
    pairs = zip(np.array_split(a, blocks), np.array_split(b, blocks), strict=True)
    found = np.array([np.median(one) / np.median(other) for one, other in pairs])
    return Ratio(value, float(found.std(ddof=1) / np.sqrt(blocks)))
