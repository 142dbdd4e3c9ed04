"""A saved graph, loaded fresh in ONNX Runtime, and whether it looks from outside as it was asked to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from export.gate.parity_report import InterfaceCheck
from export.graph.exporter_config import MoPEExporterConfig
from mope_deploy.engines.session import alone

__all__ = ["RUNTIME", "GraphSession", "SplitSession", "cpu_session", "open_graph", "reason", "run_graph"]

RUNTIME = f"onnxruntime {ort.__version__} on the CPU"


class SplitSession:
    """A graph in several files, run one after the other: what ONNX Runtime's own session is of one file.

    Args:
        main: of the main file.
        parts: of the others, whose outputs beside y the main file reads.
    """

    def __init__(self, main: ort.InferenceSession, parts: Sequence[ort.InferenceSession]) -> None:
        self.main, self.parts = main, parts
        self._handed = {
            tensor.name: part for part in parts for tensor in part.get_outputs() if tensor.name in _names(main)
        }

    def get_inputs(self) -> list[ort.NodeArg]:
        """The main file's and then the parts' own, in the order of the whole graph."""
        own = [tensor for tensor in self.main.get_inputs() if tensor.name not in self._handed]
        return own + [tensor for part in self.parts for tensor in part.get_inputs()]

    def get_outputs(self) -> list[ort.NodeArg]:
        """The main file's."""
        return self.main.get_outputs()

    def run(self, outputs: Sequence[str] | None, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Outputs in the order asked for, all by default."""
        given = {
            name: part.run([name], {key: feeds[key] for key in _names(part)})[0] for name, part in self._handed.items()
        }
        own = {key: feeds[key] for key in _names(self.main) if key not in given}
        return self.main.run(None if outputs is None else list(outputs), own | given)


GraphSession: TypeAlias = ort.InferenceSession | SplitSession


def cpu_session(file: Path, parts: Sequence[Path] = ()) -> GraphSession:
    """A fresh session on the CPU; raises whatever ONNX Runtime raises.

    Args:
        file: the graph, or the main file of one in parts.
        parts: those.
    """
    if parts:
        return SplitSession(_session(file), [_session(part) for part in parts])
    return _session(file)


def _session(file: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4  # every error is raised as well
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # waiting threads starve busy machines
    return ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def run_graph(
    session: GraphSession,
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


def open_graph(
    file: Path, config: MoPEExporterConfig, parts: Sequence[Path] = ()
) -> tuple[GraphSession | None, list[InterfaceCheck]]:
    """A fresh session on the saved file, None if anything is wrong with it; and what was checked.

    Args:
        file: the graph as saved.
        config: what it was asked to be: inputs, outputs, dtypes, axes, in order.
        parts: of a graph in several files the others.
    """
    try:
        session = cpu_session(file, parts)
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


def _names(session: ort.InferenceSession) -> list[str]:
    return [tensor.name for tensor in session.get_inputs()]


def _axes(shape: Sequence[object]) -> str:
    return f"({', '.join(map(str, shape))})"
