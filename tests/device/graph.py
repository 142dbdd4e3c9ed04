"""The tiny model as ONNX. Needs the onnx package, so an old device's environment is given the file instead."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.device import tiny

_TYPES = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}


def write_graph(path: Path, *, ir_version: int = 10, opset: int = 18, external: bool = False) -> Path:
    """Write the graph of :func:`tests.device.tiny.oracle`; ``external`` puts the weights into ``<path>.data``."""
    constants = {
        **{name: numpy_helper.from_array(value, name) for name, value in tiny.weights().items()},
        "flat": helper.make_tensor("flat", TensorProto.INT64, [2], [0, -1]),
        "table": helper.make_tensor("table", TensorProto.INT64, [3], [0, tiny.LAYERS, tiny.EXPERTS]),
        "axis_1": helper.make_tensor("axis_1", TensorProto.INT64, [1], [1]),
        "axis_2": helper.make_tensor("axis_2", TensorProto.INT64, [1], [2]),
    }
    nodes = [
        helper.make_node("Gather", ["words", "input_ids"], ["embedded"]),  # (B, T, WIDTH)
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),  # (B, T)
        helper.make_node("Unsqueeze", ["mask", "axis_2"], ["mask_3d"]),
        helper.make_node("Mul", ["embedded", "mask_3d"], ["masked"]),
        helper.make_node("ReduceSum", ["masked", "axis_1"], ["total"], keepdims=0),  # (B, WIDTH)
        helper.make_node("ReduceSum", ["mask", "axis_1"], ["count"], keepdims=1),  # (B, 1)
        helper.make_node("Div", ["total", "count"], ["y"]),
        helper.make_node("Reshape", ["pixel_values", "flat"], ["row"]),
        helper.make_node("MatMul", ["row", "pixels"], ["x"]),
        helper.make_node("Add", ["x", "y"], ["hidden"]),
        helper.make_node("MatMul", ["hidden", "head"], ["logits"]),
        helper.make_node("MatMul", ["hidden", "router"], ["scores"]),
        helper.make_node("Reshape", ["scores", "table"], ["scores_3d"]),
        helper.make_node("Softmax", ["scores_3d"], ["routing"], axis=-1),
    ]
    graph = tiny.manifest()["graphs"][0]
    ends = {
        kind: [helper.make_tensor_value_info(t["name"], _TYPES[t["dtype"]], t["shape"]) for t in graph[kind]]
        for kind in ("inputs", "outputs")
    }
    model = helper.make_model(
        helper.make_graph(nodes, "tiny", ends["inputs"], ends["outputs"], list(constants.values())),
        ir_version=ir_version,
        opset_imports=[helper.make_opsetid("", opset)],
    )
    if ir_version <= 10:
        onnx.checker.check_model(model)
    onnx.save(model, path, save_as_external_data=external, location=f"{path.name}.data", size_threshold=0)
    return path
