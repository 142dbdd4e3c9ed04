"""The gate passes a faithful file and no other; every planted fault must fail it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from rich.console import Console

from export.gate.cases import generated_cases
from export.gate.parity import measure
from export.gate.parity_report import require_parity
from export.graph.exporter_config import TASK, MoPEExporterConfig
from mope_deploy.errors import ParityError
from tests.export.conftest import KINDS, Export, make_model
from tests.export.gate.faults import edit, rename
from tests.tiny import tiny_model

Fault = Callable[[ModelProto], None]


def swap(first: int, second: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array[[first, second]] = array[[second, first]]
        return array

    return change


def swap_columns(array: np.ndarray) -> np.ndarray:
    return swap(0, 1)(array.T.copy()).T


def half_precision_logits(model: ModelProto) -> None:
    rename(model, "logits", "wide")
    model.graph.node.append(helper.make_node("Cast", ["wide"], ["logits"], to=TensorProto.FLOAT16))
    output = next(value for value in model.graph.output if value.name == "wide")
    output.name = "logits"
    output.type.tensor_type.elem_type = TensorProto.FLOAT16


def fix(kind: str, name: str, axis: int, size: int) -> Fault:
    def fault(model: ModelProto) -> None:
        value = next(value for value in getattr(model.graph, kind) if value.name == name)
        value.type.tensor_type.shape.dim[axis].dim_value = size

    return fault


def attend_to_padding(model: ModelProto) -> None:
    """Make the additive mask 0 everywhere."""
    lowest = np.finfo(np.float32).min
    hit = [
        t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT and lowest in numpy_helper.to_array(t)
    ]
    assert hit
    for tensor in hit:
        tensor.CopyFrom(numpy_helper.from_array(np.zeros(tuple(tensor.dims), np.float32), tensor.name))


def swap_layers_of_routing(model: ModelProto) -> None:
    node = next(node for node in model.graph.node if node.output[0] == "routing")
    assert node.op_type == "Concat"
    node.input[:] = list(node.input)[::-1]


def drop_the_dynamic_prompt_of(layer: int) -> Fault:
    return lambda model: edit(model, f"layers.{layer}.dynamic.table", np.zeros_like)


FAULTS: dict[str, tuple[Fault, str]] = {
    "two experts swapped": (lambda m: edit(m, "layers.0.dynamic.table", swap(0, 3)), "logits"),
    "two experts swapped in the last layer": (lambda m: edit(m, "layers.1.dynamic.table", swap(1, 2)), "logits"),
    "two routing embeddings swapped": (lambda m: edit(m, "layers.1.router.keys.T", swap_columns), "experts differ"),
    "a router dropped": (lambda m: edit(m, "layers.0.router.keys.T", np.zeros_like), "routing"),
    "a router without the image": (lambda m: edit(m, "layers.0.router.project_x.weight", np.zeros_like), "routing"),
    "the layers of routing in another order": (swap_layers_of_routing, "experts differ"),
    "no dynamic prompt": (drop_the_dynamic_prompt_of(1), "logits"),
    "no static prompt": (lambda m: edit(m, "layers.0.static.values", np.zeros_like), "logits"),
    "no mapped prompt": (lambda m: edit(m, "mappers.text.up.weight", np.zeros_like), "logits"),
    "padding attended to": (attend_to_padding, "logits"),
    "a weight off by 1e-3": (lambda m: edit(m, "head.classifier.weight", lambda w: nudge(w, 1e-3)), "logits"),
    "a deep weight off by 1e-3": (
        lambda m: edit(m, "main.encoder.blocks.0.mlp.fc1.weight.T", lambda w: nudge(w, 1e-3)),
        "logits",
    ),
    "two labels swapped": (lambda m: edit(m, "head.classifier.weight", swap(0, 1)), "labels differ"),
    "NaN": (lambda m: edit(m, "head.classifier.bias", lambda b: b * np.nan), "logits on generated differ by nan"),
    "fewer positions than the longest text": (
        lambda m: edit(
            m, "complementary.text.backbone.encoder.embeddings.position_embeddings.weight", lambda p: p[:12]
        ),
        "running 3 × 40 tokens",
    ),
    "an output of another name": (lambda m: rename(m, "logits", "scores"), "names of the outputs"),
    "an input of another name": (lambda m: rename(m, "input_ids", "ids"), "names of the inputs"),
    "outputs in another order": (lambda m: m.graph.output.reverse(), "names of the outputs"),
    "half-precision logits": (half_precision_logits, "dtype and axes of logits: received tensor(float16)"),
    "a fixed batch of inputs": (fix("input", "pixel_values", 0, 2), "dtype and axes of pixel_values"),
    "a fixed text length": (fix("input", "attention_mask", 1, 7), "dtype and axes of attention_mask"),
    "a fixed batch of outputs": (fix("output", "routing", 0, 2), "dtype and axes of routing"),
}


def nudge(array: np.ndarray, by: float) -> np.ndarray:
    array.reshape(-1)[array.size // 2] += by
    return array


@pytest.mark.parametrize("kind", KINDS)
def test_passes_a_faithful_file(kind: str, exports: dict[str, Export]) -> None:
    export = exports[kind]
    report = require_parity(measure(export.model, export.file, export.config, generated_cases(export.config.graph)))
    routed = {"scores"} if export.model.config.dynamic else set()
    assert {check.output for check in report.values} == {*export.config.outputs} | routed
    assert all(check.values >= 128 and 0 < check.error < 1e-4 for check in report.values if check.output == "logits")
    labels = next(found for found in report.decisions if found.kind == "labels")
    assert labels.compared >= 43
    if kind == "unrouted":
        assert labels.compared == sum(case.batch for case in generated_cases(export.config.graph)) * 4  # multi-label
        assert [found.kind for found in report.decisions] == ["labels"]
    else:
        experts = next(found for found in report.decisions if found.kind == "experts")
        assert experts.compared == 2 * sum(case.batch for case in generated_cases(export.config.graph))
        assert report.figures()["experts_equal"] == experts.equal
    document = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert document["passed"] is True
    assert document["problems"] == []
    assert all(check["passed"] for check in document["values"])


@pytest.mark.parametrize("name", FAULTS)
def test_fails_every_planted_fault(name: str, exports: dict[str, Export], tmp_path: Path) -> None:
    export, (fault, expected) = exports["dense"], FAULTS[name]
    model = export.proto()
    fault(model)
    file = tmp_path / "faulty.onnx"
    onnx.save(model, file)
    report = measure(export.model, file, export.config, generated_cases(export.config.graph))
    assert not report.passed
    assert any(expected in problem for problem in report.problems()), report.problems()
    with pytest.raises(ParityError, match=r"faulty\.onnx does not compute what the model computes") as error:
        require_parity(report)
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 1
    json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.parametrize("which", [0, 3, -1])
def test_fails_another_epsilon_of_one_norm(which: int, exports: dict[str, Export], tmp_path: Path) -> None:
    export = exports["dense"]
    model = export.proto()
    norms = [node for node in model.graph.node if node.op_type == "LayerNormalization"]
    epsilon = next(attribute for attribute in norms[which].attribute if attribute.name == "epsilon")
    assert epsilon.f < 2e-6
    epsilon.f = 1e-3
    onnx.save(model, tmp_path / "faulty.onnx")
    assert not measure(
        export.model, tmp_path / "faulty.onnx", export.config, generated_cases(export.config.graph)
    ).passed


@pytest.mark.parametrize("kind", ["top2", "top1"])
@pytest.mark.parametrize("name", ["two experts swapped", "a router dropped", "a weight off by 1e-3"])
def test_fails_them_under_top_k_routing_too(name: str, kind: str, exports: dict[str, Export], tmp_path: Path) -> None:
    export = exports[kind]
    model = export.proto()
    FAULTS[name][0](model)
    onnx.save(model, tmp_path / "faulty.onnx")
    cases = generated_cases(export.config.graph)
    assert not measure(export.model, tmp_path / "faulty.onnx", export.config, cases).passed


def test_fails_a_file_that_does_not_load(exports: dict[str, Export], tmp_path: Path) -> None:
    export = exports["dense"]
    file = tmp_path / "cut.onnx"
    file.write_bytes(export.file.read_bytes()[:5000])
    report = measure(export.model, file, export.config, generated_cases(export.config.graph))
    assert not report.passed
    assert "loading in ONNX Runtime" in report.problems()[0]


def test_fails_a_file_whose_graph_knows_one_batch_size(exports: dict[str, Export], tmp_path: Path) -> None:
    """A Reshape to the traced size: what tracing with a wrong example leaves behind."""
    export = exports["dense"]
    model = export.proto()
    rename(model, "logits", "free")
    model.graph.initializer.append(numpy_helper.from_array(np.array([2, 3]), "traced_shape"))
    model.graph.node.append(helper.make_node("Reshape", ["free", "traced_shape"], ["logits"]))
    next(value for value in model.graph.output if value.name == "free").name = "logits"
    onnx.save(model, tmp_path / "fixed.onnx")
    report = measure(export.model, tmp_path / "fixed.onnx", export.config, generated_cases(export.config.graph))
    assert not report.passed
    assert any(
        "outputs differ from the manifest's at logits; received ('float32', (2, 3))" in problem
        for problem in report.problems()
    )


def test_fails_closed_when_little_or_nothing_was_compared(exports: dict[str, Export]) -> None:
    export = exports["dense"]
    nothing = measure(export.model, export.file, export.config, [])
    assert not nothing.passed
    assert nothing.problems() == ["nothing was compared"]
    little = measure(export.model, export.file, export.config, generated_cases(export.config.graph)[:2])
    assert not little.passed
    assert any("only 12 values of 128 needed" in problem for problem in little.problems())


def test_the_reference_is_the_model_in_evaluation_mode_and_is_left_in_its_own(
    vit: Path, bert: Path, exports: dict[str, Export]
) -> None:
    export = exports["dense"]
    model = make_model("dense", vit, bert).train()
    assert measure(model, export.file, export.config, generated_cases(export.config.graph)).passed
    assert model.training
    assert not model.main.training


def test_another_model_of_the_same_shape_fails(vit: Path, bert: Path, exports: dict[str, Export]) -> None:
    export = exports["dense"]
    other = tiny_model(vit, bert, seed=9)
    assert not measure(other, export.file, export.config, generated_cases(export.config.graph)).passed


class Strict(MoPEExporterConfig):
    """A tolerance that no float32 arithmetic meets, to see what is made of errors beyond it."""

    ATOL_FOR_VALIDATION = 1e-9


def test_rounding_of_float32_itself_is_no_fault(exports: dict[str, Export]) -> None:
    export = exports["dense"]
    report = measure(export.model, export.file, Strict(export.config.graph, TASK), generated_cases(export.config.graph))
    assert report.passed
    assert all(check.earned and check.rounding is not None for check in report.values)
    for check in report.values:
        assert check.rounding is not None
        assert 0.5 < check.rounding.typical < 2
    text = io.StringIO()
    Console(file=text, width=100).print(report.table())
    assert "float32 rounds more than that here" in text.getvalue()


@pytest.mark.parametrize("by", [3e-5, 1e-4])
def test_more_than_rounding_is_a_fault_even_below_the_ceiling(
    by: float, exports: dict[str, Export], tmp_path: Path
) -> None:
    export = exports["dense"]
    model = export.proto()
    edit(model, "head.classifier.bias", lambda bias: bias + np.float32(by) * np.array([1, -1, 1], np.float32))
    onnx.save(model, tmp_path / "off.onnx")
    cases = generated_cases(export.config.graph)
    report = measure(export.model, tmp_path / "off.onnx", export.config, cases)
    wrong = [check for check in report.values if not check.passed]
    assert [check.output for check in wrong] == ["logits"]
    assert wrong[0].error <= 1e-4  # the ceiling alone would let it through
    assert wrong[0].rounding is not None
    assert wrong[0].rounding.typical > 2
