"""How long one sample takes in each graph here: a hint beside an export. Real measurements: benchmarks/."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.gate.session import cpu_session
from mope_deploy.bench.timing import interleave, warm_up

__all__ = ["cpu_runner", "median_seconds"]

_SECONDS, _ROUNDS = 1.0, 5  # at least, of all graphs together and of each


def cpu_runner(file: Path, feeds: Mapping[str, NDArray[Any]], parts: Sequence[Path] = ()) -> Callable[[], object]:
    """Runs a graph, and before it the ``parts`` that it needs, once in ONNX Runtime on the CPU."""
    session = cpu_session(file, parts)
    return lambda: session.run(None, dict(feeds))


def median_seconds(runners: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each, one call of each in turn, so that a slow spell of the machine meets all of them."""
    warm_up(runners)
    taken = interleave(runners, seconds=_SECONDS, rounds=_ROUNDS)
    return {name: float(np.median(milliseconds)) / 1e3 for name, milliseconds in taken.items()}
