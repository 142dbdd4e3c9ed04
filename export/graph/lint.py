"""What may stand in an exported graph: what the TensorRT parsers and ONNX Runtime all take.

The canonical graph has standard operators only, no control flow, and no shape that depends on values: one file for
ONNX Runtime, the TensorRT 10.3 parser (the oldest supported, JetPack 6) and TensorRT for RTX. The allowlist is what
transformers decompose into at opsets 17 to 20, cut to the operators that NVIDIA's parser knows; what is refused with a
reason of its own was seen to fail there, or makes shapes that no engine can be planned for. The allowlist itself is
where devices have it too (:mod:`mope_deploy.engines.operators`): they run nothing else.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir import DataType

from export.limits import MAX_IR_VERSION, OPSETS
from mope_deploy.engines.operators import ALLOWED_OPS
from mope_deploy.errors import ExportError

__all__ = ["ALLOWED_OPS", "MAX_TOP_K", "Refusal", "check", "lint"]

MAX_TOP_K = 3840  # TensorRT's own limit on k

# Operators, or what is found of them, that are refused with a reason of their own: the reason, and what to do.
_CONTROL_FLOW = ("is control flow", "compute both branches and select, or unroll the loop")
_DATA_SHAPED = ("makes a shape that depends on data", "use TopK with a constant k and Gather, or a mask")
_RANDOM = ("is not deterministic", "export the model in evaluation mode, without noise or dropout")
_DECOMPOSE = "decompose it into MatMul, Softmax and arithmetic (opset 18 does)"
_LATER = ("is an operator of opset 23 that the older parsers do not have", _DECOMPOSE)
_REFUSED: Mapping[str, tuple[str, str]] = {
    **dict.fromkeys(["If", "Loop", "Scan", "SequenceMap"], _CONTROL_FLOW),
    **dict.fromkeys(["Compress", "NonMaxSuppression", "NonZero", "StringSplit", "Unique"], _DATA_SHAPED),
    **dict.fromkeys(["Attention", "RMSNormalization"], _LATER),
    "Einsum": ("is not taken by older TensorRT parsers", _DECOMPOSE),
    **dict.fromkeys(["Bernoulli", "Dropout", "Multinomial", "RandomNormal", "RandomNormalLike"], _RANDOM),
    **dict.fromkeys(["RandomUniform", "RandomUniformLike"], _RANDOM),
}

# Inputs that decide the shape of the output: they may be computed from shapes, never from values of the graph's inputs.
_SHAPE_OPERANDS: Mapping[str, tuple[int, ...]] = {
    **dict.fromkeys(("Expand", "OneHot", "Pad", "Reshape", "Split", "Tile", "TopK"), (1,)),
    "ConstantOfShape": (0,),
    "Range": (0, 1, 2),
    "Resize": (1, 2, 3),
    "Slice": (1, 2, 3, 4),
}
# Inputs that TensorRT wants as constants of the file.
_CONSTANT_OPERANDS: Mapping[str, tuple[int, ...]] = {
    **dict.fromkeys((op for op in ALLOWED_OPS if op.startswith("Reduce")), (1,)),
    **dict.fromkeys(("CumSum", "Squeeze", "TopK", "Unsqueeze"), (1,)),
    "Slice": (3,),
}
_FROM_SHAPES = ("Shape", "Size")  # their outputs depend on shapes alone, whatever their input is
_DTYPES = frozenset(
    (DataType.BFLOAT16, DataType.BOOL, DataType.FLOAT, DataType.FLOAT16, DataType.INT8, DataType.INT32, DataType.INT64)
)
_STAY = "stay with float, half or integers"


@dataclass(frozen=True)
class Refusal:
    """One thing that a target cannot take."""

    node: str  # its name, or that of the graph's part if it is no node
    op: str  # with the domain if it is not the standard one
    reason: str  # why it cannot stay
    todo: str

    def __str__(self) -> str:
        return f"{self.op} at {self.node!r} {self.reason}: {self.todo}"


def check(model: ir.Model, *, what: str = "the exported graph", extra_ops: Collection[str] = ()) -> None:
    """Raise unless every target takes ``model``.

    Args:
        model: as it was read back.
        what: what the message calls it.
        extra_ops: standard operators allowed besides :data:`ALLOWED_OPS`, for a file that is not for every target.

    Raises:
        ExportError: naming the first refusals with their nodes, and how many there are.
    """
    found = lint(model, extra_ops=extra_ops)
    if found:
        shown = "; ".join([*map(str, found[:3]), *([f"and {len(found) - 3} more"] if len(found) > 3 else [])])
        things = f"{len(found)} thing{'s' if len(found) > 1 else ''}"
        raise ExportError(f"{what} holds {things} that a target cannot take: {shown}")


def lint(model: ir.Model, *, extra_ops: Collection[str] = ()) -> list[Refusal]:
    """Everything in ``model`` that a target cannot take, in the graph's order."""
    allowed = ALLOWED_OPS.union(extra_ops)
    found = [*_header(model), *_tensors(model.graph)]
    from_values = {value for value in model.graph.inputs if not value.is_initializer()}
    for node in model.graph:
        name = node.name or (node.outputs[0].name if node.outputs else None) or "a node without a name"
        op = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        refused = _operator(node, allowed)
        reasons = [refused] if refused else [*_operands(node, from_values), *_attributes(node)]
        found += [Refusal(name, op, reason, todo) for reason, todo in reasons]
        if node.op_type not in _FROM_SHAPES and not from_values.isdisjoint(node.inputs):
            from_values.update(node.outputs)
    return found


def _header(model: ir.Model) -> Iterator[Refusal]:
    if model.ir_version > MAX_IR_VERSION:
        yield Refusal(
            "file",
            f"IR version {model.ir_version}",
            f"is newer than {MAX_IR_VERSION}, the newest that ONNX Runtime 1.18 reads",
            "write the file with an older IR version",
        )
    for domain, opset in model.opset_imports.items():
        if domain in ("", "ai.onnx") and opset not in OPSETS:
            yield Refusal(
                "file",
                f"opset {opset}",
                f"is outside {OPSETS.start} to {OPSETS.stop - 1}, which all targets take",
                "export with --opset 18",
            )
    for domain, name, _ in model.functions:
        yield Refusal("file", f"function {domain}.{name}", "was left un-inlined", "inline it before saving")


def _tensors(graph: ir.Graph) -> Iterator[Refusal]:
    """Weights, inputs and outputs of types that TensorRT does not have, or that are no tensors."""
    for value in dict.fromkeys((*graph.initializers.values(), *graph.inputs, *graph.outputs)):
        name, dtype = value.name or "", value.dtype if value.const_value is None else value.const_value.dtype
        if value.const_value is None and not isinstance(value.type, ir.TensorType):
            kind = "an untyped value" if value.type is None else type(value.type).__name__
            yield Refusal(name, kind, "is no tensor", "make every input and output a tensor")
        elif dtype not in _DTYPES:
            yield Refusal(
                name,
                "initializer" if value.is_initializer() else "input or output",
                f"is {dtype and dtype.name}, which TensorRT does not have",
                "store it as FLOAT, FLOAT16, BFLOAT16, INT8, INT32, INT64 or BOOL",
            )


def _operator(node: ir.Node, allowed: Collection[str]) -> tuple[str, str] | None:
    """Why a node's operator cannot stay at all, and what to do about it."""
    if node.domain:
        return "is no standard operator", "keep such operators in a variant for the one runtime that has them (--fuse)"
    if node.op_type in _REFUSED:
        return _REFUSED[node.op_type]
    if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
        return _CONTROL_FLOW
    if node.op_type not in allowed:
        return "is outside the allowlist of operators that every target takes", "express it by allowed operators"
    return None


def _operands(node: ir.Node, from_values: Collection[ir.Value]) -> Iterator[tuple[str, str]]:
    shaping = _operands_at(node, _SHAPE_OPERANDS)
    for operand in shaping:
        if operand in from_values:
            yield (
                f"makes a shape that depends on data (its input {operand.name!r} is computed from values)",
                "compute the shape from shapes and constants alone",
            )
    for operand in _operands_at(node, _CONSTANT_OPERANDS):
        if _constant(operand) is None and not (operand in from_values and operand in shaping):
            yield f"has the non-constant operand {operand.name!r}", "make it a constant of the graph"
    k = _constant(node.inputs[1]) if node.op_type == "TopK" else None
    if k is not None and int(k.numpy().reshape(-1)[0]) > MAX_TOP_K:
        yield f"has k = {int(k.numpy().reshape(-1)[0]):,}", f"TensorRT takes k up to {MAX_TOP_K:,}"


def _operands_at(node: ir.Node, positions: Mapping[str, tuple[int, ...]]) -> list[ir.Value]:
    """Those inputs at the positions of the node's operator that are there."""
    found = (node.inputs[i] for i in positions.get(node.op_type, ()) if i < len(node.inputs))
    return [value for value in found if value is not None]


def _constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The constant of the file that a value is, by itself or under another name."""
    while value is not None and (node := value.producer()) is not None and node.op_type == "Identity":
        value = node.inputs[0]
    return None if value is None else ir.convenience.get_const_tensor(value)


def _attributes(node: ir.Node) -> Iterator[tuple[str, str]]:
    reduction = node.attributes.get_string("reduction", "none")
    if node.op_type in ("ScatterElements", "ScatterND") and reduction != "none":
        yield f"has the reduction {reduction!r}", "scatter without a reduction, or use MatMul"
    if node.op_type == "Resize" and node.attributes.get_int("antialias"):
        yield "has antialias = 1", "resize in preprocessing, where both sides do the same"
    if node.op_type == "Cast" and (to := DataType(node.attributes["to"].as_int())) not in _DTYPES:
        yield f"casts to {to.name}", _STAY
    held = ir.convenience.get_const_tensor(node.outputs[0]) if "value" in node.attributes else None
    if node.op_type == "Constant" and held is not None and held.dtype not in _DTYPES:
        yield f"holds {held.dtype.name}", _STAY
