"""From a trained model to a verified bundle: rewrite → trace → lint → gate → golden samples → atomic write.

Nothing is written to the target before every graph has passed the gate.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from export.gate import THRESHOLDS, Evaluation, PrecisionReport, Thresholds
from export.gate.cases import rows_needed, sample_cases
from export.gate.parity_report import ParityReport
from export.gate.session import cpu_session, run_graph
from export.graph.exporter_config import MoPEExporterConfig, exporter_config
from export.graph.split import PartFile
from export.graph.static import folding_of
from export.options import CALIBRATION_SAMPLES, DEFAULT_OPSET, GATE_SAMPLES, Options, check_target
from export.pack.engines import EngineOptions, ExportedEngine, check_engine_options, export_engines
from export.pack.golden import INPUTS, OUTPUTS, SAMPLES, Golden, golden_samples, make_golden, pick_samples
from export.pack.summary import Row, summarise
from export.source import find_source
from export.variants import Feeds, ParityGate, Variant, judge_again, make_variants
from mope_deploy.bundle import Bundle, write_bundle
from mope_deploy.data import Sample
from mope_deploy.engines.tensorrt.profiles import Sizes
from mope_deploy.errors import UsageError
from mope_deploy.extras import installed_versions
from mope_deploy.manifest import conditions_name, y_name
from mope_deploy.model import MoPE
from mope_deploy.preprocess import present_name
from mope_deploy.targets import get_target

__all__ = ["Exported", "check_bundle", "check_sizes", "check_split", "export_bundle", "export_model"]

TOKENIZER, REPORT = "tokenizer.json", "parity.json"
GOLDEN_COUNT = 8
# What golden samples may differ by on another machine: at least this much of fp32, and so many times what was measured
# here. Where precision is lower, other engines round in other places, so the room is wider and its multiple smaller.
GOLDEN_TOLERANCE = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2, "int8": 5e-2, "int8-dynamic": 5e-2}
GOLDEN_FACTOR = {"fp32": 10.0, "fp16": 3.0, "bf16": 3.0, "int8": 3.0, "int8-dynamic": 3.0}
_NUMPY = {"tensor(float)": "float32", "tensor(int64)": "int64"}
_VERSIONS = ("mope-deploy", "torch", "timm", "transformers", "onnx", "onnxscript", "onnxruntime", "optimum")


@dataclass(frozen=True)
class Exported:
    """A finished export.

    Attributes:
        bundle: as written and opened again.
        reports: the parity gate's report on each fp32 graph, by the graph's name.
        rows: what can be said of each graph and each engine in one line.
    """

    bundle: Bundle
    reports: dict[str, ParityReport]
    rows: tuple[Row, ...]


def export_bundle(
    model: MoPE | str | Path,
    target: str | Path,
    *,
    data: str | Path | None = None,
    name: str | None = None,
    precisions: Sequence[str] = ("fp32",),
    opset: int = DEFAULT_OPSET,
    fold: str = "auto",
    fuse: bool = False,
    routing: bool = True,
    samples: int | None = None,
    gate_samples: int = GATE_SAMPLES,
    calibration: str | Path | None = None,
    calibration_samples: int = CALIBRATION_SAMPLES,
    overwrite: bool = False,
    seed: int = 0,
    split: bool = False,
    cpu_threads: int | None = None,
    cpu_arena: bool = True,
) -> Path:
    """Export a trained model to a bundle of ONNX graphs, or to nothing: what ``mope-export`` does, from Python.

    Args:
        model: a model, a run folder, a checkpoint folder or a hub id. It stays as it is.
        target: the folder to make.
        data: JSONL of real samples; a run folder brings its own.
        name: what the bundle calls itself; default: the run's name.
        precisions: of the graphs: fp32, fp16, bf16, int8, int8-dynamic; the first is what runs by default.
        opset: of the standard operators, 17 to 20.
        fold: how prompts enter the layers: auto, tables, gram, mixed, none or token (docs/export.md).
        fuse: also write a variant fused for ONNX Runtime.
        routing: whether the graphs have the output ``routing``.
        samples: real samples the parity gate compares on; None for as many as give it 128 logits.
        gate_samples: real samples that precisions below fp32 are judged on; fewer if there are fewer.
        calibration: JSONL of real samples that int8 reads its ranges from; default: the run's training split.
        calibration_samples: how many of them.
        overwrite: replace a bundle at the target.
        seed: of the generated batches and of the choice of samples.
        split: every graph in several files: the complementary encoders, and all that depends on one of them alone, as
            graphs of their own.
        cpu_threads: of sessions on a CPU, unless the device says otherwise; None for as many as the process may use.
        cpu_arena: whether such sessions keep memory for their next run.

    Returns:
        The bundle's folder.

    Raises:
        UsageError: an argument cannot be used, or there is no data.
        DataError: a sample cannot be used.
        CheckpointError: the model cannot be loaded.
        ExportError: the model cannot be exported.
        ParityError: the exported file does not compute what the model computes.
        BundleError: the bundle cannot be written.
    """
    options = Options(
        name=name or "mope",
        opset=opset,
        fold=fold,
        fuse=fuse,
        routing=routing,
        samples=samples,
        overwrite=overwrite,
        seed=seed,
        precisions=tuple(precisions),
        gate_samples=gate_samples,
        calibration_samples=calibration_samples,
        split=split,
        cpu_threads=cpu_threads,
        cpu_arena=cpu_arena,
    )
    if isinstance(model, MoPE):
        if data is None:
            raise UsageError("a model comes without data to check the export on", todo="give data=…, a JSONL file")
        ranges = Path(calibration or data)
        return export_model(model, Path(target), data=Path(data), calibration=ranges, options=options).bundle.path
    source = find_source(model, data=data)
    options = replace(options, name=name or source.name)
    ranges = Path(calibration or source.calibration)
    return export_model(source.load(), Path(target), data=source.data, calibration=ranges, options=options).bundle.path


def export_model(
    model: MoPE,
    target: Path,
    *,
    data: Path,
    calibration: Path,
    options: Options,
    on_step: Callable[[str], None] = lambda _: None,
    on_report: Callable[[ParityReport | PrecisionReport], None] = lambda _: None,
    engines: EngineOptions | None = None,
) -> Exported:
    """:func:`export_bundle` on a loaded model.

    Args:
        model: stays as it is.
        target: the folder to make.
        data: JSONL of real samples to compare on.
        calibration: JSONL of real samples to read ranges from.
        options: how to export.
        on_step: called with a few words before each step.
        on_report: called with each report of a gate, passed or not.
        engines: how to build TensorRT engines into the bundle; None for a bundle without.
    """
    check_target(target, overwrite=options.overwrite)
    if engines is not None:
        engines = check_engine_options(
            engines, options.precisions, get_target(options.target) if options.target is not None else None
        )
    check_sizes(model, options)
    check_split(model, options, engines=engines is not None)
    on_step("reading samples")
    samples = _samples(model, data, options)
    config = exporter_config(model, routing_output=options.routing)
    gate = ParityGate(model, config, samples, seed=options.seed, on_step=on_step, on_report=on_report)
    evaluation = None
    if options.precisions != ("fp32",):
        judged = pick_samples(data, model, options.gate_samples, seed=options.seed)
        evaluation = Evaluation(model, judged, on_step=on_step)
    with tempfile.TemporaryDirectory(prefix="mope-export-") as temporary:
        variants = make_variants(
            model,
            options,
            Path(temporary),
            gate,
            evaluation=evaluation,
            calibration=lambda: _calibration(model, calibration, options),
            on_step=on_step,
            on_report=on_report,
        )
        if options.target is not None:
            _check_device(options.target, options, variants)
        on_step("choosing golden samples")
        steady = golden_samples(model, samples, GOLDEN_COUNT)
        golden = make_golden(model, steady, outputs=config.outputs)
        graphs = [
            _graph_entry(variant, config, _tolerance(variant, golden, config, gate.reports)) for variant in variants
        ]
        contents: dict[str, Path | bytes] = {path.name: path for variant in variants for path in variant.all_files}
        contents |= golden.files
        contents[REPORT] = _json(_reports(gate.reports, variants))
        tokenizer = model.preprocessing.tokenizer
        if tokenizer is not None:
            contents[TOKENIZER] = tokenizer.encode("utf-8")
        manifest = _manifest(model, options, graphs=graphs, reports=gate.reports, variants=variants)
        built: list[ExportedEngine] = []
        if engines is not None:
            without = write_bundle(Path(temporary) / "bundle", files=contents, manifest=manifest)
            built = export_engines(without, Path(temporary) / "engines", engines, on_step=on_step)
            contents |= {name: path for engine in built for name, path in engine.files.items()}
        on_step("timing each graph")
        rows = summarise(variants, built, golden.inputs)
        on_step("writing the bundle")
        bundle = write_bundle(target, files=contents, manifest=manifest, overwrite=options.overwrite)
    return Exported(bundle, gate.reports, tuple(rows))


def check_bundle(
    model: MoPE,
    bundle: Bundle,
    *,
    data: Path,
    samples: int | None = None,
    gate_samples: int = GATE_SAMPLES,
    seed: int = 0,
    on_step: Callable[[str], None] = lambda _: None,
) -> dict[str, ParityReport | PrecisionReport]:
    """Repeat the gates on the files of a bundle; :func:`export.gate.parity_report.require_parity` and
    :func:`export.gate.require_precision` judge the reports.

    Graphs that ONNX Runtime cannot run (bf16) are left out.

    Args:
        model: what the bundle should compute.
        bundle: opened and verified.
        data: JSONL of real samples.
        samples: how many of them for fp32; None for as many as give the gate 128 logits.
        gate_samples: how many of them for lower precisions; fewer if there are fewer.
        seed: of the generated batches and of the choice of samples.
        on_step: called with a few words before each step.

    Returns:
        A report for each graph, by name.

    Raises:
        UsageError: the bundle is of a model with other labels or other preprocessing.
    """
    _check_same_task(model, bundle)
    options = Options(samples=samples, seed=seed, gate_samples=gate_samples)
    config = exporter_config(model, routing_output=bundle.manifest.routing is not None)
    found: dict[str, ParityReport | PrecisionReport] = {}
    graphs = [graph for graph in bundle.manifest.graphs if graph.takes("onnxruntime")]
    plain = [graph for graph in graphs if graph.precision == "fp32"]
    lowered = [graph for graph in graphs if graph.precision != "fp32"]
    if plain:
        gate = ParityGate(model, config, _samples(model, data, options), seed=seed, on_step=on_step)
        for graph in plain:
            parts = [bundle.file(part.file) for part in graph.parts]
            found[graph.name] = gate.compare(graph.name, bundle.file(graph.file), config, parts)
    if lowered:
        judged = pick_samples(data, model, options.gate_samples, seed=seed)
        evaluation = Evaluation(model, judged, on_step=on_step)
        for graph in lowered:
            limits = THRESHOLDS[graph.precision]
            if graph.gate is not None:
                asked = graph.gate.thresholds
                limits = Thresholds(
                    labels=asked.get("labels", 0.0), routing=asked.get("routing"), metric=asked.get("metric")
                )
            found[graph.name] = judge_again(
                evaluation,
                bundle.file(graph.file),
                config,
                precision=graph.precision,
                thresholds=limits,
                parts=[bundle.file(part.file) for part in graph.parts],
            )
    return found


def _samples(model: MoPE, data: Path, options: Options) -> list[Sample]:
    return pick_samples(data, model, options.samples or rows_needed(len(model.config.labels)), seed=options.seed)


def _calibration(model: MoPE, data: Path, options: Options) -> Iterator[Feeds]:
    """Input arrays of real samples, batch by batch; another choice than what is judged where both are of one file."""
    rows = pick_samples(data, model, options.calibration_samples, seed=options.seed + 1)
    for case in sample_cases(model.preprocessing, rows):
        yield {name: case.inputs[name] for name in model.input_names}


def _check_device(name: str, options: Options, variants: Sequence[Variant]) -> None:
    """Every final graph suits the device that it is for."""
    for variant in variants:
        files = (variant.files[0], *variant.part_files)
        nodes = [node for file in files for node in onnx.load(file, load_external_data=False).graph.node]
        ops = {node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}" for node in nodes}
        get_target(name).check(opset=options.opset, precisions=(variant.precision,), ops=ops)


def _graph_entry(variant: Variant, config: MoPEExporterConfig, tolerance: dict[str, float]) -> dict[str, Any]:
    """A graph as the manifest describes it."""
    proto = onnx.load(variant.files[0], load_external_data=False)
    inputs = {key: _tensor(key, *value, config) for key, value in config.input_shapes.items()}
    parts = [_part_entry(part, inputs, config) for part in variant.parts]
    return {
        "name": variant.name,
        "file": variant.files[0].name,
        "data": [path.name for path in variant.files[1:]],
        "precision": variant.precision,
        "opset": next(opset.version for opset in proto.opset_import if opset.domain == ""),
        "ir_version": proto.ir_version,
        "runs_on": variant.runs_on,
        "inputs": [*inputs.values(), *(part["outputs"][1] for part in parts)],
        "outputs": [_tensor(key, *value, config) for key, value in config.output_shapes.items()],
        "tolerance": tolerance,
        "gate": _gate(variant),
        "parts": parts,
    }


def _part_entry(part: PartFile, inputs: dict[str, dict[str, Any]], config: MoPEExporterConfig) -> dict[str, Any]:
    """A part as the manifest describes it; its inputs are taken out of ``inputs``."""
    rows = {y_name(part.modality): part.y_width, conditions_name(part.modality): part.width}
    return {
        "modality": part.modality,
        "file": part.files[0].name,
        "data": [path.name for path in part.files[1:]],
        "inputs": [inputs.pop(name) for name in part.inputs],
        "outputs": [_tensor(name, "tensor(float)", ("batch", width), config) for name, width in rows.items()],
    }


def _gate(variant: Variant) -> dict[str, Any] | None:
    if variant.lowered is None:
        return None
    report = variant.lowered.report
    return {
        "samples": report.samples,
        "mark": report.mark,
        "kept": list(variant.kept),
        "thresholds": report.thresholds.to_dict(),
        "figures": report.figures(),
    }


def _tolerance(
    variant: Variant, golden: Golden, config: MoPEExporterConfig, reports: dict[str, ParityReport]
) -> dict[str, float]:
    """What another engine's or processor's arithmetic may differ by and still be right.

    A multiple of what was measured here: of fp32 over everything that was compared, of lower precisions on the golden
    samples themselves.
    """
    precision = variant.precision
    if precision == "fp32":
        measured = dict.fromkeys(("logits", "routing"), 0.0)
        for check in (check for report in reports.values() for check in report.values):
            measured[check.output] = max(measured[check.output], check.error)
    else:
        measured = _golden_errors(variant, golden, config)
    least, factor = GOLDEN_TOLERANCE[precision], GOLDEN_FACTOR[precision]
    return {name: min(1.0, max(least, factor * measured.get(name, 0.0))) for name in ("logits", "routing")}


def _golden_errors(variant: Variant, golden: Golden, config: MoPEExporterConfig) -> dict[str, float]:
    """``logits``: max|a − b| / max|b|; ``routing``: max|a − b|, as :mod:`mope_deploy.engines.golden` measures them."""
    session = cpu_session(variant.runnable)
    found = run_graph(session, golden.inputs, list(golden.outputs), config=config, precision=variant.precision)
    errors = {name: float(np.abs(array - golden.outputs[name]).max()) for name, array in found.items()}
    errors["logits"] /= max(float(np.abs(golden.outputs["logits"]).max()), float(np.finfo(np.float32).tiny))
    return errors


def _reports(parity: dict[str, ParityReport], variants: Sequence[Variant]) -> dict[str, Any]:
    """Every report of a gate, by the graph's name; of repaired graphs also what was tried."""
    found: dict[str, Any] = {name: report.to_dict() for name, report in parity.items()}
    for variant in variants:
        if variant.lowered is not None:
            found[variant.name] = {**variant.lowered.report.to_dict(), **variant.lowered.to_dict()}
        if variant.parts:
            found[variant.name]["split"] = {
                "files": [path.name for path in variant.all_files],
                "max_relative_error": variant.split_error,
            }
    return found


def _tensor(name: str, dtype: str, shape: Sequence[int | str], config: MoPEExporterConfig) -> dict[str, Any]:
    ranges: dict[str, list[float]] = {"attention_mask": [0, 1], "audio_mask": [0, 1], "routing": [0, 1]}
    ranges |= {present_name(modality): [0, 1] for modality in config.graph.missing}
    if config.graph.vocab_size is not None:
        ranges["input_ids"] = [0, config.graph.vocab_size - 1]
    return {"name": name, "dtype": _NUMPY[dtype], "shape": list(shape), "range": ranges.get(name)}


def _manifest(
    model: MoPE,
    options: Options,
    *,
    graphs: list[dict[str, Any]],
    reports: dict[str, ParityReport],
    variants: Sequence[Variant],
) -> dict[str, Any]:
    config = model.config
    routed = config.dynamic and options.routing
    return {
        "name": options.name,
        "versions": installed_versions(_VERSIONS),
        "task": {
            "type": "multi-label" if (config.task == "multi-label") else "single-label",
            "labels": list(config.labels),
            "threshold": 0.5 if (config.task == "multi-label") else None,
        },
        "modalities": {
            "main": config.main.modality,
            "complementary": [spec.modality for spec in config.complementary],
        },
        "preprocess": model.preprocessing.to_dict()
        | {"tokenizer": TOKENIZER if model.preprocessing.tokenizer is not None else None},
        "graphs": graphs,
        "routing": {"layers": model.main.depth, "experts": config.experts, "top_k": config.top_k or None}
        if routed
        else None,
        "golden": {"samples": SAMPLES, "inputs": INPUTS, "outputs": OUTPUTS},
        "parity": {
            "report": REPORT,
            "figures": _figures(reports, variants) | {"folding": folding_of(model, options.fold)},
        },
        "build": _build(model, options),
    }


def check_sizes(model: MoPE, options: Options) -> dict[str, Sizes]:
    """Sizes that engines are built for, as far as the export was told, by axis.

    Raises:
        UsageError: sizes that the model's preprocessing never makes.
    """
    profile = {axis: Sizes.parse(sizes, axis=axis) for axis, sizes in options.profile().items()}
    text = model.preprocessing.text
    if "text_length" in profile and (text is None or profile["text_length"].max > text.max_length):
        raise UsageError(
            "--text-len",
            received=str(profile["text_length"]),
            expected="nothing: this model reads no text"
            if text is None
            else f"at most {text.max_length:,} tokens: longer texts are cut to that",
        )
    sound = model.preprocessing.audio
    if "audio_length" in profile and (
        sound is None
        or not sound.min_samples <= profile["audio_length"].min <= profile["audio_length"].max <= sound.max_samples
    ):
        raise UsageError(
            "--audio-len",
            received=str(profile["audio_length"]),
            expected="nothing: this model hears nothing"
            if sound is None
            else f"{sound.min_samples:,} to {sound.max_samples:,} samples",
        )
    return profile


def check_split(model: MoPE, options: Options, *, engines: bool = False) -> None:
    """Whether graphs can be in parts, where that was asked for.

    Raises:
        UsageError: engines are to be built of them, or the main modality is not conditioned by another one.
    """
    if not options.split:
        return
    if engines:
        raise UsageError(
            "no engine is built from graphs in parts",
            received="--split with --format trt",
            expected="--format onnx",
            todo="export two bundles",
        )
    if not model.config.complementary or not (model.config.dynamic or model.config.mapped):
        raise UsageError(
            "--split has nothing to take out of this model",
            received="no prompt that depends on a complementary modality",
            expected="a model with dynamic or mapped prompts",
            todo="leave --split out",
        )


def _build(model: MoPE, options: Options) -> dict[str, Any] | None:
    """What engines should be built with, and sessions opened with, where the export was told."""
    profile = check_sizes(model, options)
    workspace = options.workspace or (get_target(options.target).workspace if options.target else None)
    cpu = {"threads": options.cpu_threads, "arena": options.cpu_arena}
    if not profile and workspace is None and options.target is None and cpu == {"threads": None, "arena": True}:
        return None
    sizes = {axis: [s.min, s.opt, s.max] for axis, s in profile.items()}
    return {"target": options.target, "profile": sizes, "workspace": workspace, "cpu": cpu}


def _figures(reports: dict[str, ParityReport], variants: Sequence[Variant]) -> dict[str, float | str | bool]:
    """Of the canonical graph under plain names; of the others what they are compared for."""
    found = reports["model" if "model" in reports else "model-with-routing"].figures()
    with_routing = reports.get("model-with-routing")
    if with_routing is not None:
        found |= {key: value for key, value in with_routing.figures().items() if key.startswith("experts_")}
    if "model-fused" in reports:
        found["fused_max_relative_error"] = reports["model-fused"].max_error
    if any(variant.parts for variant in variants):
        found["split_max_relative_error"] = max(variant.split_error for variant in variants)
    return found


def _check_same_task(model: MoPE, bundle: Bundle) -> None:
    """A comparison of values means nothing between models of other labels or other preprocessing."""
    labels = bundle.manifest.task.labels
    if labels != model.config.labels:
        raise UsageError(
            f"{bundle.path} is of a model with other labels",
            received=", ".join(labels[:5]),
            expected=", ".join(model.config.labels[:5]),
        )
    if bundle.preprocessing != model.preprocessing:
        raise UsageError(
            f"{bundle.path} prepares its inputs in another way than the model",
            todo="is it of another run? export this one again",
        )


def _json(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")
