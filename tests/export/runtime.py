"""Files in ONNX Runtime's CPU provider, reproducibly."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from tests.tiny import tiny_inputs

__all__ = ["Arrays", "feeds", "run", "run_named"]

Arrays = dict[str, NDArray[Any]]


def feeds(batch: int, length: int, *, seed: int = 0) -> Arrays:
    """Images and padded texts; row i has length − (i mod length) real tokens."""
    return {name: tensor.numpy() for name, tensor in tiny_inputs(batch, length, seed=seed).items()}


def run(file: Path, inputs: Mapping[str, NDArray[Any]]) -> list[NDArray[np.float32]]:
    """Every output of a file."""
    return list(run_named(file, inputs).values())


def run_named(file: Path, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
    """Every output of a file by name, of those inputs that it has."""
    session = _session(file, file.stat().st_mtime_ns)
    given = {tensor.name: inputs[tensor.name] for tensor in session.get_inputs()}
    return dict(zip((tensor.name for tensor in session.get_outputs()), session.run(None, given), strict=True))


@lru_cache(maxsize=4)
def _session(file: Path, written: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
