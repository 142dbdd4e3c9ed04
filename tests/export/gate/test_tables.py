"""Every expert is compared, selected or not: in every form, precision and routing, and with every fault planted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import ModelProto, helper, numpy_helper
from torch import Tensor, nn

from export.gate import Evaluation, measure_precision
from export.gate.cases import Case, generated_cases
from export.gate.parity import measure
from export.gate.reference import eager_outputs
from export.gate.tables import compare_tables
from export.graph.files import check_file, save
from export.graph.naming import name_after_modules
from export.graph.split import part_inputs, split
from export.graph.static import StaticLayer
from export.graph.to_onnx import to_older
from export.limits import OPSETS
from export.precision import lowering
from mope_deploy.data import open_samples
from mope_deploy.model.backbones.prefix import Projection
from mope_deploy.model.experts import PromptExperts
from mope_deploy.model.prompts import LayerPrompts
from mope_deploy.model.quiet import quiet
from mope_deploy.model.router import Router, routing_embeddings
from tests.export.conftest import Export
from tests.export.gate.faults import edit
from tests.export.gate.table import ANYTHING, shown
from tests.shared import once, shared_folder

K, L, D, INNER = 16, 2, 12, 8
# (fold, top_k, whether the layer has a norm)
LAYERS = (("gram", 0, True), ("mixed", 0, True), ("none", 0, True), ("tables", 0, False), ("tables", 1, True))
LAYERS += (("gram", 2, True), ("mixed", 2, True), ("none", 2, True), ("tables", 2, False))
TABLES = [
    (i, name)
    for i, (fold, k, _) in enumerate(LAYERS)
    for name in ("table", {"gram": "gram", "mixed": "centred"}.get(fold, ""))
    if name
]


def filled(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def one_layer(i: int, top_k: int, norm: bool) -> tuple[LayerPrompts, Projection]:
    options = {"temperature": 0.5, "sigma": 0.0, "cosine": False, "train_embeddings": False}
    U = routing_embeddings(experts=K, width=3, seed=0, layer=i)
    with torch.random.fork_rng(devices=[]):  # the graph may be another worker's
        torch.manual_seed(i)
        router = Router(width_x=D, widths_y={}, embeddings=U, d_x=3, d_y=0, top_k=top_k, **options)
    experts = PromptExperts(experts=K, prompt_length=L, width=D)
    normed = nn.LayerNorm(D, eps=1e-3) if norm else None
    with torch.no_grad():
        experts.prompts.copy_(filled(K, L, D, seed=i) + 0.5)
        if normed is not None:
            normed.weight.copy_(filled(D, seed=20 + i))
            normed.bias.copy_(filled(D, seed=40 + i))
    projection = Projection(normed, filled(2 * INNER, D, seed=60 + i), filled(2 * INNER, seed=80 + i), 3 * INNER)
    return LayerPrompts(static=None, experts=experts, router=router, mappers={}, dropout=0.0), projection


class Routed(nn.Module):
    """The prompts of all layers and nothing else."""

    def __init__(self, made: list[tuple[LayerPrompts, Projection]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            StaticLayer(layer, None if fold == "none" else projection, fold)
            for (layer, projection), (fold, _, _) in zip(made, LAYERS, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for layer in self.layers:
            tokens, kv, weights = layer(x, {}, [])
            found += [weights] if kv is None else [weights, *kv.keys, *kv.values]
            found += [] if tokens is None else [tokens]
        return torch.cat([torch.tanh(each).flatten(1) for each in found], dim=1)


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> tuple[SimpleNamespace, Path]:
    """A model of layers in every form, as far as the comparison asks, and the graph of its prompts."""
    made = [one_layer(i, top_k, norm) for i, (_, top_k, norm) in enumerate(LAYERS)]
    main = SimpleNamespace(has_prefix_form=True, projection=lambda i: made[i][1])

    def write(path: Path) -> None:
        module = Routed(made).eval()
        with quiet(), torch.no_grad():
            shapes = {"x": {0: torch.export.Dim("batch")}}
            options = {"dynamo": True, "dynamic_shapes": shapes, "opset_version": 18, "verbose": False}
            program = torch.onnx.export(module, kwargs={"x": filled(3, D, seed=7)}, input_names=["x"], **options)
        assert program is not None
        name_after_modules(program.model, module)
        program.model.ir_version = 10
        save(program.model, path)

    file = once(shared_folder(tmp_path_factory, "graphs") / "forms.onnx", write)
    return SimpleNamespace(layers=[layer for layer, _ in made], main=main), file


def test_every_form_is_compared_by_forced_routing(forms: tuple[SimpleNamespace, Path]) -> None:
    model, file = forms
    found = compare_tables(model, file)  # type: ignore[arg-type]
    assert [check.what for check in found[:2]] == ["experts of layer 0", "router of layer 0"]
    assert all(check.passed and check.experts == K for check in found), list(map(str, found))
    assert {check.how for check in found[::2]} == {"forced routing"}


@pytest.mark.parametrize("how", ["one at 1000", "one off by a thousandth", "two swapped", "NaN"])
def test_one_wrong_expert_in_any_table_is_found(how: str, forms: tuple[SimpleNamespace, Path], tmp_path: Path) -> None:
    """In every layer at once: each by itself has to be refused."""
    model, file = forms
    proto = onnx.load(file)
    for i, name in TABLES:

        def change(array: np.ndarray, k: int = (3 * i + 1) % K) -> np.ndarray:
            if how == "two swapped":
                array[[k, k - 1]] = array[[k - 1, k]]
            else:
                array[k] = {"one at 1000": 1000, "NaN": np.nan}.get(how, array[k] * 1.001 + 1e-3)
            return array

        edit(proto, f"layers.{i}.dynamic.{name}", change)
    onnx.save(proto, tmp_path / "bad.onnx")
    found = compare_tables(model, tmp_path / "bad.onnx")  # type: ignore[arg-type]
    assert [check.passed for check in found] == [False, True] * len(LAYERS)


def test_experts_that_do_not_run_have_not_passed(forms: tuple[SimpleNamespace, Path], tmp_path: Path) -> None:
    model, file = forms
    proto = onnx.load(file)
    edit(proto, "layers.0.dynamic.table", lambda table: table[:-1])
    onnx.save(proto, tmp_path / "bad.onnx")
    first, *others = compare_tables(model, tmp_path / "bad.onnx")  # type: ignore[arg-type]
    assert (first.passed, first.error, first.experts) == (False, np.inf, 0)
    assert "they do not run" in str(first)
    assert all(check.passed for check in others)


def test_a_second_expert_that_is_always_the_wrong_one_is_found(
    forms: tuple[SimpleNamespace, Path], tmp_path: Path
) -> None:
    model, file = forms
    proto = onnx.load(file)
    proto.graph.initializer.append(numpy_helper.from_array(np.array([0, 0]), "twice"))
    for node in list(proto.graph.node):
        if node.op_type == "TopK" and int(node.name[len("layers.")]) >= 5:
            right = node.output[1]
            node.output[1] = f"{right}.right"
            again = helper.make_node("Gather", [f"{right}.right", "twice"], [right], axis=1, name=f"{node.name}_again")
            proto.graph.node.insert(list(proto.graph.node).index(node) + 1, again)
    onnx.save(proto, tmp_path / "bad.onnx")
    passed = [check.passed for check in compare_tables(model, tmp_path / "bad.onnx")]  # type: ignore[arg-type]
    assert passed == [True] * 10 + [False, True] * 4


@pytest.mark.parametrize("opset", OPSETS)
def test_every_form_is_valid_at_every_opset(opset: int, forms: tuple[SimpleNamespace, Path], tmp_path: Path) -> None:
    model, file = forms
    graph = ir.load(file)
    to_older(graph, opset)
    assert graph.opset_imports[""] == opset
    ir.save(graph, tmp_path / "model.onnx")
    check_file(tmp_path / "model.onnx")
    assert all(check.passed for check in compare_tables(model, tmp_path / "model.onnx"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "op", ["ReduceL1", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum"]
)
def test_reductions_are_valid_at_the_oldest_opset(op: str, tmp_path: Path) -> None:
    """The converter left an attribute standing that they have from 18 on."""
    node = helper.make_node(op, ["x", "axes"], ["y"], keepdims=0, noop_with_empty_axes=0)
    shapes = [helper.make_tensor_value_info(name, 1, axes) for name, axes in (("x", ["batch", 3]), ("y", ["batch"]))]
    graph = helper.make_graph([node], "g", shapes[:1], shapes[1:], [numpy_helper.from_array(np.array([1]), "axes")])
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10))
    to_older(model, OPSETS.start)
    ir.save(model, tmp_path / "model.onnx")
    check_file(tmp_path / "model.onnx")


def without(export: Export, layer: int, expert: int) -> list[Case]:
    """The generated cases without the rows that select an expert."""
    kept = []
    for case in generated_cases(export.config.graph):
        rows = eager_outputs(export.model, case.inputs)["routing"][:, layer, expert] == 0
        if rows.any():
            kept.append(Case(case.name, case.source, {name: array[rows] for name, array in case.inputs.items()}))
    return kept


def test_an_expert_that_no_compared_sample_selects_is_compared(exports: dict[str, Export], tmp_path: Path) -> None:
    """Of whole files, of those of lower precision and of those in parts."""
    export = exports["top1"]
    cases = [case for _ in range(3) for case in without(export, 1, 2)]
    good = measure(export.model, export.file, export.config, cases)
    assert good.passed, good.problems()
    assert good.selected < good.experts == 10

    def at_1000(array: np.ndarray) -> np.ndarray:
        array[2] = 1000
        return array

    def planted(file: Path) -> Path:
        proto = onnx.load(file)
        edit(proto, "layers.1.dynamic.table", at_1000)
        onnx.save(proto, tmp_path / "bad.onnx")
        return tmp_path / "bad.onnx"

    report = measure(export.model, planted(export.file), export.config, cases)
    assert len(report.problems()) == 1
    assert "the experts of layer 1 differ" in report.problems()[0]
    assert "expert 2" in report.problems()[0]
    for precision in ("fp16", "bf16", "int8-dynamic"):
        lowering(export.file, precision).write(tmp_path / f"{precision}.onnx")
        assert all(check.passed for check in compare_tables(export.model, tmp_path / f"{precision}.onnx"))
        found = compare_tables(export.model, planted(tmp_path / f"{precision}.onnx"))
        assert [check.what for check in found if not check.passed] == ["experts of layer 1"]
    probes = [case.inputs for case in generated_cases(export.config.graph)[:3]]
    cut = split(export.file, tmp_path / "split", part_inputs(export.model), probes)
    assert all(check.passed for check in compare_tables(export.model, cut.main[0], cut.part_files))
    holder = next(path for path in (cut.main[0], *cut.part_files) if b"layers.1.dynamic.table" in path.read_bytes())
    planted(holder).replace(holder)
    found = compare_tables(export.model, cut.main[0], cut.part_files)
    assert [(check.what, check.how) for check in found if not check.passed] == [("experts of layer 1", "as stored")]


def test_the_gate_of_lower_precisions_compares_them_too(exports: dict[str, Export], data: Path, tmp_path: Path) -> None:
    export = exports["top1"]
    lowering(export.file, "int8-dynamic").write(tmp_path / "model.onnx")
    proto = onnx.load(tmp_path / "model.onnx")
    edit(proto, "layers.1.dynamic.table", lambda table: np.where(np.arange(len(table))[:, None] == 2, 1000, table))
    onnx.save(proto, tmp_path / "bad.onnx")
    evaluation = Evaluation(export.model, list(open_samples(data))[:16])
    for name, wrong in (("model", []), ("bad", ["experts of layer 1"])):
        report = measure_precision(
            evaluation, tmp_path / f"{name}.onnx", export.config, precision="int8-dynamic", thresholds=ANYTHING
        )
        assert [check.what for check in report.tables if not check.passed] == wrong
        assert len(report.tables) == 4
        assert report.passed == (not wrong)
        assert json.loads(json.dumps(report.to_dict()))["tables"][2]["passed"] == (not wrong)
        assert "every expert and router" in shown(report)


ROUTERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "scaled": lambda keys: keys * np.float32(1.5),
    "another embedding": lambda keys: np.where(np.arange(keys.size).reshape(keys.shape) == 1, keys + 1, keys),
}


@pytest.mark.parametrize("how", ROUTERS)
def test_under_top_1_routing_the_scores_are_compared(how: str, exports: dict[str, Export], tmp_path: Path) -> None:
    """Scaled scores choose the same experts: no output shows anything."""
    export = exports["top1"]
    proto: ModelProto = export.proto()
    for tensor in proto.graph.initializer:
        if tensor.name.startswith("layers.0.router.keys"):
            edit(proto, tensor.name, ROUTERS[how])
    onnx.save(proto, tmp_path / "bad.onnx")
    report = measure(export.model, tmp_path / "bad.onnx", export.config, generated_cases(export.config.graph))
    assert not report.passed
    assert any("scores on generated differ" in problem for problem in report.problems()), report.problems()
    assert any("the router of layer 0 differ" in problem for problem in report.problems())
