"""What may stand in an exported graph: what the TensorRT parsers and ONNX Runtime all take.

The canonical graph has standard operators only, no control flow, and no shape that depends on values: one file for
ONNX Runtime, the TensorRT 10.3 parser (the oldest supported, JetPack 6) and TensorRT for RTX. The allowlist is what
transformers decompose into at opsets 17 to 20, cut to the operators that NVIDIA's parser knows; what is refused with a
reason of its own was seen to fail there, or makes shapes that no engine can be planned for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from export.limits import MAX_IR_VERSION, OPSETS
from mope_deploy.errors import ExportError

__all__ = ["ALLOWED_OPS", "MAX_TOP_K", "Refusal", "check", "lint"]

MAX_TOP_K = 3840  # TensorRT's own limit on k

_ARITHMETIC = """Abs Add And Ceil Clip Cos Div Elu Equal Erf Exp Floor Gelu Greater GreaterOrEqual HardSigmoid HardSwish
    IsInf IsNaN LeakyRelu Less LessOrEqual Log Max Min Mod Mul Neg Not Or Pow Reciprocal Relu Round Sigmoid Sign Sin
    Softplus Sqrt Sub Tanh Where Xor"""
_LAYERS = """AveragePool BatchNormalization Conv Gemm GlobalAveragePool GroupNormalization InstanceNormalization
    LayerNormalization LogSoftmax MatMul MaxPool Softmax"""
_REDUCTIONS = (
    "ArgMax ArgMin CumSum ReduceL1 ReduceL2 ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare"
)
_SHAPES = """Cast Concat Constant ConstantOfShape DepthToSpace Expand Flatten Identity Pad Range Reshape Resize Shape
    Size Slice SpaceToDepth Split Squeeze Tile Transpose Trilu Unsqueeze"""
_INDEXING = "Gather GatherElements GatherND OneHot ScatterElements ScatterND TopK"
_QUANTISATION = "DequantizeLinear QuantizeLinear"
ALLOWED_OPS = frozenset(" ".join((_ARITHMETIC, _LAYERS, _REDUCTIONS, _SHAPES, _INDEXING, _QUANTISATION)).split())

_DATA_SHAPED = ("Compress", "NonMaxSuppression", "NonZero", "StringSplit", "Unique")
_CONTROL_FLOW = ("If", "Loop", "Scan", "SequenceMap")
_OPAQUE = {
    "Attention": "is an operator of opset 23 that the older parsers do not have",
    "Einsum": "is not taken by older TensorRT parsers",
    "RMSNormalization": "is an operator of opset 23 that the older parsers do not have",
}
_RANDOM = (
    "Bernoulli",
    "Dropout",
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
)

# Inputs that decide the shape of the output: they may be computed from shapes, never from values of the graph's inputs.
_SHAPE_OPERANDS: Mapping[str, tuple[int, ...]] = {
    "ConstantOfShape": (0,),
    "Expand": (1,),
    "OneHot": (1,),
    "Pad": (1,),
    "Range": (0, 1, 2),
    "Reshape": (1,),
    "Resize": (1, 2, 3),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Tile": (1,),
    "TopK": (1,),
}
# Inputs that TensorRT wants as constants of the file.
_CONSTANT_OPERANDS: Mapping[str, tuple[int, ...]] = {
    "CumSum": (1,),
    "ReduceL1": (1,),
    "ReduceL2": (1,),
    "ReduceMax": (1,),
    "ReduceMean": (1,),
    "ReduceMin": (1,),
    "ReduceProd": (1,),
    "ReduceSum": (1,),
    "ReduceSumSquare": (1,),
    "Slice": (3,),
    "Squeeze": (1,),
    "TopK": (1,),
    "Unsqueeze": (1,),
}
_FROM_SHAPES = ("Shape", "Size")  # their outputs depend on shapes alone, whatever their input is
_DTYPES = frozenset(
    (
        TensorProto.BFLOAT16,
        TensorProto.BOOL,
        TensorProto.FLOAT,
        TensorProto.FLOAT16,
        TensorProto.INT8,
        TensorProto.INT32,
        TensorProto.INT64,
    )
)


@dataclass(frozen=True)
class Refusal:
    """One thing that a target cannot take.

    Attributes:
        node: name of the node, or of the graph's part if it is no node.
        op: its operator, with the domain if it is not the standard one.
        reason: why it cannot stay.
        todo: what to do about it.
    """

    node: str
    op: str
    reason: str
    todo: str

    def __str__(self) -> str:
        return f"{self.op} at {self.node!r} {self.reason}: {self.todo}"


def check(model: ModelProto, *, what: str = "the exported graph", extra_ops: Collection[str] = ()) -> None:
    """Raise unless every target takes ``model``.

    Args:
        model: external data need not be loaded.
        what: what the message calls it.
        extra_ops: standard operators allowed besides :data:`ALLOWED_OPS`, for a file that is not for every target.

    Raises:
        ExportError: naming the first refusals with their nodes, and how many there are.
    """
    found = lint(model, extra_ops=extra_ops)
    if found:
        shown = "; ".join(map(str, found[:3]))
        more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
        raise ExportError(
            f"{what} holds {len(found)} thing{'s' if len(found) > 1 else ''} that a target cannot take: {shown}{more}"
        )


def lint(model: ModelProto, *, extra_ops: Collection[str] = ()) -> list[Refusal]:
    """Everything in ``model`` that a target cannot take, in the graph's order; external data need not be loaded."""
    allowed = ALLOWED_OPS.union(extra_ops)
    found = list(_header(model))
    constants = _constants(model.graph)
    found += _tensors(model.graph)
    depends_on_values = {value.name for value in model.graph.input} - constants.keys()
    for node in model.graph.node:
        found += _node(node, constants, depends_on_values, allowed)
        if node.op_type not in _FROM_SHAPES and any(name in depends_on_values for name in node.input):
            depends_on_values.update(node.output)
    return found


def _header(model: ModelProto) -> Iterator[Refusal]:
    if model.ir_version > MAX_IR_VERSION:
        yield Refusal(
            "file",
            f"IR version {model.ir_version}",
            f"is newer than {MAX_IR_VERSION}, the newest that ONNX Runtime 1.18 reads",
            "write the file with an older IR version",
        )
    for opset in model.opset_import:
        if opset.domain in ("", "ai.onnx") and opset.version not in OPSETS:
            yield Refusal(
                "file",
                f"opset {opset.version}",
                f"is outside {OPSETS.start} to {OPSETS.stop - 1}, which all targets take",
                "export with --opset 18",
            )
    for function in model.functions:
        yield Refusal(
            "file", f"function {function.domain}.{function.name}", "was left un-inlined", "inline it before saving"
        )


def _tensors(graph: GraphProto) -> Iterator[Refusal]:
    for tensor in graph.initializer:
        if tensor.data_type not in _DTYPES:
            yield _dtype(tensor.name, "initializer", tensor.data_type)
    for value in (*graph.input, *graph.output):
        kind = value.type.WhichOneof("value")
        if kind != "tensor_type":
            yield Refusal(
                value.name, f"{kind or 'an untyped value'}", "is no tensor", "make every input and output a tensor"
            )
        elif value.type.tensor_type.elem_type not in _DTYPES:
            yield _dtype(value.name, "input or output", value.type.tensor_type.elem_type)


def _node(
    node: NodeProto,
    constants: Mapping[str, np.ndarray | None],
    depends_on_values: set[str],
    allowed: Collection[str],
) -> Iterator[Refusal]:
    name = node.name or (node.output[0] if node.output else "a node without a name")
    op = f"{node.domain}.{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type

    def refuse(reason: str, todo: str) -> Refusal:
        return Refusal(name, op, reason, todo)

    if node.domain not in ("", "ai.onnx"):
        yield refuse(
            "is no standard operator", "keep such operators in a variant for the one runtime that has them (--fuse)"
        )
        return
    if node.op_type in _CONTROL_FLOW or any(a.HasField("g") or a.graphs for a in node.attribute):
        yield refuse("is control flow", "compute both branches and select, or unroll the loop")
        return
    if node.op_type in _DATA_SHAPED:
        yield refuse("makes a shape that depends on data", "use TopK with a constant k and Gather, or a mask")
        return
    if node.op_type in _OPAQUE:
        yield refuse(_OPAQUE[node.op_type], "decompose it into MatMul, Softmax and arithmetic (opset 18 does)")
        return
    if node.op_type in _RANDOM:
        yield refuse("is not deterministic", "export the model in evaluation mode, without noise or dropout")
        return
    if node.op_type not in allowed:
        yield refuse("is outside the allowlist of operators that every target takes", "express it by allowed operators")
        return
    yield from _operands(node, constants, depends_on_values, refuse)
    yield from _attributes(node, refuse)


def _operands(
    node: NodeProto,
    constants: Mapping[str, np.ndarray | None],
    depends_on_values: set[str],
    refuse: Callable[[str, str], Refusal],
) -> Iterator[Refusal]:
    for position in _SHAPE_OPERANDS.get(node.op_type, ()):
        if position < len(node.input) and node.input[position] in depends_on_values:
            yield refuse(
                f"makes a shape that depends on data (its input {node.input[position]!r} is computed from values)",
                "compute the shape from shapes and constants alone",
            )
    for position in _CONSTANT_OPERANDS.get(node.op_type, ()):
        operand = node.input[position] if position < len(node.input) else ""
        refused_above = operand in depends_on_values and position in _SHAPE_OPERANDS.get(node.op_type, ())
        if operand and operand not in constants and not refused_above:
            yield refuse(f"has the non-constant operand {operand!r}", "make it a constant of the graph")
    if node.op_type == "TopK" and len(node.input) > 1:
        k = constants.get(node.input[1])
        if k is not None and int(k.reshape(-1)[0]) > MAX_TOP_K:
            yield refuse(f"has k = {int(k.reshape(-1)[0]):,}", f"TensorRT takes k up to {MAX_TOP_K:,}")


def _attributes(node: NodeProto, refuse: Callable[[str, str], Refusal]) -> Iterator[Refusal]:
    values = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    if node.op_type in ("ScatterElements", "ScatterND") and values.get("reduction", b"none") != b"none":
        yield refuse(
            f"has the reduction {values['reduction'].decode()!r}", "scatter without a reduction, or use MatMul"
        )
    if node.op_type == "Resize" and values.get("antialias", 0):
        yield refuse("has antialias = 1", "resize in preprocessing, where both sides do the same")
    if node.op_type == "Cast" and values.get("to") not in _DTYPES:
        yield refuse(f"casts to {TensorProto.DataType.Name(values['to'])}", "stay with float, half or integers")
    if node.op_type == "Constant":
        tensor = values.get("value")
        if isinstance(tensor, TensorProto) and tensor.data_type not in _DTYPES:
            yield refuse(f"holds {TensorProto.DataType.Name(tensor.data_type)}", "stay with float, half or integers")


def _dtype(name: str, kind: str, data_type: int) -> Refusal:
    return Refusal(
        name,
        kind,
        f"is {TensorProto.DataType.Name(data_type)}, which TensorRT does not have",
        "store it as FLOAT, FLOAT16, BFLOAT16, INT8, INT32, INT64 or BOOL",
    )


def _constants(graph: GraphProto) -> dict[str, np.ndarray | None]:
    """Names of constants, with the value of those that are small and inside the file."""
    found: dict[str, np.ndarray | None] = {}
    for tensor in graph.initializer:
        found[tensor.name] = _small(tensor)
    for node in graph.node:
        if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
            value = onnx.helper.get_attribute_value(node.attribute[0]) if node.attribute else None
            found[node.output[0]] = _small(value) if isinstance(value, TensorProto) else np.asarray(value)
        elif node.op_type == "Identity" and node.input[0] in found:
            found[node.output[0]] = found[node.input[0]]
    return found


def _small(tensor: TensorProto) -> np.ndarray | None:
    if tensor.data_location == TensorProto.EXTERNAL or int(np.prod(tensor.dims, dtype=np.int64)) > 64:
        return None
    return numpy_helper.to_array(tensor)
