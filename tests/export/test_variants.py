"""Several precisions in one bundle, with engines: everything is judged, listed and runnable."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from rich.console import Console

from export.gate import THRESHOLDS, PrecisionReport
from export.options import Options
from export.pack.engines import EngineOptions
from export.pack.summary import Row, summary_table
from export.pipeline import export_model
from export.recheck import check_bundle
from export.variants import Work
from mope_deploy import load
from mope_deploy.bundle import Bundle
from mope_deploy.engines import built_engines
from mope_deploy.engines.tensorrt.sidecar import Sidecar
from mope_deploy.errors import ExportError, ParityError, UsageError
from tests.export.conftest import Export

LOOSE = {"labels": 0.8, "routing": 0.8, "metric": 0.2}  # random weights, unlike trained ones, decide by narrow margins
ALL = ("fp32", "fp16", "bf16", "int8", "int8-dynamic")


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return []


@pytest.fixture(scope="module")
def many(exports: dict[str, Export], data: Path, tmp_path_factory: pytest.TempPathFactory, rows: list[Row]) -> Bundle:
    """The dense model in every precision, with engines."""
    with pytest.MonkeyPatch.context() as patch:
        import onnx_ir as ir

        patch.setattr("export.variants.trace", lambda *_, **__: ir.load(exports["dense"].file))
        exported = export_model(
            exports["dense"].model,
            tmp_path_factory.mktemp("variants") / "bundle",
            data=data,
            calibration=data,
            options=Options(precisions=ALL, gate_samples=40, calibration_samples=24, thresholds=LOOSE, batch="1:2:8"),
            engines=EngineOptions(backend="tensorrt_rtx", compute="8.6"),
        )
    rows += exported.rows
    return exported.bundle


def test_one_graph_a_precision_with_one_set_of_golden_samples(many: Bundle) -> None:
    graphs = {graph.precision: graph for graph in many.manifest.graphs}
    assert list(graphs) == list(ALL)  # in the order they were asked for; the first runs by default
    assert [graph.name for graph in graphs.values()] == ["model", *(f"model-{precision}" for precision in ALL[1:])]
    assert {precision: graph.runs_on for precision, graph in graphs.items()} == dict.fromkeys(ALL, "any") | {
        "bf16": "tensorrt",
        "int8-dynamic": "onnxruntime",
    }
    assert graphs["fp32"].gate is None
    for precision in ALL[1:]:
        gate = graphs[precision].gate
        assert gate is not None
        assert gate.samples == 40
        assert gate.figures["labels_agreement"] >= gate.thresholds["labels"]
        assert gate.mark == ("emulated" if precision in ("fp16", "bf16") else "")
    report = json.loads(many.file("parity.json").read_text())
    assert set(report) == {graph.name for graph in graphs.values()}
    for precision in ALL[1:]:
        gate = graphs[precision].gate
        assert gate is not None
        assert report[f"model-{precision}"]["kept"] == list(gate.kept)
        file = graphs[precision].file
        assert report[f"model-{precision}"]["final"]["sha256"] == {file: many.manifest.files[file].sha256}
    assert sum(name.endswith("outputs.npz") for name in many.manifest.files) == 1


def test_every_graph_that_runs_here_gives_the_golden_samples_and_no_two_the_same(many: Bundle) -> None:
    logits = {}
    inputs, _ = many.golden()
    for graph in many.manifest.graphs:
        if not graph.takes("onnxruntime"):
            continue
        predictor = load(many.path, engine="onnxruntime", graph=graph.name)
        predictor.verify()
        feeds = {spec.name: inputs[spec.name] for spec in graph.inputs}
        logits[graph.precision] = predictor.session.run(feeds, ["logits"])["logits"]
    assert set(logits) == {"fp32", "fp16", "int8", "int8-dynamic"}
    for precision in ("fp16", "int8", "int8-dynamic"):
        assert np.abs(logits[precision] - logits["fp32"]).max() > 0


@pytest.mark.parametrize("graph", ["model-int8", "model-int8-dynamic"])
def test_a_quantised_result_does_not_depend_on_batch_mates(many: Bundle, graph: str) -> None:
    session = load(many.path, engine="onnxruntime", graph=graph).session
    inputs, _ = many.golden()
    together = session.run({spec.name: inputs[spec.name] for spec in session.inputs})
    real = inputs["attention_mask"].sum(axis=1)
    assert len(set(real.tolist())) > 1  # some are padded
    for row, length in enumerate(real.tolist()):
        feeds = {spec.name: inputs[spec.name][row : row + 1] for spec in session.inputs}
        feeds |= {name: feeds[name][:, :length] for name in ("input_ids", "attention_mask")}
        for name, array in session.run(feeds).items():
            np.testing.assert_allclose(array, together[name][row : row + 1], rtol=1e-4, atol=1e-5)


def test_engines_are_listed_and_unproved(many: Bundle) -> None:
    built = [graph for graph in many.manifest.graphs if graph.takes("tensorrt_rtx")]
    assert [graph.precision for graph in built] == ["fp32", "fp16", "bf16", "int8"]
    for graph in built:
        ((library, files),) = built_engines(many, graph.name)
        assert library == "tensorrt_rtx"
        assert files.engine.relative_to(many.path).as_posix() in many.manifest.files
        sidecar = Sidecar.read(files.sidecar)
        assert str(sidecar.profile["batch"]) == "1:2:8"
        assert sidecar.precision.declared == graph.precision
        assert sidecar.onnx == {graph.file: many.manifest.files[graph.file].sha256}
        assert json.loads(files.sidecar.read_text())["verified"] is False
        assert not files.proof.exists()


def test_the_table(many: Bundle, rows: list[Row]) -> None:
    with io.StringIO() as file:
        Console(width=80, file=file).print(summary_table(rows))
        shown = file.getvalue()
    assert len(rows) == 9
    assert "…" not in shown  # nothing is cut in a terminal of 80 columns
    assert shown.count("tensorrt_rtx") == 4
    assert "built, not run here" in shown
    for row in rows:
        graph = many.graph(row.graph, engine="tensorrt" if row.precision == "bf16" else "onnxruntime")
        if row.format == "onnx":
            assert row.bytes == many.manifest.files[graph.file].bytes
            assert (row.seconds is None) == (row.precision == "bf16")
        else:
            assert row.seconds is None
            assert row.judged is None


def test_the_gates_can_be_repeated_on_the_bundle(many: Bundle, exports: dict[str, Export], data: Path) -> None:
    reports = check_bundle(exports["dense"].model, many, data=data, gate_samples=20)
    assert set(reports) == {"model", "model-fp16", "model-bf16", "model-int8", "model-int8-dynamic"}
    for name, report in reports.items():
        assert isinstance(report, PrecisionReport) == (name != "model")
        if isinstance(report, PrecisionReport):
            assert report.thresholds.to_dict() == THRESHOLDS[report.precision].to_dict() | LOOSE  # the manifest's
            assert report.mark == {"fp16": "CPU", "bf16": "emulated"}.get(report.precision, "")
        assert report.passed


def test_layers_are_ranked_on_real_samples_where_nothing_is_calibrated(
    exports: dict[str, Export], data: Path, tmp_path: Path
) -> None:
    work = Work(
        model=exports["dense"].model,
        options=Options(precisions=("fp16",), gate_samples=20, calibration_samples=18),
        folder=tmp_path,
        samples=(),
        data=data,
        calibration=data,
        on_step=lambda _: None,
        on_report=lambda _: None,
    )
    assert len(work.rows.judged) == 20
    assert sum(len(feed["input_ids"]) for feed in work.feeds()) == 18


def test_without_the_output_routing_it_is_still_judged_by_routing(
    exports: dict[str, Export], data: Path, tmp_path: Path, use_graph: Callable[[Export], None]
) -> None:
    use_graph(exports["dense"])
    options = Options(
        precisions=("int8", "int8-dynamic"), routing=False, gate_samples=20, calibration_samples=8, thresholds=LOOSE
    )
    bundle = export_model(
        exports["dense"].model, tmp_path / "bundle", data=data, calibration=data, options=options
    ).bundle
    for graph in bundle.manifest.graphs:
        assert [spec.name for spec in graph.outputs] == ["logits"]
        assert graph.gate is not None
        assert graph.gate.figures["experts_compared"] == 20 * 2
        proto = onnx.load(bundle.file(graph.file))
        assert [value.name for value in proto.graph.output] == ["logits"]
        load(bundle.path, graph=graph.name).verify()
    assert "model.onnx" not in bundle.manifest.files  # fp32 was not asked for


def test_a_precision_beyond_repair_leaves_nothing(
    exports: dict[str, Export],
    data: Path,
    tmp_path: Path,
    use_graph: Callable[[Export], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_graph(exports["dense"])
    monkeypatch.setattr(PrecisionReport, "passed", property(lambda self: False))
    with pytest.raises(ParityError, match="does not pass in int8, even with"):
        export_model(
            exports["dense"].model,
            tmp_path / "bundle",
            data=data,
            calibration=data,
            options=Options(precisions=("int8",), gate_samples=20, calibration_samples=8),
        )
    assert list(tmp_path.iterdir()) == []


def test_a_device_refuses_what_it_cannot_take(
    exports: dict[str, Export], data: Path, tmp_path: Path, use_graph: Callable[[Export], None]
) -> None:
    use_graph(exports["dense"])
    options = Options(target="orin-nano", fuse=True)
    with pytest.raises(ExportError, match=r"--target orin-nano .* does not take com\.microsoft"):
        export_model(exports["dense"].model, tmp_path / "bundle", data=data, calibration=data, options=options)
    assert list(tmp_path.iterdir()) == []


def test_what_the_device_is_for_is_written_down(
    exports: dict[str, Export], data: Path, tmp_path: Path, use_graph: Callable[[Export], None]
) -> None:
    use_graph(exports["dense"])
    options = Options(target="orin-nano", text_length="1:4:8")
    model = exports["dense"].model
    bundle = export_model(model, tmp_path / "bundle", data=data, calibration=data, options=options).bundle
    assert bundle.manifest.build.target == "orin-nano"
    assert bundle.manifest.build.profile == {"batch": (1, 1, 4), "text_length": (1, 4, 8)}
    assert bundle.manifest.build.workspace == 512
    for sizes, words in (
        ({"text_length": "1:4:80"}, "--text-len; received 1:4:80; expected at most 40 tokens"),
        ({"audio_length": "1:4:80"}, "--audio-len; received 1:4:80; expected nothing: this model hears nothing"),
    ):
        with pytest.raises(UsageError, match=words):
            export_model(model, tmp_path / "other", data=data, calibration=data, options=Options(**sizes))
