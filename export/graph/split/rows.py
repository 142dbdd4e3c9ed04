"""What crosses from a part to the main file: values packed into one row of float32 for each sample, and unpacked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir import DataType

from export.graph.insert import add_node, add_weight

__all__ = ["Crossing", "added", "declare", "packed", "unpack", "width"]


@dataclass(frozen=True)
class Crossing:
    """A tensor with the batch as its first axis: its name, its other axes, its element type."""

    name: str
    shape: tuple[int, ...]
    dtype: DataType

    @property
    def size(self) -> int:
        """Numbers for each sample."""
        return math.prod(self.shape)


def width(values: Sequence[Crossing]) -> int:
    """Numbers of a row."""
    return sum(value.size for value in values)


def declare(value: ir.Value, size: int) -> None:
    """Give a value the type and shape of a row of ``size`` floats for each sample."""
    value.type, value.shape = ir.TensorType(DataType.FLOAT), ir.Shape(["batch", size])


def packed(graph: ir.Graph, values: Sequence[tuple[ir.Value, Crossing]], name: str) -> ir.Value:
    """Values as one row, called ``name``, by nodes at the end of the graph."""
    rows = []
    for value, known in values:
        if known.dtype != DataType.FLOAT:  # exact
            value = added(graph, "Cast", [value], f"{known.name}_float32", to=DataType.FLOAT)
        rows.append(value if len(known.shape) == 1 else added(graph, "Flatten", [value], f"{known.name}_row", axis=1))
    row = added(graph, "Concat", rows, name, axis=1)
    declare(row, width([known for _, known in values]))
    return row


def unpack(graph: ir.Graph, row: ir.Value, wanted: Sequence[tuple[ir.Value, Crossing]]) -> None:
    """Put the pieces of a row in the place of the values that it was packed from."""
    first, name = graph.node(0), row.name or ""
    pieces = [row]
    if len(wanted) > 1:
        sizes = add_weight(graph, f"{name}_sizes", np.array([known.size for _, known in wanted], np.int64))
        node = ir.node("Split", [row, sizes], {"axis": 1}, num_outputs=len(wanted), name=f"split/{name}/Split")
        for value, (_, known) in zip(node.outputs, wanted, strict=True):
            value.name = f"{known.name}_row"
        graph.insert_before(first, node)
        pieces = list(node.outputs)
    for new, (old, known) in zip(pieces, wanted, strict=True):
        if len(known.shape) > 1:
            shape = add_weight(graph, f"{known.name}_shape", np.array([-1, *known.shape], np.int64))
            new = added(graph, "Reshape", [new, shape], f"{known.name}_given", before=first)
        if known.dtype != DataType.FLOAT:
            new = added(graph, "Cast", [new], f"{known.name}_half", before=first, to=known.dtype)
        if old.is_graph_output():  # a routing that y alone decides
            new = added(graph, "Identity", [new], f"{known.name}_", before=first)
            old.name, new.name = f"{known.name}_computed", known.name
            new.type, new.shape = old.type, old.shape
            graph.outputs[graph.outputs.index(old)] = new
        ir.convenience.replace_all_uses_with(old, new)


def added(
    graph: ir.Graph, op: str, inputs: Sequence[ir.Value], name: str, *, before: ir.Node | None = None, **attributes: int
) -> ir.Value:
    """The output, called ``name``, of a new node at the end of the graph or before another one."""
    return add_node(graph, op, inputs, name, name=f"split/{name}/{op}", before=before, attributes=attributes)
