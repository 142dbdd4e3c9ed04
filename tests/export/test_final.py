"""Whatever is done to a file after its gate, the files that are packed are judged, to the byte."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from export.final import judge_final
from export.gate import check_judged, hashes
from export.options import Options
from export.pack.golden import pick_samples
from export.parts import in_parts
from export.pipeline import export_model
from export.precision import lowering
from export.precision.half import HalfLowering
from export.precision.repair import Lowered
from export.variants import Variant, Work, make_variants
from mope_deploy.errors import ExportError, ParityError
from tests.export.conftest import Export
from tests.export.gate.faults import edit

LOOSE = {"labels": 0.8, "routing": 0.8, "metric": 0.2}  # random weights decide by narrow margins
HEAD = "head.classifier.bias"
CASES = {
    "whole": ("model", "model-fused", "model-fp16", "model-bf16", "model-int8", "model-int8-dynamic"),
    "split": ("model", "model-fused", "model-fp16", "model-int8", "model-int8-dynamic"),
    "hidden": ("model", "model-bf16", "model-int8", "model-int8-dynamic"),
    "hidden split": ("model-int8",),
}
EACH = [(how, name) for how, names in CASES.items() for name in names]

Made = Callable[[str], tuple[Work, dict[str, Variant]]]


@pytest.fixture(scope="module")
def made(exports: dict[str, Export], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Every variant of the dense model, each way, made once."""
    known: dict[str, tuple[Work, dict[str, Variant]]] = {}

    def make(how: str) -> tuple[Work, dict[str, Variant]]:
        if "split" in how and how not in known:
            work, whole = make("hidden" if "hidden" in how else "whole")
            known[how] = (
                work,
                _by_name(in_parts(work, [variant for name, variant in whole.items() if name in CASES[how]])),
            )
        if how not in known:
            work = _work(exports["dense"], data, tmp_path_factory.mktemp("work"), how)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("export.variants.trace", lambda *_, **__: ir.load(exports["dense"].file))
                known[how] = work, _by_name(make_variants(work))
        return known[how]

    return make


def _by_name(variants: list[Variant]) -> dict[str, Variant]:
    return {variant.name: variant for variant in variants}


def _work(export: Export, data: Path, folder: Path, how: str) -> Work:
    lower = {name.removeprefix("model-"): None for name in CASES[how] if name not in ("model", "model-fused")}
    options = Options(
        precisions=("fp32", *lower),
        fuse="model-fused" in CASES[how],
        routing="hidden" not in how,
        gate_samples=20,
        calibration_samples=24,
        thresholds=LOOSE,
    )
    return Work(
        model=export.model,
        options=options,
        folder=folder,
        samples=pick_samples(data, export.model, 20),
        data=data,
        calibration=data,
        on_step=lambda _: None,
        on_report=lambda _: None,
    )


@contextlib.contextmanager
def faulty(file: Path, fault: Callable[[onnx.ModelProto], None]) -> Iterator[None]:
    """The file with a fault, put back afterwards; weights beside it stay as they are."""
    before = file.read_bytes()
    graph = onnx.load(file, load_external_data=False)
    fault(graph)
    try:
        onnx.save(graph, file)
        yield
    finally:
        file.write_bytes(before)


def negated(graph: onnx.ModelProto) -> None:
    """Every logit."""
    (node,) = [node for node in graph.graph.node if "logits" in node.output]
    node.output[list(node.output).index("logits")] = "logits.before"
    graph.graph.node.append(onnx.helper.make_node("Neg", ["logits.before"], ["logits"], name="head/Neg"))


@pytest.mark.parametrize(("how", "name"), EACH)
def test_a_sound_file_passes_and_a_negated_head_does_not(how: str, name: str, made: Made) -> None:
    work, variants = made(how)
    variant = variants[name]
    assert variant.final is None
    judged = judge_final(work, variant)
    assert judged.final is not None
    assert set(judged.final.sha256) == {path.name for path in variant.all_files}
    assert all(report.passed and report.logits.maximum == 0 for report in judged.final.reports if report.mark != "CPU")
    check_judged(judged.final, variant.all_files)
    with faulty(variant.files[0], negated):
        with pytest.raises(ExportError, match="is not the file that was judged"):
            check_judged(judged.final, variant.all_files)
        with pytest.raises(ParityError, match=r"not the file that was judged|does not compute what the model computes"):
            judge_final(work, variant)
    assert judge_final(work, variant).final == judged.final


def smallest_step(graph: onnx.ModelProto) -> None:
    edit(graph, HEAD, lambda bias: np.nextafter(bias, np.inf, dtype=bias.dtype))


def huge_expert(graph: onnx.ModelProto) -> None:
    """What few samples show where experts are selected."""
    edit(graph, "layers.1.dynamic.table", lambda table: np.where(np.arange(len(table))[:, None] == 2, 1000, table))


def another_weight(graph: onnx.ModelProto) -> None:
    """A whole number of any type, of the product of an encoder."""
    (tensor,) = [t for t in graph.graph.initializer if "blocks.0.attn.k_proj.weight" in t.name and len(t.dims) == 2]
    array = numpy_helper.to_array(tensor).copy()
    array[3, 1] += array.dtype.type(1)
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def another_operator(graph: onnx.ModelProto) -> None:
    node = next(node for node in graph.graph.node if node.op_type == "Erf")
    node.op_type = "Tanh"


@pytest.mark.parametrize("fault", [smallest_step, another_weight, another_operator])
@pytest.mark.parametrize(
    ("how", "name"),
    [("whole", "model-fp16"), ("whole", "model-bf16"), ("hidden", "model-int8"), ("split", "model-int8-dynamic")],
)
def test_every_weight_and_operator_counts(how: str, name: str, fault: Callable[..., None], made: Made) -> None:
    work, variants = made(how)
    variant = variants[name]
    with faulty(variant.files[0], fault), pytest.raises(ParityError, match="is not the file that was judged"):
        judge_final(work, variant)


def test_so_does_an_expert_that_no_sample_selects(exports: dict[str, Export], data: Path, tmp_path: Path) -> None:
    export = exports["top1"]
    low = lowering(export.file, "int8-dynamic")
    (reference,), (file,) = low.write(tmp_path / "judged.onnx"), low.write(tmp_path / "model.onnx")
    done = Lowered((reference,), (), None, (), hashes([reference]), {})  # type: ignore[arg-type]
    name, work = "int8-dynamic", _work(export, data, tmp_path, "whole")
    variant = Variant(f"model-{name}", name, "onnxruntime", (file,), file, None, done, reference=reference)
    with (
        faulty(file, huge_expert),
        pytest.raises(ParityError, match=r"other weights or nodes, layers\.1\.dynamic\.table"),
    ):
        judge_final(work, variant)


def test_a_part_is_judged_as_the_main_file_is(made: Made) -> None:
    work, variants = made("split")
    for name in ("model-fp16", "model-int8"):
        with (
            faulty(variants[name].part_files[0], another_operator),
            pytest.raises(ParityError, match="is not the file that was judged"),
        ):
            judge_final(work, variants[name])


def test_no_other_file_is_packed(
    exports: dict[str, Export],
    data: Path,
    tmp_path: Path,
    use_graph: Callable[[Export], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither one that a writer spoils after its copy was judged, nor one that changes after the last judgement."""
    use_graph(exports["dense"])

    def export(precision: str) -> None:
        options = Options(precisions=(precision,), gate_samples=16, thresholds=LOOSE)
        export_model(exports["dense"].model, tmp_path / "bundle", data=data, calibration=data, options=options)

    def judge_and_spoil(work: Work, variant: Variant) -> Variant:
        judged = judge_final(work, variant)
        graph = onnx.load(variant.files[0])
        graph.doc_string = "other bytes"
        onnx.save(graph, variant.files[0])
        return judged

    monkeypatch.setattr("export.pipeline.judge_final", judge_and_spoil)
    with pytest.raises(ExportError, match=r"model.onnx is not the file that was judged"):
        export("fp32")
    monkeypatch.setattr("export.pipeline.judge_final", judge_final)
    sound = HalfLowering.write

    def spoiled(self: HalfLowering, path: Path, **choice: object) -> list[Path]:
        files = sound(self, path, **choice)  # type: ignore[arg-type]
        graph = onnx.load(path)
        negated(graph)
        onnx.save(graph, path)
        return files

    monkeypatch.setattr(HalfLowering, "write", spoiled)
    with pytest.raises(ParityError, match=r"model.fp16.onnx is not the file that was judged"):
        export("fp16")
    assert list(tmp_path.iterdir()) == []
