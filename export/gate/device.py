"""A saved graph, opened as a device opens it (:mod:`mope_deploy.engines`), and whether it looks as it was asked to.

There is no bundle yet: what its manifest will say about the files is made here, for the engine and for the manifest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from export.gate.cases import Case
from export.gate.found import InterfaceCheck
from export.gate.reference import Batch
from export.graph.exporter_config import MoPEExporterConfig
from mope_deploy.engines.onnxruntime.cpu import CpuSettings, cpu_settings
from mope_deploy.engines.onnxruntime.graph import open_graph
from mope_deploy.engines.onnxruntime.session import library_version
from mope_deploy.engines.session import Arrays, Session
from mope_deploy.errors import EngineError, UsageError
from mope_deploy.files import sha256
from mope_deploy.manifest import Graph, Part, TensorSpec, Tolerance, conditions_name, y_name
from mope_deploy.preprocess import MODALITIES, present_name

__all__ = ["Run", "describe", "open_files", "origin", "run_checked"]

_NUMPY = {"tensor(float)": "float32", "tensor(int64)": "int64"}


def origin(file: Path, parts: Sequence[Path]) -> dict[str, Any]:
    """How a gate's report begins: what was compared, with what, and what ran it."""
    return {
        "file": " + ".join(path.name for path in (file, *parts)),
        "sha256": sha256(file),
        "reference": "the eager model, PyTorch float32",
        "runtime": f"onnxruntime {library_version()} on the CPU",
    }


def describe(file: Path, config: MoPEExporterConfig, parts: Sequence[Path] = (), *, precision: str = "fp32") -> Graph:
    """What a manifest says about a graph, but for its name, what runs it and how it was judged.

    Args:
        file: the graph, or the main file of one in parts.
        config: what it was asked to be: inputs, outputs, dtypes, axes, in order.
        parts: of a graph in several files the others.
        precision: of the graph.

    Raises:
        EngineError: a file is no ONNX graph, or no part.
    """
    specs = _specs(config)
    header = _header(file)
    found = tuple(_part(part, specs) for part in parts)
    encoded = {spec.name for part in found for spec in part.inputs}
    return Graph(
        name="model",
        file=file.name,
        data=_data(header),
        precision=precision,
        opset=next((opset.version for opset in header.opset_import if opset.domain == ""), 0),
        ir_version=header.ir_version,
        runs_on="any",
        inputs=(
            *(specs[key] for key in config.input_shapes if key not in encoded),
            *(part.outputs[1] for part in found),
        ),
        outputs=tuple(specs[key] for key in config.output_shapes),
        tolerance=Tolerance(logits=0.0, routing=0.0),
        gate=None,
        parts=found,
    )


def open_files(
    file: Path,
    config: MoPEExporterConfig,
    parts: Sequence[Path] = (),
    *,
    precision: str = "fp32",
    cpu: CpuSettings | None = None,
    spinning: bool = False,
) -> Session:
    """A fresh session on the CPU.

    Args:
        file, config, parts, precision: see :func:`describe`.
        cpu: how a device sets its session up; by default as one whose bundle says nothing.
        spinning: whether idle threads spin, as a device's do. No value depends on it, and beside PyTorch it is slow.

    Raises:
        EngineError: ONNX Runtime refuses a file, or it has other inputs or outputs.
    """
    graph = describe(file, config, parts, precision=precision)
    settings = replace(cpu or cpu_settings(), spinning=spinning)
    return open_graph(graph, {path.name: path for path in (file, *parts)}.__getitem__, cpu=settings, takes_turns=True)


@dataclass(frozen=True)
class Run:
    """Both sides' outputs for one batch; the eager side also has ``soft``, its scores before top-k selection."""

    case: Case
    eager: Arrays
    exported: Arrays


def run_checked(
    file: Path,
    config: MoPEExporterConfig,
    batches: Iterable[Batch],
    parts: Sequence[Path] = (),
    *,
    precision: str = "fp32",
    cpu: CpuSettings | None = None,
) -> tuple[list[Run], list[InterfaceCheck], list[InterfaceCheck]]:
    """Open the saved file and run every batch, up to the first that shows anything wrong with it.

    Args:
        file, config, parts, precision, cpu: see :func:`open_files`.
        batches: whose eager outputs have the dtypes and shapes that are asked for.

    Returns:
        Every batch, none if anything is wrong; what was checked when the file was opened; and when it ran.
    """
    opened: list[InterfaceCheck] = []
    try:
        opened = _interface([_header(path).graph for path in (file, *parts)], config)
        session = open_files(file, config, parts, precision=precision, cpu=cpu)
    except EngineError as error:
        return [], [*opened, InterfaceCheck("loading in ONNX Runtime", str(error), "a session")], []
    runs: list[Run] = []
    ran: list[InterfaceCheck] = []
    for batch in batches if all(check.passed for check in opened) else ():
        try:
            found = session.run(batch.feeds, list(config.outputs))
        except (EngineError, UsageError) as error:
            return [], opened, [*ran, InterfaceCheck(f"running {batch.case.name}", str(error), "outputs")]
        for name in config.outputs:
            forms = (f"{side[name].dtype} {side[name].shape}" for side in (found, batch.eager))
            ran.append(InterfaceCheck(f"{name} of {batch.case.name}", *forms))
        if not all(check.passed for check in ran):
            return [], opened, ran
        runs.append(Run(batch.case, batch.eager, found))
    return runs, opened, ran


def _interface(graphs: Sequence[onnx.GraphProto], config: MoPEExporterConfig) -> list[InterfaceCheck]:
    """Names in their order, dtypes and names of axes as the files declare them, the main one first.

    The engine checks what it infers itself, but not order, nor that an axis is called what it should be.
    """
    handed = {value.name for part in graphs[1:] for value in part.output}
    inputs = [value for graph in graphs for value in graph.input if value.name not in handed]
    checks = []
    for kind, values, wanted in (
        ("inputs", inputs, config.input_shapes),
        ("outputs", list(graphs[0].output), config.output_shapes),
    ):
        names = ", ".join(value.name for value in values)
        checks.append(InterfaceCheck(f"names of the {kind}", names, ", ".join(wanted)))
        for value in values:
            forms = [
                f"{dtype} ({', '.join(map(str, axes))})"
                for dtype, axes in (_declared(value), wanted.get(value.name, ("no such tensor", ())))
            ]
            checks.append(InterfaceCheck(f"dtype and axes of {value.name}", *forms))
    return checks


def _specs(config: MoPEExporterConfig) -> dict[str, TensorSpec]:
    """Every input and output of the whole graph."""
    ranges: dict[str, tuple[float, float]] = dict.fromkeys(("attention_mask", "audio_mask", "routing"), (0, 1))
    ranges |= {present_name(modality): (0, 1) for modality in config.graph.missing}
    if config.graph.vocab_size is not None:
        ranges["input_ids"] = (0, config.graph.vocab_size - 1)
    return {
        name: TensorSpec(name=name, dtype=_NUMPY[dtype], shape=shape, range=ranges.get(name))
        for name, (dtype, shape) in (config.input_shapes | config.output_shapes).items()
    }


def _part(file: Path, specs: dict[str, TensorSpec]) -> Part:
    header = _header(file)
    widths = {value.name: _declared(value)[1] for value in header.graph.output}
    modality = next((one for one in MODALITIES if conditions_name(one) in widths), None)
    if modality is None or any(value.name not in specs for value in header.graph.input):
        raise EngineError(f"{file} is no part of this graph", received=", ".join(widths))
    return Part(
        modality=modality,
        file=file.name,
        data=_data(header),
        inputs=tuple(specs[value.name] for value in header.graph.input),
        outputs=tuple(
            TensorSpec(name=name, dtype="float32", shape=tuple(widths.get(name, ())))
            for name in (y_name(modality), conditions_name(modality))
        ),
    )


def _header(file: Path) -> onnx.ModelProto:
    try:
        return onnx.load(file, load_external_data=False)
    except DecodeError as error:
        raise EngineError(f"{file} is no ONNX file: {error}") from error


def _data(header: onnx.ModelProto) -> tuple[str, ...]:
    """The files that hold its weights, where they are apart."""
    stored = (tensor for tensor in header.graph.initializer if uses_external_data(tensor))
    return tuple(dict.fromkeys(str(ExternalDataInfo(tensor).location) for tensor in stored))


def _declared(value: onnx.ValueInfoProto) -> tuple[str, tuple[int | str, ...]]:
    """ONNX Runtime's word for the type, and the axes."""
    tensor = value.type.tensor_type
    dtype = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
    return f"tensor({dtype})", tuple(axis.dim_param or axis.dim_value for axis in tensor.shape.dim)
