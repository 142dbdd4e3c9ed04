"""A saved graph, loaded fresh in ONNX Runtime, and whether it looks from outside as it was asked to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from export.exporter_config import MoPEExporterConfig
from export.report import InterfaceCheck
from mope_deploy.engines.session import alone

__all__ = ["RUNTIME", "cpu_session", "open_graph", "reason", "run_graph"]

RUNTIME = f"onnxruntime {ort.__version__} on the CPU"


def cpu_session(file: Path) -> ort.InferenceSession:
    """A fresh session on the CPU; raises whatever ONNX Runtime raises."""
    options = ort.SessionOptions()
    options.log_severity_level = 4  # every error is raised as well
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # waiting threads starve busy machines
    return ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def run_graph(
    session: ort.InferenceSession,
    feeds: Mapping[str, NDArray[Any]],
    outputs: Sequence[str],
    *,
    config: MoPEExporterConfig,
    precision: str,
) -> dict[str, NDArray[Any]]:
    """Outputs by name, run as a device does: int8-dynamic one sample at a time, as its ranges are of whole tensors."""
    shapes = {name: shape for name, (_, shape) in config.input_shapes.items()}
    parts = alone(feeds, shapes) if precision == "int8-dynamic" else [feeds]
    found = [session.run(list(outputs), dict(part)) for part in parts]
    return {name: np.concatenate(arrays) for name, arrays in zip(outputs, zip(*found, strict=True), strict=True)}


def open_graph(file: Path, config: MoPEExporterConfig) -> tuple[ort.InferenceSession | None, list[InterfaceCheck]]:
    """A fresh session on the saved file, None if anything is wrong with it; and what was checked.

    Args:
        file: the graph as saved.
        config: what it was asked to be: inputs, outputs, dtypes, axes, in order.
    """
    try:
        session = cpu_session(file)
    except Exception as error:  # the library's own exceptions share no base class but this
        return None, [InterfaceCheck("loading in ONNX Runtime", reason(error), "a session")]
    checks = []
    for kind, found, wanted in (
        ("inputs", session.get_inputs(), config.input_shapes),
        ("outputs", session.get_outputs(), config.output_shapes),
    ):
        names = [tensor.name for tensor in found]
        checks.append(InterfaceCheck(f"names of the {kind}", ", ".join(names), ", ".join(wanted)))
        for tensor in found:
            dtype, shape = wanted.get(tensor.name, ("no such tensor", ()))
            received = f"{tensor.type} {_axes(tensor.shape)}"
            checks.append(InterfaceCheck(f"dtype and axes of {tensor.name}", received, f"{dtype} {_axes(shape)}"))
    return (session if all(check.passed for check in checks) else None), checks


def reason(error: Exception) -> str:
    """What ONNX Runtime said, on one line."""
    return " ".join(str(error).split())[:300]


def _axes(shape: Sequence[object]) -> str:
    return f"({', '.join(map(str, shape))})"
