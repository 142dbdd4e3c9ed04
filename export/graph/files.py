"""Reading and writing graphs, and the element type of every tensor in them."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx import TensorProto, helper
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from export.graph import lint
from export.graph.naming import renumber
from export.limits import EMBED_LIMIT
from mope_deploy.errors import ExportError
from mope_deploy.files import reason

__all__ = ["SMALL", "check_file", "element_types", "external_weights", "read", "save", "write"]

SMALL = 1024  # bytes; smaller tensors stay in the file, where shape inference can read them


def read(path: Path) -> ir.Model:
    """A graph with all its constants as initializers; weights are mapped, not copied, where they lie in a file apart.

    Raises:
        ExportError: it cannot be read.
    """
    try:
        model = ir.load(path)
    except Exception as error:  # protobuf, onnx and onnx_ir each raise their own
        raise ExportError(f"{path.name} cannot be read: {reason(error)}") from error
    LiftConstantsToInitializersPass(lift_all_constants=True)(model)
    return model


def save(
    model: ir.Model,
    path: Path,
    *,
    external: bool = False,
    embed_limit: int = EMBED_LIMIT,
    extra_ops: Collection[str] = (),
) -> list[Path]:
    """Write a graph and check what was written.

    Args:
        path: ``….onnx``, in a folder that nobody reads yet.
        external: put the weights into ``….onnx.data`` beside it, whatever their size.
        embed_limit: bytes of weights above which that happens anyway.
        extra_ops: operators that a file for ONNX Runtime alone may hold as well.

    Returns:
        The files written: the graph, and the weights if they are apart.

    Raises:
        ExportError: a target cannot take the graph, or the file is not valid ONNX.
    """
    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    data = path.with_name(path.name + ".data")
    if external or weights > embed_limit:
        ir.save(model, path, external_data=data.name, size_threshold_bytes=SMALL)
    else:
        ir.save(model, path)
    check_file(path, extra_ops=extra_ops)
    return [path, data] if data.is_file() else [path]


def write(model: ir.Model, path: Path, *, embed_limit: int = EMBED_LIMIT) -> list[Path]:
    """:func:`save` a graph that was lowered: its node names are made unique, its unused weights dropped."""
    renumber(model)
    initializers = model.graph.initializers
    for name in [name for name, value in initializers.items() if not value.uses() and not value.is_graph_output()]:
        del initializers[name]
    for value in initializers.values():
        value.type = value.shape = None  # ONNX Runtime's quantiser stumbles over declarations of weights
    ir.external_data.load_to_model(model)  # of the graph it was made from: no file may lean on another one's weights
    return save(model, path, embed_limit=embed_limit)


def check_file(path: Path, *, extra_ops: Collection[str] = ()) -> None:
    """Lint a file and have ``onnx.checker`` check it.

    Raises:
        ExportError: naming what is wrong.
    """
    lint.check(ir.load(path), what=path.name, extra_ops=extra_ops)
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:  # checker and shape inference have exceptions of their own
        raise ExportError(f"{path.name} is not valid ONNX: {reason(error)}") from error


def element_types(path: Path) -> dict[str, ir.DataType]:
    """The element type of every tensor of a file, inferred from its inputs, weights and operators alone.

    Raises:
        ExportError: types contradict each other, or one cannot be inferred.
    """
    proto = onnx.load(path, load_external_data=False)
    graph = proto.graph
    types = {tensor.name: ir.DataType(tensor.data_type) for tensor in graph.initializer}
    del graph.value_info[:]  # nothing declared that should be inferred
    small = [t for t in graph.initializer if t.data_location != TensorProto.EXTERNAL and t.ByteSize() <= 2 * SMALL]
    kept = {tensor.name for tensor in small}
    for tensor in graph.initializer:
        if tensor.name not in kept:  # by its shape alone: what inference copies is small, whatever the model's size
            graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    del graph.initializer[:]
    graph.initializer.extend(small)
    try:
        graph = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True).graph
    except Exception as error:  # one class of C++ errors, raised as several
        raise ExportError(f"types of {path.name}: {reason(error)}") from error
    for value in (*graph.input, *graph.value_info, *graph.output):
        types.setdefault(value.name, ir.DataType(value.type.tensor_type.elem_type))
    for node in graph.node:
        for name in node.output:
            if name and types.get(name, ir.DataType.UNDEFINED) == ir.DataType.UNDEFINED:
                raise ExportError(f"the type of {name!r}, made by {node.op_type} at {node.name!r}, is unknown")
    return types


def external_weights(file: Path) -> dict[str, ir.ExternalTensor]:
    """The weights of a graph that lie outside its own file, by name."""
    tensors = {name: value.const_value for name, value in ir.load(file).graph.initializers.items()}
    return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, ir.ExternalTensor)}
