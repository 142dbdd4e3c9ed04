"""How long one sample takes in each graph here: a hint beside an export. Real measurements: benchmarks/."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnxruntime as ort
from numpy.typing import NDArray

__all__ = ["cpu_runner", "median_seconds"]

_WARM_UP, _ROUNDS, _LIMIT_S = 3, 21, 5.0


def cpu_runner(file: Path, feeds: Mapping[str, NDArray[Any]]) -> Callable[[], object]:
    """Runs a graph once in ONNX Runtime on the CPU; its threads do not spin, which would slow down whatever follows."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, dict(feeds))


def median_seconds(runners: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each, one call of each in turn, so that a slow spell of the machine meets all of them."""
    for run in runners.values():
        for _ in range(_WARM_UP):
            run()
    times: dict[str, list[float]] = {name: [] for name in runners}
    began = time.perf_counter()
    for _ in range(_ROUNDS):
        for name, run in runners.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
        if time.perf_counter() - began > _LIMIT_S:
            break
    return {name: statistics.median(found) for name, found in times.items()}
