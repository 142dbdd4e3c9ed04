"""Names in an exported graph: modules' own names instead of the exporter's counters, and no machine's paths.

torch's exporter folds transposes into new constants called ``val_53`` and notes for every node the source files and
stack it came from. Here a node is named after its module (``layers.0.router/Softmax``), which lint errors, TensorRT
layers and profiles then show; a folded weight gets its parameter's name back (``….qkv.weight.T``), which quantisation
needs; and the notes are dropped.
"""

from __future__ import annotations

import ast
import re
from collections import Counter

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import nn

__all__ = ["name_after_modules", "renumber"]

_SCOPES = "pkg.torch.onnx.name_scopes"
_COUNTED = re.compile(r"(val|expand|permute|select|t|transpose|unsqueeze|view|reshape)(_\d+)?")


def name_after_modules(model: ir.Model, module: nn.Module) -> None:
    """Rename nodes and folded weights of ``model`` in place after the modules of what was traced; drop all notes.

    Args:
        model: as the exporter left it.
        module: what was traced.
    """
    scopes = {node: _scope(node) for node in model.graph}
    _name_weights(model.graph, module, scopes)
    for node, scope in scopes.items():
        node.name = f"{scope}/{node.op_type}" if scope else node.op_type
    renumber(model)
    ClearMetadataAndDocStringPass()(model)


def renumber(model: ir.Model) -> None:
    """Make node names unique by a counter behind repeated ones; nodes without a name get their operator's."""
    taken: set[str] = set()
    count: Counter[str] = Counter()
    for node in model.graph:
        stem = name = node.name or node.op_type
        while name in taken:
            count[stem] += 1
            name = f"{stem}_{count[stem] + 1}"
        taken.add(name)
        node.name = name


def _scope(node: ir.Node) -> str:
    """Dotted name of the innermost module that ``node`` came from, as far as the exporter knows it."""
    try:
        # The last entry is the operation itself; unnamed ones come from the exporter's own passes.
        path = [name for name in ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))[:-1] if "." in name]
    except (ValueError, SyntaxError):
        return ""
    return path[-1] if path else ""


def _name_weights(graph: ir.Graph, module: nn.Module, scopes: dict[ir.Node, str]) -> None:
    """Give constants that the exporter folded from one parameter that parameter's name."""
    taken = set(graph.initializers)
    for node, scope in scopes.items():
        for value in node.inputs:
            if value is None or value.name not in graph.initializers or not _COUNTED.fullmatch(value.name or ""):
                continue
            name = _origin(value, module, scope)
            if name is not None and name not in taken:
                taken.add(name)
                value.name = name


def _origin(value: ir.Value, module: nn.Module, scope: str) -> str | None:
    """The name of the tensor of module ``scope`` (or of a module around it) that ``value`` was folded from."""
    if value.const_value is None or value.const_value.size < 2 or value.const_value.dtype != ir.DataType.FLOAT:
        return None
    try:
        holder = module.get_submodule(scope)
    except AttributeError:
        return None
    array = value.const_value.numpy()
    for its_name, held in (*holder.named_parameters(recurse=False), *holder.named_buffers(recurse=False)):
        name, tensor = f"{scope}.{its_name}" if scope else its_name, held.detach().cpu().numpy()
        if tensor.size == array.size:
            if array.ndim == 2 and tensor.shape == array.shape[::-1] and np.array_equal(tensor.T, array):
                return f"{name}.T"
            if np.array_equal(tensor.reshape(-1), array.reshape(-1)):
                return name
    return None
