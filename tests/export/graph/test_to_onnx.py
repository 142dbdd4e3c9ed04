"""The exported file: what it promises from outside, what is in it, and that other engines take it."""

from __future__ import annotations

import collections
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper, parser
from torch import Tensor, nn

from export.graph.files import save
from export.graph.static import to_static
from export.graph.to_onnx import trace
from mope_deploy.errors import ExportError, UsageError
from tests.export.conftest import KINDS, OPSETS, Export
from tests.export.rtx import parse_and_build
from tests.tiny import tiny_inputs


def axes(value: onnx.ValueInfoProto) -> list[int | str]:
    return [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]


@pytest.mark.parametrize("kind", KINDS)
def test_names_axes_and_versions(kind: str, exports: dict[str, Export]) -> None:
    model = exports[kind].proto()
    inputs = {value.name: axes(value) for value in model.graph.input}
    outputs = {value.name: axes(value) for value in model.graph.output}
    assert inputs == {
        "pixel_values": ["batch", 3, 32, 24],
        "input_ids": ["batch", "text_length"],
        "attention_mask": ["batch", "text_length"],
    }
    expected: dict[str, list[int | str]] = {"logits": ["batch", 4 if kind == "unrouted" else 3]}
    if kind != "unrouted":
        expected["routing"] = ["batch", 2, 5]
    assert outputs == expected
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", OPSETS[kind])]
    assert model.ir_version <= 10
    assert model.producer_name == "mope-deploy"


@pytest.mark.parametrize("kind", KINDS)
def test_tells_nothing_about_the_machine(kind: str, exports: dict[str, Export]) -> None:
    export = exports[kind]
    content = export.file.read_bytes()
    for trace_of_it in (str(Path.cwd()), str(Path.home()), "site-packages", "stack_trace", "forward("):
        assert trace_of_it.encode() not in content
    model = export.proto()
    assert not model.metadata_props
    assert not model.doc_string
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)


@pytest.mark.parametrize("kind", ["top2", "top1"])
def test_top_k_is_a_constant_and_experts_are_gathered(kind: str, exports: dict[str, Export]) -> None:
    graph = exports[kind].proto().graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    nodes = [node for node in graph.node if node.op_type == "TopK"]
    assert len(nodes) == 2
    assert {int(numpy_helper.to_array(constants[node.input[1]])[0]) for node in nodes} == {2 if kind == "top2" else 1}
    gathered = {node.input[0] for node in graph.node if node.op_type == "Gather"}
    assert {"layers.0.dynamic.table", "layers.1.dynamic.table"} <= gathered
    assert not {"ScatterElements", "ScatterND", "GatherND", "NonZero"} & {node.op_type for node in graph.node}


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_is_stored_once(kind: str, exports: dict[str, Export]) -> None:
    export = exports[kind]
    arrays = [numpy_helper.to_array(tensor) for tensor in export.proto().graph.initializer]
    large = [array for array in arrays if array.size > 16 and array.dtype == np.float32]
    fingerprints = collections.Counter(np.sort(array, axis=None).tobytes() for array in large)
    assert max(fingerprints.values()) == 1
    held = to_static(export.model)  # what was folded stands there in place of what it was made from
    assert sum(array.size for array in large) <= sum(
        tensor.numel() for tensor in (*held.parameters(), *held.buffers()) if tensor.is_floating_point()
    )


def test_weights_and_nodes_are_called_after_their_modules(exports: dict[str, Export]) -> None:
    for kind in ("dense", "top2"):  # exported as traced, and converted to an older opset
        graph = exports[kind].proto().graph
        names = {tensor.name for tensor in graph.initializer}
        assert {
            "main.encoder.blocks.1.attn.k_proj.weight.T",
            "complementary.text.backbone.encoder.encoder.layer.0.intermediate.dense.weight.T",
            "complementary.text.prompts.0.keys",
            "layers.0.dynamic.table",
            "layers.1.router.keys.T",
            "head.classifier.weight",
        } <= names
        large = [t.name for t in graph.initializer if np.prod(t.dims) > 16 and t.data_type == onnx.TensorProto.FLOAT]
        assert [name for name in large if "." not in name] == []
        nodes = [node.name for node in graph.node]
        assert len(set(nodes)) == len(nodes)
        assert {"layers.0.router/Softmax", "main.encoder.blocks.0.attn.q_proj/MatMul"} <= set(nodes)


def test_the_named_weight_is_the_parameter(exports: dict[str, Export]) -> None:
    export = exports["dense"]
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in export.proto().graph.initializer}
    weights = np.split(export.model.main.encoder.blocks[1].attn.qkv.weight.detach().numpy(), 3)
    for name, weight in zip(("q_proj", "k_proj", "v_proj"), weights, strict=True):
        assert np.array_equal(stored[f"main.encoder.blocks.1.attn.{name}.weight.T"], weight.T)


@pytest.mark.parametrize("kind", KINDS)
def test_nvidias_compiler_parses_and_builds_it(kind: str, exports: dict[str, Export]) -> None:
    assert parse_and_build(exports[kind].file, longest=40) == []


def test_large_weights_go_beside_the_graph(exports: dict[str, Export], tmp_path: Path) -> None:
    export = exports["dense"]
    files = save(export.graph, tmp_path / "model.onnx", embed_limit=50_000)
    assert [file.name for file in files] == ["model.onnx", "model.onnx.data"]
    assert files[0].stat().st_size < export.file.stat().st_size - 50_000
    feeds = {name: tensor.numpy() for name, tensor in tiny_inputs(3, 5).items()}
    apart = ort.InferenceSession(str(files[0])).run(None, feeds)
    together = ort.InferenceSession(str(export.file)).run(None, feeds)
    assert all(np.array_equal(a, b) for a, b in zip(apart, together, strict=True))


def test_small_weights_stay_inside(exports: dict[str, Export], tmp_path: Path) -> None:
    assert save(exports["dense"].graph, tmp_path / "model.onnx") == [tmp_path / "model.onnx"]
    assert (tmp_path / "model.onnx").read_bytes() == exports["dense"].file.read_bytes()


def test_refuses_an_opset_that_a_target_cannot_read(exports: dict[str, Export]) -> None:
    export = exports["dense"]
    with pytest.raises(UsageError, match=r"received 23; expected 17 to 20"):
        trace(to_static(export.model), export.config, opset=23)


def test_what_cannot_be_traced_is_one_line(exports: dict[str, Export]) -> None:
    class Selecting(nn.Module):
        def forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
            return (inputs["pixel_values"][inputs["input_ids"].sum(1) > 20],) if inputs["input_ids"].sum() > 3 else ()

    with pytest.raises(ExportError, match=r"torch's exporter failed") as error:
        trace(Selecting(), exports["unrouted"].config)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_a_batch_axis_fixed_by_tracing_is_an_error(exports: dict[str, Export]) -> None:
    class Fixed(nn.Module):
        def forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
            return (torch.ones(2, 4) * inputs["pixel_values"].mean() + inputs["input_ids"].sum(),)

    with pytest.raises(ExportError, match=r"dynamic axes of logits; received \{\}; expected \{0: 'batch'\}"):
        trace(Fixed(), exports["unrouted"].config)  # type: ignore[arg-type]


def test_saving_lints_what_was_written(tmp_path: Path) -> None:
    bad = parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 18]> g (float[batch, 4] x) => (int64[2, n] y) { y = NonZero(x) }'
    )
    with pytest.raises(ExportError, match=r"bad\.onnx holds 1 thing .* NonZero"):
        save(ir.from_proto(bad), tmp_path / "bad.onnx")
