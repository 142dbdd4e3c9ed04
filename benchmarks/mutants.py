"""Single faults planted in a finished graph: in every kind of weight, and in every operator that can be swapped."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

__all__ = ["Mutant", "mutants_of"]

SWAPS = {
    "Add": "Sub",
    "Sub": "Add",
    "Mul": "Div",
    "Div": "Mul",
    "ArgMax": "ArgMin",
    "ArgMin": "ArgMax",
    "Erf": "Tanh",
    "Tanh": "Erf",
    "Relu": "Abs",
    "Gelu": "Relu",
    "FastGelu": "Relu",
    "Sigmoid": "Tanh",
    "Sqrt": "Abs",
    "ReduceL2": "ReduceL1",
    "ReduceMean": "ReduceMax",
    "ReduceMax": "ReduceMean",
    "ReduceSum": "ReduceMean",
    "Greater": "Less",
    "Less": "Greater",
    "Max": "Min",
    "Min": "Max",
}
_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
_SMALL_INTEGERS = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)

_HIGHEST = float(np.finfo(np.float32).max)  # which masks hold

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Attributes:
        role: what it is in, without numbers of layers; one mutant stands for all of its role.
        fault: what was done.
        place: the weight or node that was altered.
        plant: alters a graph.
    """

    role: str
    fault: str
    place: str
    plant: Callable[[onnx.ModelProto], None]

    @property
    def name(self) -> str:
        return f"{self.fault}: {self.place}"


def mutants_of(model: onnx.ModelProto, *, experts: int, seed: int = 0) -> list[Mutant]:
    """One mutant of each kind of place and each fault that it can have, at a place that is drawn, in a drawn order.

    Args:
        model: with its weights.
        experts: K, to find tables by.
        seed: of both drawings, and of rows and elements.
    """
    random = np.random.default_rng(seed)
    found: dict[tuple[str, str], list[Mutant]] = {}
    for mutant in (*_of_weights(model, experts, seed), *_of_nodes(model)):
        found.setdefault((mutant.role, mutant.fault), []).append(mutant)
    chosen = [group[int(random.integers(len(group)))] for _, group in sorted(found.items())]
    return [chosen[i] for i in random.permutation(len(chosen))]


def _of_weights(model: onnx.ModelProto, experts: int, seed: int) -> Iterator[Mutant]:
    readers = {name: node for node in reversed(model.graph.node) for name in node.input}
    for index, tensor in enumerate(model.graph.initializer):
        if tensor.name not in readers:
            continue
        role = _role(tensor.name) if "." in tensor.name else f"constant of {_role(readers[tensor.name].name)}"
        array = _values(tensor)
        for fault, change in _faults(tensor, experts, seed + index).items():
            if not np.array_equal(_stored(tensor, change(array.copy())), array):

                def plant(
                    graph: onnx.ModelProto, name: str = tensor.name, change: Callable[[Array], Array] = change
                ) -> None:
                    (one,) = (one for one in graph.graph.initializer if one.name == name)
                    one.CopyFrom(_tensor(one, change(_values(one))))

                yield Mutant(role, fault, tensor.name, plant)


def _faults(tensor: onnx.TensorProto, experts: int, seed: int) -> dict[str, Callable[[Array], Array]]:
    """What can go wrong with a tensor of this type and shape."""
    shape = tuple(tensor.dims)

    def one_element(array: Array) -> Array:
        flat = array.reshape(-1)
        flat[np.random.default_rng(seed).integers(flat.size)] += max(float(np.abs(flat).max()), 1.0)
        return array

    def shuffled(array: Array) -> Array:
        return array[np.roll(np.arange(len(array)), 1)]

    def one_expert(array: Array) -> Array:
        axis = shape.index(experts)
        rows = np.moveaxis(array, axis, 0)
        rows[np.random.default_rng(seed).integers(experts)] *= -1
        return array

    if tensor.data_type not in (*_FLOATS, *_SMALL_INTEGERS):
        return {"one more": lambda array: array + 1} if tensor.data_type == onnx.TensorProto.INT64 else {}
    found: dict[str, Callable[[Array], Array]] = {
        "sign": lambda array: -array,
        "× 0.25": lambda array: array * np.float32(0.25),
        "× 1.01": lambda array: np.clip(array * np.float64(1.01), -_HIGHEST, _HIGHEST),
        "zero": np.zeros_like,
    }
    if int(np.prod(shape)) > 1:
        found["one element"] = one_element
    if shape and shape[0] > 1:
        found["rows shuffled"] = shuffled
    if experts > 1 and experts in shape and re.search(r"dynamic|expert|router", tensor.name):
        found["one expert's sign"] = one_expert
    return found


def _of_nodes(model: onnx.ModelProto) -> Iterator[Mutant]:
    for index, node in enumerate(model.graph.node):
        for fault, change in _operator_faults(node).items():

            def plant(
                graph: onnx.ModelProto, index: int = index, change: Callable[[onnx.NodeProto], None] = change
            ) -> None:
                change(graph.graph.node[index])

            yield Mutant(f"{node.op_type} in {_role(node.name)}", fault, node.name or node.output[0], plant)


def _operator_faults(node: onnx.NodeProto) -> dict[str, Callable[[onnx.NodeProto], None]]:
    """What can be put in a node's place, or in its attributes'."""
    kind, found = node.op_type, dict[str, Callable[[onnx.NodeProto], None]]()
    given = {attribute.name: attribute for attribute in node.attribute}
    if kind in SWAPS:
        found[f"{kind} → {SWAPS[kind]}"] = _swap
    if kind == "Softmax":
        found["axis"] = lambda node: _set(node, "axis", -2)
    if kind == "Transpose" and "perm" in given:
        perm = list(given["perm"].ints)
        found["perm"] = lambda node: _set(node, "perm", [*perm[:-2], perm[-1], perm[-2]])
    if kind == "TopK":
        found["largest"] = lambda node: _set(node, "largest", 0)
    if kind == "Gemm":
        found["alpha"] = lambda node: _set(node, "alpha", 0.25)
    if kind in ("LayerNormalization", "SkipLayerNormalization"):
        found["epsilon"] = lambda node: _set(node, "epsilon", 0.1)
    if kind in ("MultiHeadAttention", "Attention"):
        found["scale"] = lambda node: _set(node, "scale", 1.0)
    if kind in ("Concat", "MatMul") and len(node.input) > 1:
        found["first two inputs swapped"] = lambda node: _exchange(node, 0, 1)
    if kind == "Where":
        found["branches swapped"] = lambda node: _exchange(node, 1, 2)
    return found


def _swap(node: onnx.NodeProto) -> None:
    node.op_type = SWAPS[node.op_type]
    if node.domain:  # a fused operator, in whose place a standard one of its first input stands
        node.domain = ""
        del node.input[1:], node.attribute[:]


def _set(node: onnx.NodeProto, name: str, value: int | float | list[int]) -> None:
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])


def _exchange(node: onnx.NodeProto, first: int, second: int) -> None:
    inputs = list(node.input)
    inputs[first], inputs[second] = inputs[second], inputs[first]
    node.input[:] = inputs


def _values(tensor: onnx.TensorProto) -> Array:
    """A tensor's values, floats as float32; integers stay what they are."""
    array = numpy_helper.to_array(tensor)
    return array.astype(np.float32) if tensor.data_type in (*_FLOATS, *_SMALL_INTEGERS) else array


def _stored(tensor: onnx.TensorProto, values: Array) -> Array:
    """``values`` as the tensor's type holds them, in the form of :func:`_values`."""
    return _values(_tensor(tensor, values))


def _tensor(like: onnx.TensorProto, values: Array) -> onnx.TensorProto:
    dtype = onnx.helper.tensor_dtype_to_np_dtype(like.data_type)
    if like.data_type in _SMALL_INTEGERS:
        limits = np.iinfo(dtype)
        values = np.clip(np.rint(values), limits.min, limits.max)
    with np.errstate(over="ignore"):
        return numpy_helper.from_array(values.astype(dtype), like.name)


def _role(name: str) -> str:
    return re.sub(r"\d+", "#", name)
