"""A graph in parts: what goes where, what crosses, and that the files together are the whole graph."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from export.graph.split import SHARED_BYTES, SplitGraph, part_inputs, split
from export.options import Options
from export.pack.triton import write_repository
from export.pipeline import export_bundle, export_model
from export.recheck import check_bundle
from mope_deploy import load
from mope_deploy.bundle import Bundle
from mope_deploy.errors import ExportError, ParityError, UsageError
from tests.export.conftest import Export
from tests.export.runtime import Arrays, feeds, run_named
from tests.export.test_variants import LOOSE
from tests.tiny import tiny_model

TEXT = ("input_ids", "attention_mask")
# The mapped token, and once more for each layer that norms it apart from other prompts; of each layer the router's
# share of y; and where y alone routes (top1), keys and values of its expert and the routing itself.
WIDTHS = {"dense": 32 + 2 * 4, "top2": 2 * 32 + 2 * 4, "top1": 2 * 32 + 2 * (2 * 3 * 32) + 2 * 5, "unrouted": 2 * 32}


PROBES = feeds(1, 5), feeds(3, 9)


@pytest.mark.parametrize("kind", WIDTHS)
def test_the_files_together_are_the_whole_graph(kind: str, exports: dict[str, Export], tmp_path: Path) -> None:
    export = exports[kind]
    cut = split(export.file, tmp_path, part_inputs(export.model), PROBES)
    (part,) = cut.parts
    for batch, length in ((1, 3), (4, 7), (6, 20)):
        given = feeds(batch, length, seed=batch)
        handed = run_named(part.files[0], given)
        assert {name: array.shape for name, array in handed.items()} == {
            "y_text": (batch, part.y_width),
            "conditions_text": (batch, part.width),
        }
        with torch.no_grad():
            expected = export.model.encode_complementary({name: torch.from_numpy(given[name]) for name in TEXT})
        np.testing.assert_allclose(handed["y_text"], expected["text"], atol=1e-5)
        outputs, found = run_named(export.file, given), run_named(cut.main[0], given | handed)
        assert list(found) == list(outputs)
        for name in outputs:
            np.testing.assert_array_equal(found[name], outputs[name])
        if batch > 1:
            handed["conditions_text"] = handed["conditions_text"][::-1].copy()
            other = run_named(cut.main[0], given | handed)
            assert np.abs(other["logits"] - outputs["logits"]).max() > 1e-3
    assert part.width == WIDTHS[kind]


def test_each_file_has_its_own_inputs_and_weights_under_the_names_of_the_whole(
    exports: dict[str, Export], tmp_path: Path
) -> None:
    export = exports["dense"]
    cut = split(export.file, tmp_path, part_inputs(export.model), PROBES)
    files = [cut.main[0], *cut.part_files]
    assert [file.name for file in files] == ["dense.onnx", "dense.text.onnx"]
    main, text = (onnx.load(file) for file in files)
    whole = export.proto()
    for proto in (main, text):
        assert proto.opset_import == whole.opset_import
        assert (proto.ir_version, proto.producer_name) == (whole.ir_version, whole.producer_name)
        assert len({node.name for node in proto.graph.node}) == len(proto.graph.node)
    assert [value.name for value in main.graph.input] == ["pixel_values", "conditions_text"]
    assert [value.name for value in main.graph.output] == ["logits", "routing"]
    assert [value.name for value in text.graph.input] == list(TEXT)
    weights = [{tensor.name: tensor.ByteSize() for tensor in proto.graph.initializer} for proto in (whole, main, text)]
    assert all(weights[1][name] <= SHARED_BYTES for name in weights[1].keys() & weights[2].keys())
    assert not any(name.startswith("complementary.") for name in weights[1])
    assert not any(name.startswith("main.") for name in weights[2])
    assert set(weights[0]) <= {*weights[1], *weights[2]}
    again = split(export.file, tmp_path / "again", part_inputs(export.model), PROBES)
    assert again.main[0].read_bytes() == files[0].read_bytes()


def write_graph(path: Path, *, reach: str) -> Path:
    """A main modality x (B, 80) and a text; one weight serves both, and what of the text reaches x is ``reach``."""
    random = np.random.default_rng(0)
    weights = {"table": random.standard_normal((10, 80)), "both": random.standard_normal((80, 80))}
    text = [
        helper.make_node("Gather", ["table", "input_ids"], ["words"]),
        helper.make_node("ReduceMean", ["words", "axis"], ["y_text"], keepdims=0),
    ]
    if reach == "told":
        text.append(helper.make_node("MatMul", ["y_text", "both"], ["told"]))
    if reach == "numbers":
        text.append(helper.make_node("Cast", ["input_ids"], ["numbers"], to=TensorProto.FLOAT))
    main = [
        helper.make_node("MatMul", ["pixel_values", "both"], ["seen"]),
        helper.make_node("Concat", ["seen", reach], ["logits"], axis=1),
    ]
    inputs = [
        helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch", 80]),
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "text_length"]),
    ]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", None])]
    stored = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()]
    stored.append(numpy_helper.from_array(np.array([1]), "axis"))
    graph = helper.make_graph([*text, *main], "g", inputs, outputs, stored)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def plain_feeds(batch: int, length: int) -> Arrays:
    random = np.random.default_rng(batch)
    return {
        "pixel_values": random.standard_normal((batch, 80)).astype(np.float32),
        "input_ids": random.integers(0, 10, (batch, length)),
    }


def test_a_weight_that_both_sides_need_stays_with_the_main_file(tmp_path: Path) -> None:
    file = write_graph(tmp_path / "g.onnx", reach="told")
    probes = plain_feeds(1, 3), plain_feeds(2, 5)
    cut = split(file, tmp_path / "split", {"text": ("input_ids",)}, probes)
    main, text = (
        {tensor.name for tensor in onnx.load(path).graph.initializer} for path in (cut.main[0], *cut.part_files)
    )
    assert "both" in main - text
    assert "table" in text - main
    assert cut.parts[0].width == 80  # y itself
    given = plain_feeds(4, 6)
    handed = run_named(cut.part_files[0], given)
    np.testing.assert_array_equal(run_named(cut.main[0], given | handed)["logits"], run_named(file, given)["logits"])


@pytest.mark.parametrize(
    ("reach", "message"),
    [("numbers", "'numbers' cannot cross from the part of text"), ("seen", "nothing in the main file depends on text")],
)
def test_what_cannot_be_cut_is_refused(reach: str, message: str, tmp_path: Path) -> None:
    file = write_graph(tmp_path / "g.onnx", reach=reach)
    with pytest.raises(ExportError, match=message):
        split(file, tmp_path / "split", {"text": ("input_ids",)}, (plain_feeds(1, 3), plain_feeds(2, 5)))


def test_a_bundle_of_every_precision_in_parts(
    exports: dict[str, Export], data: Path, tmp_path: Path, use_graph: Callable[[Export], None]
) -> None:
    use_graph(exports["dense"])
    precisions = ("fp32", "fp16", "int8", "int8-dynamic")
    exported = export_model(
        exports["dense"].model,
        tmp_path / "b",
        data=data,
        calibration=data,
        options=Options(
            precisions=precisions, gate_samples=24, calibration_samples=24, thresholds=LOOSE, fuse=True, split=True
        ),
    )
    manifest = exported.bundle.manifest
    assert [graph.name for graph in manifest.graphs] == [
        "model",
        *(f"model-{p}" for p in precisions[1:]),
        "model-fused",
    ]
    for graph in manifest.graphs:
        (part,) = graph.parts
        stem = graph.file.removesuffix(".onnx")
        assert (part.modality, part.file, graph.runs_on) == ("text", f"{stem}.text.onnx", "onnxruntime")
        load(tmp_path / "b", graph=graph.name).verify()
    model, fused = manifest.graphs[0], manifest.graphs[-1]
    assert (fused.data, fused.parts[0].data) == (model.data, model.parts[0].data)
    assert model.data != model.parts[0].data
    assert manifest.parity.figures["split_max_relative_error"] == 0.0
    report = json.loads((tmp_path / "b" / "parity.json").read_text())
    assert all(report[graph.name]["split"]["max_relative_error"] == 0.0 for graph in manifest.graphs)
    assert report["model"]["sha256"] == manifest.files["model.onnx"].sha256
    assert "model.text.onnx" in exported.rows[0].parts
    found = check_bundle(exports["dense"].model, exported.bundle, data=data, samples=20, gate_samples=16)
    assert {name for name, report in found.items() if report.passed} == {graph.name for graph in manifest.graphs}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_files_that_are_not_the_whole_graph_are_no_bundle(
    precision: str,
    exports: dict[str, Export],
    data: Path,
    tmp_path: Path,
    use_graph: Callable[[Export], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def wrong(*arguments: Any, **options: Any) -> SplitGraph:
        cut = split(*arguments, **options)
        proto = onnx.load(cut.part_files[0])
        for tensor in proto.graph.initializer:
            if tensor.name.startswith("mappers.") and tensor.name.endswith("bias"):
                tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + np.float32(3), tensor.name))
        onnx.save(proto, cut.part_files[0])
        return cut

    use_graph(exports["dense"])
    monkeypatch.setattr("export.parts.split", wrong)
    options = {"precisions": (precision,), "gate_samples": 40, "samples": 43}
    with pytest.raises(
        ParityError, match=r"model.*onnx \+ model.*text.onnx|is not the file that was judged: other weights"
    ):
        export_bundle(exports["dense"].model, tmp_path / "b", data=data, split=True, **options)
    assert not (tmp_path / "b").exists()


def test_models_and_options_without_parts_are_refused(
    exports: dict[str, Export], vit: Path, bert: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="--split with bf16"):
        Options(precisions=("fp32", "bf16"), split=True)
    unconditioned = tiny_model(vit, bert, dynamic=False, mapped=False)
    with pytest.raises(UsageError, match="--split has nothing to take out of this model"):
        export_bundle(unconditioned, tmp_path / "b", data=data, split=True)


def test_how_sessions_on_a_cpu_are_set_up_is_in_the_manifest(
    exports: dict[str, Export], data: Path, tmp_path: Path, use_graph: Callable[[Export], None]
) -> None:
    use_graph(exports["unrouted"])
    rows = [json.loads(line) | {"label": ["a"]} for line in data.read_text().splitlines()[:12]]
    labelled = tmp_path / "rows.jsonl"
    labelled.write_text(
        "".join(json.dumps(row | {"image": str(data.parent / row["image"])}) + "\n" for row in rows), encoding="utf-8"
    )
    path = export_bundle(
        exports["unrouted"].model, tmp_path / "b", data=labelled, split=True, cpu_threads=2, cpu_arena=False
    )
    manifest = Bundle.open(path).manifest
    assert (manifest.build.cpu.threads, manifest.build.cpu.arena) == (2, False)
    with pytest.raises(UsageError, match="is in parts, which one model of Triton cannot be"):
        write_repository(Bundle.open(path), tmp_path / "triton")
    assert manifest.parity.figures["folding"] == "constants in 2 of 2 layers"
