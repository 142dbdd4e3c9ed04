"""NVIDIA's own parser and builder, which work on a machine without a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import tensorrt_rtx as trt

from mope_deploy.engines.tensorrt.backends import open_backend
from mope_deploy.engines.tensorrt.log import shared_log
from mope_deploy.engines.tensorrt.worker import _build


def parse_and_build(file: Path, *, longest: int) -> list[str]:
    """Every error that parsing and building a graph for compute capability 8.6 gives; none if both went well."""
    log = shared_log(open_backend("tensorrt_rtx"))
    log.clear()
    builder = trt.Builder(log.logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log.logger)
    if not parser.parse_from_file(str(file)):
        return [str(parser.get_error(i)) for i in range(parser.num_errors)] + log.errors
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        sizes = [
            [{0: batch, 1: length}[axis] if size == -1 else size for axis, size in enumerate(tensor.shape)]
            for batch, length in ((1, 3), (2, 7), (16, longest))
        ]
        profile.set_shape(tensor.name, *sizes)
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    return log.errors + ([] if engine is not None else ["no engine was built"])


def _described(file: Path) -> dict[str, list[dict[str, Any]]]:
    """Inputs and outputs as the worker's request has them."""
    names = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.INT64: "int64"}
    graph = onnx.load(file, load_external_data=False).graph
    return {
        kind: [
            {
                "name": value.name,
                "dtype": names[value.type.tensor_type.elem_type],
                "shape": [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim],
            }
            for value in values
        ]
        for kind, values in (("inputs", graph.input), ("outputs", graph.output))
    }


def build(file: Path, precision: str, engine: Path, *, sizes: Mapping[str, list[int]]) -> dict[str, Any]:
    """What `mope build` has its worker do, in this process: its answer, or its :class:`EngineError`.

    ``sizes``: axis → least, best and greatest; those of axes that the graph does not have are left out.
    """
    described = _described(file)
    axes = {axis for tensor in described["inputs"] for axis in tensor["shape"]}
    shared_log(open_backend("tensorrt_rtx")).clear()
    request = {
        "backend": "tensorrt_rtx",
        "onnx": str(file),
        "engine": str(engine),
        "precision": precision,
        "profile": {axis: size for axis, size in sizes.items() if axis in axes},
        "compute_capabilities": ["8.6"],
        "tf32": False,
        "workspace": None,
    }
    return _build(request | described, lambda _: None)
