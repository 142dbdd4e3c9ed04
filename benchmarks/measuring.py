"""Timing graphs and modules against each other: one process, in turn, warm, so many threads and none spinning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import onnx
import torch
from numpy.typing import NDArray
from torch import nn

from benchmarks.settings import Settings
from mope_deploy.bench.timing import interleave, ratio_of_medians, summary, warm_up
from mope_deploy.console import err
from mope_deploy.engines.onnxruntime.cpu import cpu_settings
from mope_deploy.engines.onnxruntime.session import OnnxRuntimeSession
from mope_deploy.manifest import Graph, TensorSpec, Tolerance

__all__ = ["Feeds", "compare", "describe_graph", "eager_call", "open_graph"]

Feeds: TypeAlias = Mapping[str, NDArray[Any]]


def open_graph(path: Path, settings: Settings, *, precision: str = "fp32") -> Callable[[Feeds], object]:
    """A graph's logits on arrays by name: in ONNX Runtime on the CPU, opened as a device opens it, threads apart."""
    cpu = cpu_settings(threads=settings.threads, spinning=False)
    session = OnnxRuntimeSession(path, describe_graph(path, precision), cpu=cpu)
    return lambda feeds: session.run(feeds, ("logits",))


def describe_graph(path: Path, precision: str) -> Graph:
    """What a manifest says of a graph, read from the file."""
    model = onnx.load(path)
    inputs, outputs = (tuple(map(_tensor, values)) for values in (model.graph.input, model.graph.output))
    return Graph(
        name="model",
        file=path.name,
        data=(),
        precision=precision,
        opset=model.opset_import[0].version,
        ir_version=model.ir_version,
        runs_on="any",
        inputs=inputs,
        outputs=outputs,
        tolerance=Tolerance(logits=0.0, routing=0.0),
        gate=None,
    )


def eager_call(module: nn.Module) -> Callable[[Feeds], object]:
    """What runs a module on arrays by name."""

    @torch.inference_mode()
    def call(feeds: Feeds) -> object:
        return module({name: torch.from_numpy(array) for name, array in feeds.items()})

    return call


def compare(
    calls: Mapping[str, Callable[[], object]], settings: Settings, *, samples: Mapping[str, int] | int
) -> dict[str, dict[str, Any]]:
    """Time calls against each other; ``samples`` are in each of them, by name or of all.

    Returns:
        Name → the summary of :mod:`mope_deploy.bench.timing` and ``ratio``, to the first call.
    """
    torch.set_num_threads(settings.threads)
    err.print(f"measuring {', '.join(calls)}", markup=False)
    warm_up(calls, calls_each=min(10, settings.rounds))
    times = interleave(calls, seconds=settings.seconds, rounds=settings.rounds)
    base = times[next(iter(calls))]
    return {
        name: summary(found, samples=samples if isinstance(samples, int) else samples[name])
        | {"ratio": ratio_of_medians(found, base).to_dict()}
        for name, found in times.items()
    }


def _tensor(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    shape = tuple(axis.dim_param or axis.dim_value for axis in tensor.shape.dim)
    return TensorSpec(name=value.name, dtype=onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name, shape=shape)
