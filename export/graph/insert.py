"""New weights and nodes in a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

__all__ = ["add_node", "add_weight"]


def add_weight(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
    """Store another weight in a graph."""
    return ir.tape.Tape(graph).initializer(ir.tensor(array, name=name))


def add_node(
    graph: ir.Graph,
    op: str,
    inputs: Sequence[ir.Value],
    output: str,
    *,
    name: str,
    before: ir.Node | None = None,
    after: ir.Node | None = None,
    dtype: ir.DataType | None = None,
    attributes: Mapping[str, int] | None = None,
) -> ir.Value:
    """Put a node of one output at the end of a graph, or beside another node, and return that output.

    Args:
        output: name of what it makes.
        name: of the node.
        dtype: of the output of an operator that keeps its first input's shape; None to leave both to inference.
    """
    made = ir.Value(name=output)
    if dtype is not None:
        made.type, made.shape = ir.TensorType(dtype), inputs[0].shape
    node = ir.node(op, inputs, dict(attributes or {}), outputs=[made], name=name)
    if before is not None:
        graph.insert_before(before, node)
    elif after is not None:
        graph.insert_after(after, node)
    else:
        graph.append(node)
    return made
