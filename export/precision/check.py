"""What was asked for is what is in the file: types of every product and of all that stays fp32, read from the file.

The conversions decide types by walking a graph; here they are inferred anew from what was written, so a mistake there
is found here. Every lowering calls this on every file it writes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.graph.files import element_types, read
from export.graph.operators import FLOAT_OPS, MOVING_OPS, takes
from export.precision.layout import PRODUCTS, Layout, Product, layout, module_of, source_weight
from mope_deploy.engines.operators import DYNAMIC_OPS
from mope_deploy.errors import ExportError

__all__ = ["DYNAMIC_OPS", "HALVES", "check_types", "output_axis"]

HALVES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
_FLOAT, _INT8 = ir.DataType.FLOAT, ir.DataType.INT8
_FLOATS = (_FLOAT, *HALVES.values())
_QUANTISING = ("QuantizeLinear", "DequantizeLinear")
_LARGE = 16  # elements from which on a weight counts as one


def check_types(
    path: Path,
    precision: str,
    keep: Collection[str] = (),
    *,
    source: Layout | None = None,
    products: Collection[str] | None = None,
) -> dict[str, int]:
    """Check a lowered file.

    Args:
        path: the file.
        precision: one of :data:`mope_deploy.manifest.PRECISIONS`.
        keep: layers and products that were to stay in fp32.
        source: the canonical graph's layers, whose products must all be there; default: those that the file shows.
        products: the linear layers that were to be quantised; default: all in layers.

    Returns:
        How many products of the encoders have operands of each type, by the type's name in ONNX.

    Raises:
        ExportError: naming the node or tensor that is not what was asked for.
    """
    model = read(path)
    file = _File(model.graph, model.opset_imports[""], element_types(path), frozenset(keep))
    _check_products(file, source or file.layout)
    _check_edges(file)
    _check_stored_once(file)
    wanted = {p.name for p in file.layout.products.values() if not file.keeps(p.name)}
    wanted &= set(products) if products is not None else wanted
    if precision in HALVES:
        _check_half(file, HALVES[precision])
        _check_casts(file)
    elif precision == "int8":
        _refuse_types(file, HALVES.values(), precision)
        _check_int8(file, wanted)
    else:
        _refuse_types(file, HALVES.values(), precision)
        if any(node.op_type in _QUANTISING for node in file.graph):
            raise ExportError(f"{path.name} quantises and is called {precision}")
        _check_dynamic(file, wanted if precision == "int8-dynamic" else set())
    return dict(Counter(file.multiplies(node).name for node, _ in file.multiplying()))


def output_axis(node: ir.Node) -> int:
    """Which axis of a product's matrix counts its output channels: [in, out], or [out, in] for a Gemm with transB."""
    return 0 if node.op_type == "Gemm" and node.attributes.get_int("transB") else 1


class _File:
    """One file as read back, its element types as inferred, and the layers and products that were to stay fp32."""

    def __init__(self, graph: ir.Graph, opset: int, types: Mapping[str, ir.DataType], keep: frozenset[str]) -> None:
        self.graph, self.opset, self.types, self.keep = graph, opset, types, keep
        self.layout = layout(graph)

    def keeps(self, module: str) -> bool:
        """Whether a module was to stay fp32, by itself or with its layer."""
        product = self.layout.products.get(module)
        return module in self.keep or (product is not None and product.layer in self.keep)

    def type(self, value: ir.Value | None) -> ir.DataType | None:
        """The type of a tensor, None where there is none."""
        return None if value is None else self.types[value.name or ""]

    def floats(self, node: ir.Node) -> list[ir.DataType]:
        """Types of the node's operands and results of any float type."""
        found = [self.type(value) for value in (*node.inputs, *node.outputs)]
        return [type for type in found if type in _FLOATS and type is not None]

    def multiplying(self) -> Iterator[tuple[ir.Node, str]]:
        """Every product inside the encoders with its layer or part."""
        for node in self.graph:
            home = self.layout.home(node)
            if home is not None and node.op_type in PRODUCTS:
                yield node, home

    def multiplies(self, node: ir.Node) -> ir.DataType:
        """The type a product multiplies: int8 where both operands come out of a DequantizeLinear."""
        made = [value.producer() for value in node.inputs[:2] if value is not None]
        if node.op_type == "MatMulInteger" or all(n is not None and n.op_type == "DequantizeLinear" for n in made):
            return _INT8
        return self.type(node.inputs[0]) or ir.DataType.UNDEFINED


def _wrong(node: ir.Node, what: str, received: object, expected: object) -> ExportError:
    return ExportError(f"{node.op_type} at {node.name!r} {what}", received=received, expected=expected)


def _check_products(file: _File, source: Layout) -> None:
    """Every linear layer of the canonical graph is there, as often as it was applied, and no other."""
    for name in sorted(source.products.keys() ^ file.layout.products.keys()):
        there = name in file.layout.products
        raise ExportError(f"the linear layer {name!r} is {'new' if there else 'gone'} in the lowered file")
    for name, product in source.products.items():
        if len(file.layout.products[name].nodes) != len(product.nodes):
            found = len(file.layout.products[name].nodes)
            raise ExportError(f"applications of {name!r}", received=found, expected=len(product.nodes))


def _check_edges(file: _File) -> None:
    """Inputs and outputs are those of the canonical graph's types."""
    for value in (*file.graph.inputs, *file.graph.outputs):
        if file.type(value) not in (_FLOAT, ir.DataType.INT64):
            raise ExportError(
                f"{value.name!r}, an input or output", received=file.type(value), expected="FLOAT or INT64"
            )


def _check_casts(file: _File) -> None:
    """No cast undoes another."""
    for node in file.graph:
        before = node.inputs[0].producer() if node.op_type == "Cast" and node.inputs[0] is not None else None
        if before is not None and before.op_type == "Cast":
            types = [file.type(value) for value in (*before.inputs, *node.inputs, *node.outputs)]
            if len(set(types)) > 1 and all(type in _FLOATS for type in types):
                raise _wrong(node, "casts what was cast", " → ".join(t.name for t in types if t), "one cast at most")


def _check_stored_once(file: _File) -> None:
    """No two weights hold the same numbers, whatever their types."""
    seen: dict[tuple[int, bytes], list[tuple[str, NDArray[np.float32]]]] = {}
    for name, value in file.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.size < _LARGE or tensor.dtype not in (*_FLOATS, _INT8):
            continue
        if tensor.dtype == _INT8:
            stem = name.removesuffix(".int8").removesuffix("_quantized")
            if stem != name and stem in file.graph.initializers:
                raise ExportError(f"the weight {stem!r} is stored twice", received=f"{name!r} beside it")
            continue
        flat = tensor.numpy().reshape(-1)
        with np.errstate(over="ignore"):
            key = (tensor.size, _coarse(flat[:64]).tobytes())
            for other, array in seen.setdefault(key, []):
                if np.array_equal(_coarse(array), _coarse(flat)) and flat.any():
                    raise ExportError(f"the weight {other!r} is stored twice", received=f"the same numbers in {name!r}")
        seen[key].append((name, flat))


def _coarse(array: NDArray[np.generic]) -> NDArray[np.float32]:
    """Numbers to the precision of bf16, which every type keeps."""
    return array.astype(np.float32).astype(ir.DataType.BFLOAT16.numpy()).astype(np.float32)


def _refuse_types(file: _File, types: Collection[ir.DataType], precision: str) -> None:
    for name, type in file.types.items():
        if type in types:
            raise ExportError(f"{name!r} in a file called {precision}", received=type.name, expected="FLOAT")


def _check_half(file: _File, half: ir.DataType) -> None:
    strays = [type for type in HALVES.values() if type != half]
    _refuse_types(file, strays, half.name)
    if any(node.op_type in (*_QUANTISING, *DYNAMIC_OPS) for node in file.graph):
        raise ExportError(f"the file quantises and is called {half.name}")
    for node, home in file.multiplying():
        kept = home in file.keep or module_of(node) in file.keep
        allowed = takes(node, 0, half, file.opset)  # Conv knows no bf16 before opset 22
        expected = half if allowed and not kept else _FLOAT
        if set(file.floats(node)) != {expected}:
            found = ", ".join(sorted({type.name for type in file.floats(node)}))
            raise _wrong(node, "multiplies at another precision than asked for", found, expected.name)
    for node in file.graph:
        moving = node.op_type in (*MOVING_OPS, "Cast")
        if (node.op_type in FLOAT_OPS or (file.layout.home(node) is None and not moving)) and half in file.floats(node):
            raise _wrong(node, "should have stayed fp32", half.name, "FLOAT")
    if half not in (file.multiplies(node) for node, _ in file.multiplying()):
        raise ExportError(f"no product of the file is {half.name}")


def _check_int8(file: _File, wanted: Collection[str]) -> None:
    if any(node.op_type in DYNAMIC_OPS for node in file.graph):
        raise ExportError("the file quantises as it runs and is called int8")
    used: set[ir.Node] = set()
    for node, product in _linear(file):
        if product.name not in wanted:
            continue
        activation, weight = (value.producer() if value is not None else None for value in node.inputs[:2])
        quantise = activation.inputs[0].producer() if activation is not None and activation.inputs[0] else None
        if activation is None or quantise is None or (quantise.op_type, activation.op_type) != _QUANTISING:
            raise _wrong(node, "multiplies an activation that is not quantised", "FLOAT", "INT8 by a Q/DQ pair")
        if weight is None or weight.op_type != "DequantizeLinear" or file.type(weight.inputs[0]) != _INT8:
            raise _wrong(node, "multiplies a weight that is not quantised", "FLOAT", "INT8 by a DequantizeLinear")
        _check_activation(file, quantise, activation)
        _check_weight(file, node, weight)
        used |= {quantise, activation, weight}
    for node in file.graph:
        if node.op_type in _QUANTISING and node not in used:
            raise _wrong(node, "quantises something that was to stay fp32", "INT8", "FLOAT")
    if not used:
        raise ExportError("no product of the file is quantised")


def _check_activation(file: _File, quantise: ir.Node, dequantise: ir.Node) -> None:
    if [v and v.name for v in quantise.inputs[1:]] != [v and v.name for v in dequantise.inputs[1:]]:
        raise _wrong(dequantise, "undoes another quantisation", "another scale or zero-point", "those of its pair")
    if file.type(quantise.outputs[0]) != _INT8:
        raise _wrong(quantise, "makes codes", file.type(quantise.outputs[0]), "INT8")
    scale = _symmetric(quantise)
    if scale.ndim:
        raise _wrong(quantise, "has scales", f"of shape {scale.shape}", "one for the tensor")


def _check_weight(file: _File, product: ir.Node, dequantise: ir.Node) -> None:
    codes = dequantise.inputs[0]
    axis = output_axis(product)
    found = dequantise.attributes.get_int("axis", 1)
    scale = _symmetric(dequantise)
    if codes is None or not codes.is_initializer() or codes.const_value is None:
        raise _wrong(dequantise, "dequantises something that is no stored weight", codes and codes.name, "INT8 codes")
    shape = tuple(codes.const_value.shape.numpy())
    if found != axis or scale.shape != (shape[axis],):
        raise _wrong(
            dequantise,
            "is not per output channel",
            f"axis {found} and scales of shape {scale.shape}",
            f"axis {axis} and scales of shape {(shape[axis],)}",
        )
    if codes.const_value.numpy().min() < -127:
        raise _wrong(dequantise, "has codes that are not symmetric", -128, "-127 to 127")


def _symmetric(node: ir.Node) -> NDArray[np.float32]:
    """The node's scales.

    Raises:
        ExportError: a zero-point is not 0, or a scale not positive.
    """
    scale, zero = (value.const_value if value is not None else None for value in node.inputs[1:3])
    if scale is None or zero is None or zero.dtype != _INT8 or zero.numpy().any():
        found = "none" if zero is None else f"{zero.dtype.name} {zero.numpy().reshape(-1)[:3].tolist()}"
        raise _wrong(node, "is not symmetric: its zero-point", found, "INT8 0")
    scales = scale.numpy()
    if not (np.isfinite(scales).all() and (scales > 0).all()):
        raise _wrong(node, "has a scale that is no step", scales.min(), "above 0")
    return scales


def _check_dynamic(file: _File, wanted: Collection[str]) -> None:
    """Exactly the linear layers ``wanted`` multiply integers."""
    for node, product in _linear(file):
        found = file.type(source_weight(node.inputs[1]))
        expected = _INT8 if product.name in wanted else _FLOAT
        if (node.op_type == "MatMulInteger") != (expected == _INT8) or found != expected:
            raise _wrong(node, "multiplies at another precision than asked for", found, expected.name)
    linear = {node for node, _ in _linear(file)}
    for node in file.graph:
        if node.op_type == "MatMulInteger" and node not in linear:
            raise _wrong(node, "quantises something that was to stay fp32", "INT8", "FLOAT")


def _linear(file: _File) -> list[tuple[ir.Node, Product]]:
    """Every application of a linear layer inside an encoder layer."""
    owners = {name: product for product in file.layout.products.values() for name in product.nodes}
    return [(node, owners[node.name or ""]) for node in file.graph if (node.name or "") in owners]
