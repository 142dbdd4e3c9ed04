"""fp16 and bf16: the encoders' products in half precision, everything that routes, normalises or selects in fp32.

Types follow the rule of PyTorch's autocast. Products (MatMul, Gemm, Conv) and embedding tables of the encoders are
half. Softmax, normalisation and what sums or takes roots are fp32. Other operators of an encoder layer take the widest
type among their operands, so bias and GELU behind a product are half, while the attention mask, whose float32.min no
half can hold, makes its addition fp32, and the residual stream stays fp32. Operators outside the layers (routers,
prompt mixing, mappers, head) are fp32. A constant that half cannot hold keeps its operator in fp32.

ONNX Runtime's CPU provider runs fp16 by casting to fp32 around every operator and then drops the casts between
neighbours: neither rounding nor overflow of fp16 happens, and bf16 does not run at all. So both are judged on a copy in
fp32 that rounds every half tensor by a pair of casts, which it keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir import DataType

from export.graph.files import element_types, read, write
from export.graph.insert import add_node, add_weight
from export.graph.operators import FLOAT_OPS, MOVING_OPS, takes
from export.precision.check import HALVES, check_types
from export.precision.layout import PRODUCTS, layout, module_of
from export.precision.ranking import own_errors, twin_of
from mope_deploy.errors import ExportError

__all__ = ["HalfLowering", "write_emulated"]

_FLOAT = DataType.FLOAT
_SUFFIX = {half: name for name, half in HALVES.items()} | {_FLOAT: "fp32"}
_SMALLEST = {DataType.FLOAT16: 2.0**-14, DataType.BFLOAT16: 2.0**-126}  # normal numbers


class HalfLowering:
    """fp16 or bf16.

    Args:
        graph: the canonical fp32 graph.
        precision: ``fp16`` or ``bf16``.
    """

    runtime_mark = "emulated"

    def __init__(self, graph: Path, precision: str) -> None:
        self.precision = precision
        self.runs_on = "any" if precision == "fp16" else "tensorrt"
        self._source, self.half = graph, HALVES[precision]
        types = element_types(graph)
        self.float32 = {name for name, type in types.items() if type == _FLOAT}
        model = read(graph)
        self.layout = layout(model.graph)
        found = self.layout.multiplying
        self.layers = tuple(name for name in found if found[name])
        if not any(found[name] for name in self.layout.layers):
            raise ExportError(f"{graph.name} has no encoder layer that could be {precision}")
        weights = model.graph.initializers
        unfit = [weights[name] for name in self.float32.intersection(weights) if not _fits(weights[name], self.half)]
        self.unfit_weights = {value.name for value in unfit}
        users = {node for value in unfit for node in value.consumers() if self.layout.home(node) is not None}
        # Products with a weight that half cannot hold stay fp32.
        products = (module_of(node) for node in model.graph if node in users and node.op_type in PRODUCTS)
        self.unfit = tuple(dict.fromkeys(products))
        strays = {t for t in types.values() if t in (*HALVES.values(), DataType.DOUBLE)}
        if strays:
            raise ExportError(f"{graph.name} is not an fp32 graph", received=", ".join(sorted(t.name for t in strays)))

    def products(self, layer: str) -> tuple[str, ...]:
        """Modules of ``layer`` that multiply: linear layers, and attention by the module it stands in."""
        return self.layout.multiplying[layer]

    def own_errors(
        self, feeds: Iterable[Mapping[str, NDArray[Any]]], *, on_step: Callable[[str], None] = lambda _: None
    ) -> dict[str, float]:
        """See :class:`export.precision.Lowering`: operands and results rounded, sums exact."""
        model = read(self._source)
        opset = model.opset_imports[""]
        nodes: dict[str, list[str]] = {}
        for node in model.graph:
            module = module_of(node)
            if node.op_type in PRODUCTS and self.layout.home(node) is not None and takes(node, 0, self.half, opset):
                nodes.setdefault(module, []).append(node.name or "")

        def rounded(graph: ir.Graph, value: ir.Value, before: ir.Node, name: str) -> ir.Value:
            for to, suffix in ((self.half, "rounded"), (_FLOAT, "back")):
                attributes, its_name = {"to": to}, f"{name}.{suffix}"
                value = add_node(
                    graph, "Cast", [value], its_name, name=its_name, before=before, dtype=to, attributes=attributes
                )
            return value

        def twin(graph: ir.Graph, node: ir.Node) -> ir.Value:
            made = twin_of(node, node.inputs)
            for i, value in enumerate(node.inputs):
                if value is not None:
                    made.replace_input_with(i, rounded(graph, value, made, f"{made.name}.{i}"))
            half = _cast_behind(graph, made.outputs[0], self.half, f"{made.name}.rounded")
            return _cast_behind(graph, half, _FLOAT, f"{made.name}.back")

        return own_errors(self._source, nodes, twin, feeds, on_step=on_step)

    def write(self, path: Path, *, keep: Collection[str] = ()) -> list[Path]:
        """Write the half graph. See :class:`export.precision.Lowering`."""
        kept = self._kept(keep)
        files = write(self._rewritten(kept), path)
        check_types(path, self.precision, kept, source=self.layout)
        return files

    def write_runnable(self, path: Path, *, keep: Collection[str] = ()) -> list[Path]:
        """Write the fp32 copy that rounds as the half graph does."""
        model = self._rewritten(self._kept(keep))
        _emulate(model.graph, self.half)
        return write(model, path)

    def _rewritten(self, kept: Collection[str]) -> ir.Model:
        model = read(self._source)
        _Rewrite(model, self, kept).apply()
        return model

    def _kept(self, keep: Collection[str]) -> frozenset[str]:
        everything = {name for layer in self.layers for name in (layer, *self.products(layer))}
        kept = self.layout.check_known(keep, everything) | set(self.unfit)
        if all(layer in kept or kept.issuperset(self.products(layer)) for layer in self.layers):
            raise ExportError(f"every layer is kept in fp32, so nothing would be {self.precision}")
        return kept


class _Rewrite:
    """One rewriting of the canonical graph in place, with the layers and modules ``kept`` left in fp32."""

    def __init__(self, model: ir.Model, lowering: HalfLowering, kept: Collection[str]) -> None:
        self.graph, self.opset, self.kept = model.graph, model.opset_imports[""], kept
        self.layout, self.half = lowering.layout, lowering.half
        self.float32, self.unfit = lowering.float32, lowering.unfit_weights
        self.made: dict[str | None, DataType] = {}  # type of each float tensor that a node makes
        self.node_type: dict[ir.Node, DataType] = {}
        self.casts: dict[tuple[ir.Value, DataType], ir.Value] = {}

    def apply(self) -> None:
        """Decide every type, then change the graph."""
        for node in self.graph:
            self.node_type[node] = self._decide(node)
            for i, value in enumerate(node.outputs):
                if value.name in self.float32:
                    takes_half = takes(node, i, self.half, self.opset, output=True)
                    self.made[value.name] = self.node_type[node] if takes_half else _FLOAT
        self._retype_weights()
        for node in list(self.graph):
            for i, value in self._floats(node):
                wanted = self._wanted(node, i)
                if wanted != (self.half if value.dtype == self.half else _FLOAT):
                    node.replace_input_with(i, self._cast(value, wanted, before=node))
            for value in node.outputs:
                if value.name in self.made:
                    value.dtype = self.made[value.name]
        for i, value in enumerate(self.graph.outputs):
            if value.dtype == self.half:  # outputs stay fp32 under the names they have
                name, value.name = value.name or "", f"{value.name}.{_SUFFIX[self.half]}"
                self.graph.outputs[i] = _cast_behind(self.graph, value, _FLOAT, name)

    def _decide(self, node: ir.Node) -> DataType:
        """The type that ``node`` computes in."""
        floats = self._floats(node)
        if not any(takes(node, i, self.half, self.opset) for i, _ in floats):
            return _FLOAT
        home = self.layout.home(node)
        if home in self.kept or module_of(node) in self.kept or node.op_type in FLOAT_OPS:
            return _FLOAT
        if any(value.name in self.unfit for _, value in floats):
            return _FLOAT
        table = node.op_type == "Gather" and floats[0][1].is_initializer()
        if home is not None and (node.op_type in PRODUCTS or table):
            return self.half
        if node.op_type not in MOVING_OPS and home not in self.layout.layers:
            return _FLOAT
        operands = {self.made.get(value.name, _FLOAT) for _, value in floats if not value.is_initializer()}
        if node.op_type == "Concat" and home in self.layout.layers and self.half in operands:
            return self.half  # keys or values of tokens and of prompts, for the products that read them
        return self.half if operands == {self.half} else _FLOAT

    def _floats(self, node: ir.Node) -> list[tuple[int, ir.Value]]:
        """The float operands that have a type to decide, by position."""
        if node.op_type == "Cast":  # takes any type and says itself what it makes
            return []
        return [(i, v) for i, v in enumerate(node.inputs) if v is not None and v.name in self.float32]

    def _wanted(self, node: ir.Node, i: int) -> DataType:
        cast = node.op_type == "Cast"
        return self.node_type[node] if not cast and takes(node, i, self.half, self.opset) else _FLOAT

    def _retype_weights(self) -> None:
        """Store every weight once, in the type its users take; one that both kinds use stays fp32 and is cast."""
        for name, value in list(self.graph.initializers.items()):
            if name not in self.float32 or value.const_value is None:
                continue
            wanted = {self._wanted(node, i) for node, i in value.uses()}
            if self.half not in wanted:
                continue
            rounded = value.const_value.numpy().astype(self.half.numpy())
            if wanted == {self.half}:
                value.const_value = ir.tensor(rounded, name=name)
                value.dtype = self.half
            elif value.const_value.size == 1:  # a copy of one number costs less than a cast
                self.casts[value, self.half] = add_weight(self.graph, f"{name}.{_SUFFIX[self.half]}", rounded)

    def _cast(self, value: ir.Value, to: DataType, *, before: ir.Node) -> ir.Value:
        """``value`` in another type; one cast for all its users."""
        if (value, to) not in self.casts:
            module = module_of(value.producer() or before)
            self.casts[value, to] = _cast_behind(self.graph, value, to, f"{value.name}.{_SUFFIX[to]}", module)
        return self.casts[value, to]


def write_emulated(file: Path, precision: str, path: Path) -> Path:
    """The fp32 copy that rounds as a half graph does, made of a half graph's own file: its bytes, and nothing else.

    Args:
        file: as :meth:`HalfLowering.write` or a later step wrote it.
        precision: ``fp16`` or ``bf16``.
        path: where to write the copy.

    Raises:
        ExportError: the file cannot be read, or types in it contradict each other.
    """
    model, types = read(file), element_types(file)
    made = (value for node in model.graph for value in node.outputs)
    for value in (*model.graph.initializers.values(), *made):
        value.dtype = types[value.name or ""]
    _emulate(model.graph, HALVES[precision])
    return write(model, path)[0]


def _emulate(graph: ir.Graph, half: DataType) -> None:
    """Have a half graph compute in fp32 and round, by a pair of casts, whatever would be half; in place."""
    for name, weight in graph.initializers.items():
        if weight.dtype == half and weight.const_value is not None:
            weight.const_value = ir.tensor(weight.const_value.numpy().astype(np.float32), name=name)
            weight.dtype = _FLOAT
    for node in list(graph):
        for value in node.outputs:
            if value.dtype != half:
                continue
            users, rounded = list(value.uses()), value
            if node.op_type != "Cast":
                value.dtype = _FLOAT
                if node.op_type in MOVING_OPS:
                    continue  # values that were rounded before
                rounded = _cast_behind(graph, value, half, f"{value.name}.rounded")
            back = _cast_behind(graph, rounded, _FLOAT, f"{value.name}.back")
            for user, i in users:
                user.replace_input_with(i, back)


def _cast_behind(graph: ir.Graph, value: ir.Value, to: DataType, name: str, module: str = "") -> ir.Value:
    """``value`` in another type under another name, right behind what makes it."""
    after, its_name = value.producer(), f"{module}/Cast" if module else "Cast"
    before = graph[0] if after is None else None
    return add_node(
        graph, "Cast", [value], name, name=its_name, before=before, after=after, dtype=to, attributes={"to": to}
    )


def _fits(constant: ir.Value, half: DataType) -> bool:
    """Whether half holds a constant: it neither overflows nor, as a whole, vanishes (an epsilon)."""
    if constant.const_value is None or constant.const_value.size == 0:
        return True
    magnitude = np.abs(constant.const_value.numpy())
    largest = magnitude.max(where=np.isfinite(magnitude), initial=0.0)
    with np.errstate(over="ignore"):
        rounded = np.asarray(largest).astype(half.numpy()).astype(np.float32)
    return bool(np.isfinite(rounded) and not 0 < largest < _SMALLEST[half])
