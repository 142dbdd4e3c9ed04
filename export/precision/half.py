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

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.graph import files as graphs
from export.graph.operators import FLOAT_OPS, MOVING_OPS, takes
from export.precision.check import HALVES, check_types
from export.precision.layout import PRODUCTS, Layout, layout, module_of
from mope_deploy.errors import ExportError

__all__ = ["HalfLowering"]

_FLOAT = ir.DataType.FLOAT


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
        self._source = graph
        self._types = graphs.element_types(graph)
        self._layout = layout(graphs.read(graph).graph)
        found = self._layout.multiplying
        self.layers = tuple(name for name in found if found[name])
        if not any(found[name] for name in self._layout.layers):
            raise ExportError(f"{graph.name} has no encoder layer that could be {precision}")
        self.unfit = self._products_that_do_not_fit()
        strays = {t for t in self._types.values() if t in (*HALVES.values(), ir.DataType.DOUBLE)}
        if strays:
            raise ExportError(f"{graph.name} is not an fp32 graph", received=", ".join(sorted(t.name for t in strays)))

    def products(self, layer: str) -> tuple[str, ...]:
        """Modules of ``layer`` that multiply: linear layers, and attention by the module it stands in."""
        return self._layout.multiplying[layer]

    def write(self, path: Path, *, keep: Collection[str] = ()) -> list[Path]:
        """Write the half graph. See :class:`export.precision.Lowering`."""
        kept = self._kept(keep)
        model = graphs.read(self._source)
        _Rewrite(model, self._layout, self._types, HALVES[self.precision], kept).apply()
        files = graphs.write(model, path)
        check_types(path, self.precision, kept, source=self._layout)
        return files

    def write_runnable(self, path: Path, *, keep: Collection[str] = ()) -> list[Path]:
        """Write the fp32 copy that rounds as the half graph does."""
        kept = self._kept(keep)
        model = graphs.read(self._source)
        _Rewrite(model, self._layout, self._types, HALVES[self.precision], kept).apply(emulated=True)
        return graphs.write(model, path)

    def _products_that_do_not_fit(self) -> tuple[str, ...]:
        """Modules one of whose products has a weight that half cannot hold, in graph order: they stay fp32."""
        model = graphs.read(self._source)
        rewrite = _Rewrite(model, self._layout, self._types, HALVES[self.precision], ())
        found = [
            module_of(node)
            for node in model.graph
            if node.op_type in PRODUCTS
            and self._layout.home(node) is not None
            and any(value is not None and value.name in rewrite.unfit for value in node.inputs)
        ]
        return tuple(dict.fromkeys(found))

    def _kept(self, keep: Collection[str]) -> frozenset[str]:
        everything = {name for layer in self.layers for name in (layer, *self.products(layer))}
        kept = self._layout.check_known(keep, everything) | set(self.unfit)
        if all(layer in kept or kept.issuperset(self.products(layer)) for layer in self.layers):
            raise ExportError(f"every layer is kept in fp32, so nothing would be {self.precision}")
        return kept


class _Rewrite:
    """One rewriting of one graph in place.

    Args:
        model: the fp32 graph.
        layout: its layers.
        types: the element type of each of its tensors.
        half: FLOAT16 or BFLOAT16.
        kept: layers and modules to leave in fp32.
    """

    def __init__(
        self, model: ir.Model, layout: Layout, types: dict[str, ir.DataType], half: ir.DataType, kept: Collection[str]
    ) -> None:
        self.graph, self.layout, self.half, self.kept = model.graph, layout, half, kept
        self.opset = model.opset_imports[""]
        self.float32 = {name for name, type in types.items() if type == _FLOAT}
        self.unfit = {name for name, value in self.graph.initializers.items() if self._unfit(value)}
        self.made: dict[str, ir.DataType] = {}  # type of each float tensor that a node makes
        self.node_type: dict[ir.Node, ir.DataType] = {}

    def apply(self, *, emulated: bool = False) -> None:
        """Decide every type, then change the graph; ``emulated`` rounds to half and back instead of computing in it."""
        for node in self.graph:
            self.node_type[node] = self._decide(node)
            for i, value in enumerate(node.outputs):
                if value.name in self.float32:
                    takes_half = self._takes(node, i, output=True)
                    self.made[value.name or ""] = self.node_type[node] if takes_half else _FLOAT
        if emulated:
            self._emulate()
        else:
            self._retype()

    # --- which type ---

    def _decide(self, node: ir.Node) -> ir.DataType:
        """The type that ``node`` computes in."""
        floats = [(i, v) for i, v in enumerate(node.inputs) if v is not None and v.name in self.float32]
        if node.op_type == "Cast" or not floats or not any(self._takes(node, i) for i, _ in floats):
            return _FLOAT  # a Cast says itself what it makes
        home = self.layout.home(node)
        if home in self.kept or module_of(node) in self.kept or node.op_type in FLOAT_OPS:
            return _FLOAT
        if any(value.name in self.unfit for _, value in floats):
            return _FLOAT
        in_encoder = home is not None
        table = node.op_type == "Gather" and floats[0][1].is_initializer()
        if in_encoder and (node.op_type in PRODUCTS or table):
            return self.half
        if node.op_type not in MOVING_OPS and home not in self.layout.layers:
            return _FLOAT
        operands = {self.made.get(v.name or "", _FLOAT) for _, v in floats if not v.is_initializer()}
        if node.op_type == "Concat" and home in self.layout.layers and self.half in operands:
            return self.half  # keys or values of tokens and of prompts, for the products that read them
        return self.half if operands == {self.half} else _FLOAT

    def _takes(self, node: ir.Node, i: int, *, output: bool = False) -> bool:
        return takes(node, i, self.half, self.opset, output=output)

    def _unfit(self, value: ir.Value) -> bool:
        """Whether a constant overflows in half, or vanishes in it as a whole (an epsilon)."""
        if value.name not in self.float32 or value.const_value is None or value.const_value.size == 0:
            return False
        magnitude = np.abs(value.const_value.numpy())
        largest = magnitude.max(where=np.isfinite(magnitude), initial=0.0)
        limit = ir.DataType(self.half)
        with np.errstate(over="ignore"):
            rounded = np.asarray(largest).astype(limit.numpy()).astype(np.float32)
        smallest = 2.0**-14 if self.half == ir.DataType.FLOAT16 else 2.0**-126
        return bool(not np.isfinite(rounded) or 0 < largest < smallest)

    # --- the half graph itself ---

    def _retype(self) -> None:
        cast: dict[tuple[str, ir.DataType], ir.Value] = {}
        self._retype_weights(cast)
        for node in list(self.graph):
            for i, value in self._inputs(node):
                wanted = self._wanted(node, i)
                found = self.half if value.dtype == self.half else _FLOAT
                if wanted != found:
                    node.replace_input_with(i, self._cast(value, wanted, before=node, known=cast))
            for value in node.outputs:
                if value.name in self.made:
                    value.dtype = self.made[value.name]
        for i, value in enumerate(self.graph.outputs):
            if value.dtype == self.half:
                self.graph.outputs[i] = self._as_output(value)

    def _retype_weights(self, cast: dict[tuple[str, ir.DataType], ir.Value]) -> None:
        """Store every weight once, in the type its users take; one that both kinds use stays fp32 and is cast."""
        for name, value in list(self.graph.initializers.items()):
            if name not in self.float32 or value.const_value is None:
                continue
            wanted = {self._wanted(node, i) for node, i in value.uses()}
            if self.half not in wanted:
                continue
            if wanted == {self.half}:
                value.const_value = ir.tensor(self._rounded(value), name=name)
                value.dtype = self.half
            elif value.const_value.size == 1:  # a copy of one number costs less than a cast
                cast[name, self.half] = graphs.add_weight(
                    self.graph, f"{name}.{self._suffix(self.half)}", self._rounded(value)
                )

    def _inputs(self, node: ir.Node) -> list[tuple[int, ir.Value]]:
        found = [(i, v) for i, v in enumerate(node.inputs) if v is not None and v.name in self.float32]
        # A Cast takes any type. To fp32 from a half tensor it is the same as ours; to integers it keeps its meaning.
        return [] if node.op_type == "Cast" else found

    def _wanted(self, node: ir.Node, i: int) -> ir.DataType:
        return self.node_type[node] if self._takes(node, i) else _FLOAT

    def _cast(
        self, value: ir.Value, to: ir.DataType, *, before: ir.Node, known: dict[tuple[str, ir.DataType], ir.Value]
    ) -> ir.Value:
        """``value`` in another type; one cast for all its users."""
        name = value.name or ""
        if (name, to) not in known:
            made = ir.Value(name=f"{name}.{self._suffix(to)}", shape=value.shape, type=ir.TensorType(to))
            producer = value.producer()
            module = module_of(producer if producer is not None else before)
            node = ir.Node("", "Cast", [value], [ir.AttrInt64("to", to)], outputs=[made], name=_under(module, "Cast"))
            if producer is not None:
                self.graph.insert_after(producer, node)
            else:
                self.graph.insert_before(self.graph[0], node)
            known[name, to] = made
        return known[name, to]

    def _as_output(self, value: ir.Value) -> ir.Value:
        """The graph's outputs stay fp32 under the names they have."""
        producer = value.producer()
        assert producer is not None
        name = value.name
        value.name = f"{name}.{self._suffix(self.half)}"
        made = ir.Value(name=name, shape=value.shape, type=ir.TensorType(_FLOAT))
        node = ir.Node("", "Cast", [value], [ir.AttrInt64("to", _FLOAT)], outputs=[made], name="Cast")
        self.graph.insert_after(producer, node)
        return made

    # --- its fp32 copy ---

    def _emulate(self) -> None:
        rounded: dict[tuple[str, ir.DataType], ir.Value] = {}
        for name, value in list(self.graph.initializers.items()):
            halves = [(node, i) for node, i in value.uses() if self._is_half_use(node, i)]
            if halves and value.const_value is not None:
                array = self._rounded(value).astype(np.float32)
                copy = graphs.add_weight(self.graph, f"{name}.{self._suffix(self.half)}", array)
                for node, i in halves:
                    node.replace_input_with(i, copy)
        for node in list(self.graph):
            for i, value in self._inputs(node):
                if value.is_initializer() or not self._is_half_use(node, i):
                    continue
                if self.made.get(value.name or "", _FLOAT) == _FLOAT:  # here the half graph has a cast
                    node.replace_input_with(i, self._round(value, before=node, known=rounded))
        for node in list(self.graph):
            if node.op_type in MOVING_OPS or node.op_type == "Cast":
                continue  # values that were rounded before
            for value in node.outputs:
                if self.made.get(value.name or "") == self.half:
                    users = list(value.uses())
                    result = self._round(value, before=node, known=rounded)
                    for user, i in users:
                        user.replace_input_with(i, result)
                    for i, output in enumerate(self.graph.outputs):
                        if output is value:
                            result.name, value.name = value.name, f"{value.name}.unrounded"
                            self.graph.outputs[i] = result

    def _is_half_use(self, node: ir.Node, i: int) -> bool:
        value = node.inputs[i]
        if value is None or value.name not in self.float32 or node.op_type == "Cast":
            return False
        return self._wanted(node, i) == self.half

    def _round(self, value: ir.Value, *, before: ir.Node, known: dict[tuple[str, ir.DataType], ir.Value]) -> ir.Value:
        """``value`` rounded to half, in fp32."""
        name = value.name or ""
        there = (name, self.half) in known
        half = self._cast(value, self.half, before=before, known=known)
        if there:
            return known[f"{name}.{self._suffix(self.half)}", _FLOAT]
        return self._cast(half, _FLOAT, before=before, known=known)

    def _rounded(self, value: ir.Value) -> NDArray[Any]:
        assert value.const_value is not None
        return value.const_value.numpy().astype(self.half.numpy())

    def _suffix(self, type: ir.DataType) -> str:
        return {ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16"}.get(type, "fp32")


def _under(module: str, op: str) -> str:
    return f"{module}/{op}" if module else op
