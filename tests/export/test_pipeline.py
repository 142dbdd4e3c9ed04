"""From a run to a bundle: what is in it, that the device side reproduces it, and that failure writes nothing."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from export import export_bundle
from export.gate.reference import eager_outputs
from export.graph.files import save
from mope_deploy import load
from mope_deploy.bundle import Bundle
from mope_deploy.data import open_samples
from mope_deploy.errors import ExportError, ParityError, UsageError
from mope_deploy.model import MoPE
from tests.export.conftest import Export, make_model
from tests.tiny import LABELS


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_holds_everything_a_device_needs(bundle: Path, run: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    assert set(contents(bundle)) == {*manifest.files, "manifest.json"}
    assert {"model.onnx", "model.onnx.data", "model.fused.onnx", "tokenizer.json", "parity.json"} <= set(manifest.files)
    assert manifest.name == run.name
    assert manifest.task.labels == LABELS
    assert (manifest.main, manifest.complementary) == ("image", ("text",))
    assert [(graph.name, graph.runs_on) for graph in manifest.graphs] == [
        ("model", "any"),
        ("model-fused", "onnxruntime"),
    ]
    assert all(graph.data == ("model.onnx.data",) for graph in manifest.graphs)
    assert manifest.graphs[0].opset == 18
    assert manifest.graphs[0].ir_version <= 10
    assert manifest.routing is not None
    assert (manifest.routing.layers, manifest.routing.experts, manifest.routing.top_k) == (2, 5, None)
    assert {"mope-deploy", "torch", "onnxruntime"} <= set(manifest.versions)


def test_states_what_the_gate_measured(bundle: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    report = json.loads((bundle / "parity.json").read_text())
    assert set(report) == {"model", "model-fused"}
    assert report["model"]["sha256"] == manifest.files["model.onnx"].sha256
    assert all(graph["passed"] for graph in report.values())
    figures = manifest.parity.figures
    assert figures["passed"] is True
    assert figures["labels_compared"] == figures["labels_equal"] >= 86
    assert figures["experts_compared"] >= 172
    errors = [check["error"] for check in report["model"]["values"] if check["output"] == "logits"]
    assert figures["logits_max_relative_error"] == max(errors) <= 1e-4
    assert {check["source"] for check in report["model"]["values"]} == {"generated", "samples"}
    assert report["model"]["values"][1]["values"] >= 128


@pytest.mark.parametrize("graph", ["model", "model-fused"])
def test_the_device_side_gives_the_models_predictions(graph: str, bundle: Path, run: Path, data: Path) -> None:
    predictor = load(bundle, graph=graph)
    assert predictor.verify().samples == 8
    model = MoPE.from_pretrained(run / "best")
    samples = list(open_samples(data))[:20]
    found = [prediction for _, prediction in predictor.predict_batches(samples, batch_size=7, routing=True)]
    batch = model.preprocessing.collate([sample.load(model.preprocessing) for sample in samples])
    expected = eager_outputs(model, batch)
    assert [LABELS.index(prediction.label) for prediction in found] == expected["logits"].argmax(-1).tolist()
    routing = np.stack([prediction.routing for prediction in found])
    np.testing.assert_allclose(routing, expected["routing"], atol=1e-4)


def test_a_model_in_memory_is_exported_and_left_as_it_is(
    vit: Path, bert: Path, data: Path, tmp_path: Path, use_graph: Callable[[Export], None], exports: dict[str, Export]
) -> None:
    use_graph(exports["top2"])
    model = make_model("top2", vit, bert).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path = export_bundle(model, tmp_path / "deep" / "down" / "mine", data=data, name="my model", samples=50)
    assert path == tmp_path / "deep" / "down" / "mine"
    assert Bundle.open(path).manifest.name == "my model"
    assert Bundle.open(path).manifest.routing.top_k == 2
    assert load(path).verify().samples == 8
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_model_in_memory_needs_data(exports: dict[str, Export], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="without data"):
        export_bundle(exports["dense"].model, tmp_path / "b")


def test_multi_label_and_unrouted(
    data: Path, tmp_path: Path, use_graph: Callable[[Export], None], exports: dict[str, Export]
) -> None:
    use_graph(exports["unrouted"])
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    several = data.parent / "several.jsonl"
    several.write_text("".join(json.dumps(row | {"label": ["a", "c"][: i % 3]}) + "\n" for i, row in enumerate(rows)))
    path = export_bundle(exports["unrouted"].model, tmp_path / "several", data=several)
    manifest = Bundle.open(path).manifest
    assert (manifest.task.type, manifest.task.threshold, manifest.routing) == ("multi-label", 0.5, None)
    assert load(path).verify().routing_error is None


def test_without_the_routing_output_experts_are_still_compared(
    data: Path, tmp_path: Path, use_graph: Callable[[Export], None], exports: dict[str, Export]
) -> None:
    use_graph(exports["top1"])
    path = export_bundle(exports["top1"].model, tmp_path / "quiet", data=data, routing=False)
    bundle = Bundle.open(path)
    assert [tensor.name for tensor in bundle.manifest.graphs[0].outputs] == ["logits"]
    assert bundle.manifest.routing is None
    report = json.loads((path / "parity.json").read_text())
    assert set(report) == {"model-with-routing", "model"}
    assert bundle.manifest.parity.figures["experts_compared"] >= 150
    assert "model-with-routing.onnx" not in bundle.manifest.files
    assert (path / "model.onnx").stat().st_size < exports["top1"].file.stat().st_size
    assert load(path).verify().samples == 8


def test_weights_beyond_the_limit_lie_beside_the_graph_and_are_listed(
    data: Path,
    tmp_path: Path,
    use_graph: Callable[[Export], None],
    exports: dict[str, Export],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_graph(exports["dense"])
    monkeypatch.setattr("export.variants.save", functools.partial(save, embed_limit=50_000))
    path = export_bundle(exports["dense"].model, tmp_path / "large", data=data, routing=False)
    manifest = Bundle.open(path).manifest
    assert manifest.graphs[0].data == ("model.onnx.data",)
    assert manifest.files["model.onnx.data"].bytes > 50_000
    assert not any("with-routing" in name for name in manifest.files)
    assert load(path).verify().samples == 8


def test_golden_tolerances_leave_room_for_what_was_measured(bundle: Path) -> None:
    graphs = Bundle.open(bundle).manifest.graphs
    report = json.loads((bundle / "parity.json").read_text())
    for name in ("logits", "routing"):
        allowed = min(getattr(graph.tolerance, name) for graph in graphs)
        errors = [c["error"] for graph in report.values() for c in graph["values"] if c["output"] == name]
        assert 10 * max(errors) <= allowed <= 1e-3


def test_if_the_gate_fails_nothing_is_written(
    data: Path, tmp_path: Path, use_graph: Callable[[Export], None], exports: dict[str, Export], bundle: Path
) -> None:
    use_graph(exports["dense"])
    other = tiny_model_like(exports["dense"])
    with pytest.raises(ParityError, match="does not compute what the model computes"):
        export_bundle(other, tmp_path / "b", data=data)
    assert list(tmp_path.iterdir()) == []
    before = contents(bundle)
    with pytest.raises(ParityError):
        export_bundle(other, bundle, data=data, overwrite=True)
    assert contents(bundle) == before
    assert [path.name for path in bundle.parent.iterdir()] == [bundle.name]


def test_a_target_is_refused_before_any_work(
    data: Path, tmp_path: Path, exports: dict[str, Export], bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.variants.trace", lambda *_, **__: pytest.fail("work began"))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    model = exports["dense"].model
    with pytest.raises(UsageError, match="is not a bundle, so it is not replaced"):
        export_bundle(model, tmp_path / "notes", data=data, overwrite=True)
    with pytest.raises(UsageError, match="exists; choose another name"):
        export_bundle(model, bundle, data=data)
    with pytest.raises(UsageError, match="received 16; expected 17 to 20"):
        export_bundle(model, tmp_path / "b", data=data, opset=16)
    with pytest.raises(UsageError, match="samples"):
        export_bundle(model, tmp_path / "b", data=data, samples=0)
    assert (tmp_path / "notes" / "a.txt").read_text() == "mine"


def test_a_small_data_set_is_compared_as_a_whole(
    data: Path, tmp_path: Path, use_graph: Callable[[Export], None], exports: dict[str, Export]
) -> None:
    use_graph(exports["dense"])
    few = data.parent / "few.jsonl"
    few.write_text("".join(data.read_text().splitlines(keepends=True)[:10]))
    export_bundle(exports["dense"].model, tmp_path / "b", data=few)
    report = json.loads((tmp_path / "b" / "parity.json").read_text())["model"]
    counts = {(check["output"], check["source"]): check["values"] for check in report["values"]}
    assert counts["logits", "samples"] == 30
    assert counts["logits", "generated"] >= 128


def test_a_graph_that_fails_the_lint_is_no_bundle(
    data: Path, tmp_path: Path, exports: dict[str, Export], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = exports["dense"].proto()
    model.graph.node[-1].domain = "com.example"
    monkeypatch.setattr("export.variants.trace", lambda *_, **__: ir.from_proto(model))
    with pytest.raises(ExportError, match=r"com\.example\..* is no standard operator"):
        export_bundle(exports["dense"].model, tmp_path / "b", data=data)
    assert not (tmp_path / "b").exists()


def tiny_model_like(export: Export) -> MoPE:
    """The same model with one weight nudged."""
    model = copy.deepcopy(export.model)
    with torch.no_grad():
        model.head.classifier.weight[0, 0] += 1e-3
    return model
