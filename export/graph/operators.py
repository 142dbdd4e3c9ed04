"""What ONNX's operators do to types and values, as far as graphs are rewritten by it."""

from __future__ import annotations

import onnx
import onnx_ir as ir

__all__ = ["FLOAT_OPS", "MOVING_OPS", "takes"]

# Sums, roots and exponentials: in fp32 wherever they stand.
_FLOAT_OPS = """BatchNormalization Cos CumSum Exp GroupNormalization InstanceNormalization LayerNormalization Log
    LogSoftmax Pow Reciprocal ReduceL1 ReduceL2 ReduceMean ReduceProd ReduceSum ReduceSumSquare Sin
    Softmax Softplus Sqrt"""
FLOAT_OPS = frozenset(_FLOAT_OPS.split())
# These move values and compute nothing: a type goes through, wherever they stand.
_MOVING_OPS = """Concat DepthToSpace Expand Flatten Gather GatherElements GatherND Identity Pad Reshape Slice
    SpaceToDepth Split Squeeze Tile Transpose Trilu Unsqueeze"""
MOVING_OPS = frozenset(_MOVING_OPS.split())


def takes(node: ir.Node, i: int, type: ir.DataType, opset: int, *, output: bool = False) -> bool:
    """Whether the definition of ``node``'s operator allows ``type`` for its ``i``-th input or output."""
    schema = onnx.defs.get_schema(node.op_type, opset, "")
    formal = schema.outputs if output else schema.inputs
    type_str = formal[min(i, len(formal) - 1)].type_str
    allowed = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}.get(type_str, [type_str])
    return f"tensor({type.name.lower()})" in allowed
