"""Faults planted in a graph."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx import ModelProto, numpy_helper


def edit(model: ModelProto, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Replace an initializer by ``change`` of it."""
    for tensor in model.graph.initializer:
        if tensor.name == name:
            array = change(numpy_helper.to_array(tensor).copy())
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), name))
            return
    raise AssertionError(f"no initializer {name}")


def rename(model: ModelProto, old: str, new: str) -> None:
    for value in (*model.graph.input, *model.graph.output):
        if value.name == old:
            value.name = new
    for node in model.graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
        node.output[:] = [new if name == old else name for name in node.output]
