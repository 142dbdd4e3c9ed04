"""The tiny model as ONNX. Needs the onnx package, so an old device's environment is given the file instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.device import tiny

_TYPES = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}


# y of the text alone, then what takes it; ``write_split`` puts a file's end between them.
_TEXT = [
    helper.make_node("Gather", ["words", "input_ids"], ["embedded"]),  # (B, T, WIDTH)
    helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),  # (B, T)
    helper.make_node("Unsqueeze", ["mask", "axis_2"], ["mask_3d"]),
    helper.make_node("Mul", ["embedded", "mask_3d"], ["masked"]),
    helper.make_node("ReduceSum", ["masked", "axis_1"], ["total"], keepdims=0),  # (B, WIDTH)
    helper.make_node("ReduceSum", ["mask", "axis_1"], ["count"], keepdims=1),  # (B, 1)
    helper.make_node("Div", ["total", "count"], ["y"]),
]
_IMAGE = [
    helper.make_node("Reshape", ["pixel_values", "flat"], ["row"]),
    helper.make_node("MatMul", ["row", "pixels"], ["x"]),
    helper.make_node("Add", ["x", "y"], ["hidden"]),
    helper.make_node("MatMul", ["hidden", "head"], ["logits"]),
    helper.make_node("MatMul", ["hidden", "router"], ["scores"]),
    helper.make_node("Reshape", ["scores", "table"], ["scores_3d"]),
    helper.make_node("Softmax", ["scores_3d"], ["routing"], axis=-1),
]


def write_graph(path: Path, *, ir_version: int = 10, opset: int = 18, external: bool = False) -> Path:
    """Write the graph of :func:`tests.device.tiny.oracle`; ``external`` puts the weights into ``<path>.data``."""
    graph = tiny.manifest()["graphs"][0]
    return _write(path, [*_TEXT, *_IMAGE], graph, ir_version=ir_version, opset=opset, external=external)


def write_split(main: Path, text: Path, *, missing: bool = False) -> None:
    """The same as two files, to the last bit; what crosses is y and -y. ``missing``: a stand-in where no text is."""
    graph = tiny.split(tiny.manifest(), missing=missing)["graphs"][0]
    pooled = [*_TEXT[:-1], helper.make_node("Div", ["total", "count"], ["y_text"])]
    if missing:
        pooled = [
            *_TEXT,
            helper.make_node("Cast", ["text_present"], ["is_there"], to=TensorProto.BOOL),
            helper.make_node("Unsqueeze", ["is_there", "axis_1"], ["is_there_2d"]),
            helper.make_node("Where", ["is_there_2d", "y", "stand_in"], ["y_text"]),
        ]
    ends = [
        helper.make_node("Neg", ["y_text"], ["minus"]),
        helper.make_node("Concat", ["y_text", "minus"], ["conditions_text"], axis=1),
    ]
    _write(text, [*pooled, *ends], graph["parts"][0])
    begin = helper.make_node("Split", ["conditions_text"], ["y", "minus"], axis=1, num_outputs=2)
    routed = helper.make_node("Sub", ["x", "minus"], ["hidden_2"])
    scores = helper.make_node("MatMul", ["hidden_2", "router"], ["scores"])
    _write(main, [begin, *_IMAGE[:4], routed, scores, *_IMAGE[5:]], graph)


def _write(
    path: Path,
    nodes: list[onnx.NodeProto],
    graph: dict[str, Any],
    *,
    ir_version: int = 10,
    opset: int = 18,
    external: bool = False,
) -> Path:
    constants = {
        **{name: numpy_helper.from_array(value, name) for name, value in tiny.weights().items()},
        "flat": helper.make_tensor("flat", TensorProto.INT64, [2], [0, -1]),
        "table": helper.make_tensor("table", TensorProto.INT64, [3], [0, tiny.LAYERS, tiny.EXPERTS]),
        "axis_1": helper.make_tensor("axis_1", TensorProto.INT64, [1], [1]),
        "axis_2": helper.make_tensor("axis_2", TensorProto.INT64, [1], [2]),
    }
    read = {name for node in nodes for name in node.input}
    ends = {
        kind: [helper.make_tensor_value_info(t["name"], _TYPES[t["dtype"]], t["shape"]) for t in graph[kind]]
        for kind in ("inputs", "outputs")
    }
    kept = [value for name, value in constants.items() if name in read]
    model = helper.make_model(
        helper.make_graph(nodes, "tiny", ends["inputs"], ends["outputs"], kept),
        ir_version=ir_version,
        opset_imports=[helper.make_opsetid("", opset)],
    )
    if ir_version <= 10:
        onnx.checker.check_model(model)
    onnx.save(model, path, save_as_external_data=external, location=f"{path.name}.data", size_threshold=0)
    return path
