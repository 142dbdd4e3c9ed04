"""int8: symmetric QuantizeLinear/DequantizeLinear around the linear layers of the encoders, all else left in fp32.

The inputs of a product are quantised per tensor, its weights per output channel, both with zero-point 0; the bias and
the result stay float. TensorRT and ONNX Runtime each fuse that pattern into a product of integers, so one graph serves
both. Weights are stored once, as int8. Routers, mappers, head, patch embedding, products of two activations, LayerNorm,
GELU and softmax are not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.graph.files import read, write
from export.graph.insert import add_node, add_weight
from export.precision.calibrate import activation_limits
from export.precision.check import check_types, output_axis
from export.precision.layout import layout, module_of, source_weight
from export.precision.ranking import own_errors, twin_of
from mope_deploy.errors import ExportError

__all__ = ["LIMIT", "Int8Lowering", "quantise_weight", "quantise_weight_of", "scale_of"]

LIMIT = 127  # −128 stays unused, as symmetric quantisation wants


class Int8Lowering:
    """Static int8 with ranges of activations measured once.

    Args:
        graph: the canonical fp32 graph.
        calibration: batches of real samples, read once and one at a time.
        method: ``percentile`` or ``entropy``.
        on_step: called with a few words as calibration advances.

    Attributes:
        limits: largest magnitude that each quantised activation is given, by tensor name.
    """

    precision, runtime_mark, runs_on = "int8", "", "any"
    unfit: tuple[str, ...] = ()

    def __init__(
        self,
        graph: Path,
        calibration: Iterable[Mapping[str, NDArray[Any]]],
        *,
        method: str = "percentile",
        on_step: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._source = graph
        model = read(graph)
        self._layout = layout(model.graph)
        self._products = self._layout.products
        if not self._products:
            raise ExportError(f"{graph.name} has no linear layer inside an encoder layer to quantise")
        self.layers = tuple(dict.fromkeys(product.layer for product in self._products.values()))
        nodes = {name for product in self._products.values() for name in product.nodes}
        inputs = dict.fromkeys(_operand(node).name or "" for node in model.graph if node.name in nodes)
        self.limits = activation_limits(graph, tuple(inputs), calibration, method=method, on_step=on_step)

    def products(self, layer: str) -> tuple[str, ...]:
        """The linear layers of ``layer``."""
        return tuple(name for name, product in self._products.items() if product.layer == layer)

    def own_errors(
        self, feeds: Iterable[Mapping[str, NDArray[Any]]], *, on_step: Callable[[str], None] = lambda _: None
    ) -> dict[str, float]:
        """See :class:`export.precision.Lowering`."""
        activations: dict[str, ir.Value] = {}
        weights: dict[str, ir.Value] = {}

        def twin(graph: ir.Graph, node: ir.Node) -> ir.Value:
            made = twin_of(node, node.inputs)
            self._quantise_input(graph, made, activations)
            quantise_weight_of(graph, made, weights)
            return made.outputs[0]

        nodes = {name: product.nodes for name, product in self._products.items()}
        return own_errors(self._source, nodes, twin, feeds, on_step=on_step)

    def write(self, path: Path, *, keep: Collection[str] = ()) -> list[Path]:
        """Write the Q/DQ graph. See :class:`export.precision.Lowering`."""
        kept = self._layout.check_known(keep, {*self.layers, *self._products})
        chosen = {p.name: p for p in self._products.values() if not kept & {p.name, p.layer}}
        if not chosen:
            raise ExportError("every layer is kept in fp32, so nothing would be int8")
        model = read(self._source)
        nodes = {name for product in chosen.values() for name in product.nodes}
        activations: dict[str, ir.Value] = {}
        weights: dict[str, ir.Value] = {}
        for node in list(model.graph):
            if node.name in nodes:
                self._quantise_input(model.graph, node, activations)
                quantise_weight_of(model.graph, node, weights)
        files = write(model, path)
        check_types(path, "int8", kept, source=self._layout)
        return files

    def write_runnable(self, path: Path, *, keep: Collection[str] = ()) -> list[Path]:
        """The same file: ONNX Runtime's CPU provider computes it in integers."""
        return self.write(path, keep=keep)

    def _quantise_input(self, graph: ir.Graph, node: ir.Node, known: dict[str, ir.Value]) -> None:
        value, module = _operand(node), module_of(node)
        name = value.name or ""
        if name not in known:
            scale = add_weight(graph, f"{name}.scale", scale_of(np.float32(self.limits[name])))
            zero = add_weight(graph, f"{name}.zero", np.zeros((), np.int8))
            made, its_name, int8 = f"{name}.int8", f"{module}/Quantize", ir.DataType.INT8
            codes = add_node(
                graph, "QuantizeLinear", [value, scale, zero], made, name=its_name, before=node, dtype=int8
            )
            known[name] = _dequantised(node, [codes, scale, zero], name, f"{module}/Dequantize")
        node.replace_input_with(0, known[name])


def quantise_weight(weight: NDArray[np.float32], *, axis: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Symmetric int8 with one scale for each index of ``axis``.

    Args:
        weight: a matrix.
        axis: its axis of output channels.

    Returns:
        Codes from −127 to 127 of the same shape, and scales (channels,): weight ≈ codes · scale.
    """
    scale = scale_of(np.abs(weight).max(axis=1 - axis))
    steps = weight / np.expand_dims(scale, 1 - axis)
    return np.clip(np.rint(steps), -LIMIT, LIMIT).astype(np.int8), scale


def scale_of(limit: NDArray[np.float32] | np.float32) -> NDArray[np.float32]:
    """The step that puts a magnitude of ``limit`` on the last code; 1 where all is zero, as a step may not be."""
    scale = np.asarray(limit, np.float32) / np.float32(LIMIT)
    return np.where(scale > np.finfo(np.float32).tiny, scale, np.float32(1.0)).astype(np.float32)


def quantise_weight_of(graph: ir.Graph, node: ir.Node, known: dict[str, ir.Value]) -> None:
    """Have a product read its weight as int8 codes; ``known`` holds those that others read already."""
    value = source_weight(node.inputs[1])
    assert value is not None
    assert value.const_value is not None
    name, axis = value.name or "", output_axis(node)
    if name not in known:
        codes, scales = quantise_weight(value.const_value.numpy(), axis=axis)
        operands = [
            add_weight(graph, f"{name}.int8", codes),
            add_weight(graph, f"{name}.scale", scales),
            add_weight(graph, f"{name}.zero", np.zeros(scales.shape, np.int8)),
        ]
        known[name] = _dequantised(node, operands, name, f"{module_of(node)}/DequantizeWeight", {"axis": axis})
    node.replace_input_with(1, known[name])


def _dequantised(
    reader: ir.Node, operands: Sequence[ir.Value], name: str, its_name: str, attributes: Mapping[str, int] | None = None
) -> ir.Value:
    """The tensor ``name`` again, of its codes, scale and zero-point, by a node in front of its first reader."""
    assert isinstance(reader.graph, ir.Graph)
    where: dict[str, Any] = {"before": reader, "dtype": ir.DataType.FLOAT, "attributes": attributes}
    return add_node(reader.graph, "DequantizeLinear", operands, f"{name}.dequantised", name=its_name, **where)


def _operand(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value
