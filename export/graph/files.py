"""Reading and writing the graphs that are lowered, and the element type of every tensor in them."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from export.graph import lint
from export.graph.naming import renumber
from export.limits import EMBED_LIMIT
from mope_deploy.errors import ExportError

__all__ = ["add_weight", "check_file", "element_types", "read", "write"]

_SMALL = 1024  # bytes; larger tensors are declared to type inference by their shape alone


def read(path: Path) -> ir.Model:
    """A graph with all its constants as initializers; weights are mapped, not copied, where they lie in a file apart.

    Raises:
        ExportError: it cannot be read.
    """
    try:
        model = ir.load(path)
    except Exception as error:  # protobuf, onnx and onnx_ir each raise their own
        raise ExportError(f"{path.name} cannot be read: {' '.join(str(error).split())[:200]}") from error
    LiftConstantsToInitializersPass(lift_all_constants=True)(model)
    return model


def add_weight(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
    """Store another weight in a graph."""
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
    graph.register_initializer(value)
    return value


def element_types(path: Path) -> dict[str, ir.DataType]:
    """The element type of every tensor of a file, inferred from its inputs, weights and operators alone.

    Raises:
        ExportError: types contradict each other, or one cannot be inferred.
    """
    proto = onnx.load(path, load_external_data=False)
    try:
        inferred = onnx.shape_inference.infer_shapes(_without_weights(proto), check_type=True, strict_mode=True)
    except Exception as error:  # one class of C++ errors, raised as several
        raise ExportError(f"types of {path.name}: {' '.join(str(error).split())[:300]}") from error
    graph = inferred.graph
    types = {v.name: ir.DataType(v.type.tensor_type.elem_type) for v in (*graph.input, *graph.value_info)}
    types |= {tensor.name: ir.DataType(tensor.data_type) for tensor in proto.graph.initializer}
    types |= {v.name: ir.DataType(v.type.tensor_type.elem_type) for v in graph.output}
    for node in proto.graph.node:
        for name in node.output:
            if name and types.get(name, ir.DataType.UNDEFINED) == ir.DataType.UNDEFINED:
                raise ExportError(f"the type of {name!r}, made by {node.op_type} at {node.name!r}, is unknown")
    return types


def write(
    model: ir.Model, path: Path, *, extra_ops: Collection[str] = (), embed_limit: int = EMBED_LIMIT
) -> list[Path]:
    """Write a lowered graph and check the file as any exported one is.

    Args:
        model: its node names are made unique, its unused weights dropped.
        path: ``….onnx``, in a folder that nobody reads yet.
        extra_ops: operators allowed besides :data:`export.graph.lint.ALLOWED_OPS`.
        embed_limit: bytes of weights above which they go into ``….onnx.data``.

    Raises:
        ExportError: a target cannot take the graph, or the file is not valid ONNX.
    """
    renumber(model)
    initializers = model.graph.initializers
    for name in [name for name, value in initializers.items() if not value.uses() and not value.is_graph_output()]:
        del initializers[name]
    for value in initializers.values():
        value.type = value.shape = None  # ONNX Runtime's quantiser stumbles over declarations of weights
    ir.external_data.load_to_model(model)  # of the graph it was made from: no file may lean on another one's weights
    data = path.with_name(path.name + ".data")
    weights = sum(value.const_value.nbytes for value in initializers.values() if value.const_value is not None)
    if weights > embed_limit:
        ir.save(model, path, external_data=data.name, size_threshold_bytes=_SMALL)
    else:
        ir.save(model, path)
    check_file(path, extra_ops=extra_ops)
    return [path, data] if data.is_file() else [path]


def check_file(path: Path, *, extra_ops: Collection[str] = ()) -> None:
    """Lint a file and have ``onnx.checker`` check it.

    Raises:
        ExportError: naming what is wrong.
    """
    lint.check(onnx.load(path, load_external_data=False), what=path.name, extra_ops=extra_ops)
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:  # checker and shape inference have exceptions of their own
        raise ExportError(f"{path.name} is not valid ONNX: {' '.join(str(error).split())[:300]}") from error


def _without_weights(proto: ModelProto) -> ModelProto:
    """A copy with weights as inputs, and nothing declared that should be inferred: small, whatever the model's size."""
    light = ModelProto(ir_version=proto.ir_version, opset_import=proto.opset_import)
    graph = light.graph
    graph.name = proto.graph.name
    graph.node.extend(proto.graph.node)
    graph.input.extend(proto.graph.input)
    graph.output.extend(proto.graph.output)
    for tensor in proto.graph.initializer:
        if tensor.data_location != TensorProto.EXTERNAL and tensor.ByteSize() <= 2 * _SMALL:
            graph.initializer.append(tensor)
        else:
            graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    return light
