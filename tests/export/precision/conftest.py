"""The tiny graphs at every precision, each written once a run, and hand-made encoders of one layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper, parser

from export.precision import Lowering, lowering
from tests.export.conftest import Export
from tests.export.runtime import feeds

ROUTED = ("dense", "top2", "top1")
LOWERED = ("fp16", "bf16", "int8", "int8-dynamic")


def relative(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    return float(np.abs(found.astype(np.float64) - wanted).max() / np.abs(wanted).max())


@dataclass(frozen=True)
class Lowered:
    """One graph at one precision."""

    export: Export
    lowering: Lowering
    file: Path
    runnable: Path


class AllLowered(dict[tuple[str, str], Lowered]):
    """By kind of model and precision, each made when it is first asked for."""

    def __init__(self, exports: Mapping[str, Export], folder: Path) -> None:
        super().__init__()
        self.exports, self.folder = exports, folder

    def __missing__(self, key: tuple[str, str]) -> Lowered:
        kind, precision = key
        export = self.exports[kind]
        made = lowering(export.file, precision, calibration=(feeds(16, 4 + i, seed=i) for i in range(5)))
        folder = self.folder / kind / precision
        (folder / "run").mkdir(parents=True)
        (file,) = made.write(folder / "model.onnx")
        (runnable,) = made.write_runnable(folder / "run" / "model.onnx")
        self[key] = Lowered(export, made, file, runnable)
        return self[key]


@pytest.fixture(scope="session")
def lowered(exports: dict[str, Export], tmp_path_factory: pytest.TempPathFactory) -> AllLowered:
    return AllLowered(exports, tmp_path_factory.mktemp("lowered"))


def types(file: Path) -> dict[str, str]:
    """The element type of every tensor of a file by name, as onnx infers them."""
    model = onnx.load(file)
    del model.graph.value_info[:]
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True, check_type=True).graph
    found = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.value_info, *graph.output)} | {
        tensor.name: tensor.data_type for tensor in graph.initializer
    }
    return {name: onnx.TensorProto.DataType.Name(type) for name, type in found.items()}


def product_types(file: Path) -> dict[str, str]:
    """What every MatMul, Gemm and Conv of a file multiplies, by node name; a weight's type where operands differ."""
    found, kinds = {}, types(file)
    for node in onnx.load(file).graph.node:
        if node.op_type in ("MatMul", "Gemm", "Conv", "MatMulInteger"):
            assert node.op_type == "MatMulInteger" or kinds[node.input[0]] == kinds[node.input[1]], node.name
            found[node.name] = kinds[node.input[1]]
    return found


B0 = "main.encoder.blocks.0"


def hand_made(folder: Path, body: str, weights: Mapping[str, NDArray[Any]], *, names: Mapping[str, str]) -> Path:
    """A graph from ONNX's text form.

    Args:
        folder: where it is written.
        body: nodes from ``x`` (n, 4) and ``flags`` int64 (n, 4) to ``y``.
        weights: initializers; their names may not hold dots in the text form: ``__`` stands for one.
        names: node names by the first output of each node; the others have no module.
    """
    model = parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 18]> g (float[n, 4] x, int64[n, 4] flags) => (float[n, m] y) {{ {body} }}'
    )
    renamed = {name: name.replace("__", ".") for name in weights}
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(a), renamed[n]) for n, a in weights.items())
    for node in model.graph.node:
        node.name = names.get(node.output[0], "")
        node.input[:] = [renamed.get(name, name) for name in node.input]
    onnx.save(model, folder / "made.onnx")
    return folder / "made.onnx"


def one_layer(folder: Path, *, weight: NDArray[Any], bias: NDArray[Any], gemm: bool = False) -> Path:
    """x → linear layer → y inside an encoder layer that attends (to itself, with a Softmax)."""
    product = "Gemm<transB=1>(x, B0__fc__weight, B0__fc__bias)" if gemm else "MatMul(x, B0__fc__weight__T)"
    body = f"p = {product} " + ("y = Softmax(p)" if gemm else "b = Add(p, B0__fc__bias) y = Softmax(b)")
    body = body.replace("B0", B0.replace(".", "__"))
    stem = B0.replace(".", "__")
    weights = {f"{stem}__fc__weight" + ("" if gemm else "__T"): weight, f"{stem}__fc__bias": bias}
    names = {"p": f"{B0}.fc/" + ("Gemm" if gemm else "MatMul"), "b": f"{B0}.fc/Add", "y": f"{B0}.attn/Softmax"}
    return hand_made(folder, body, weights, names=names)
