"""From a trained model to a verified bundle: rewrite → trace → lint → gate → golden samples → atomic write.

Nothing is written to the target before every graph has passed the gate.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import onnx

from export.cases import Case, generated_cases, rows_needed, sample_cases
from export.exporter_config import MoPEExporterConfig, exporter_config
from export.fused import attention_layers, fuse, routers
from export.golden import INPUTS, OUTPUTS, SAMPLES, golden_samples, make_golden, pick_samples
from export.options import DEFAULT_OPSET, Options, check_target
from export.parity import measure
from export.reference import Reference
from export.report import ParityReport, require_parity
from export.source import find_source
from export.static import to_static
from export.to_onnx import drop_routing, save, trace
from mope_deploy.bundle import Bundle, write_bundle
from mope_deploy.data import Sample
from mope_deploy.errors import UsageError
from mope_deploy.model import MoPE
from mope_deploy.preprocess import present_name

__all__ = ["Exported", "check_bundle", "export_bundle", "export_model"]

GRAPH, FUSED, TOKENIZER, REPORT = "model.onnx", "model.fused.onnx", "tokenizer.json", "parity.json"
GOLDEN_COUNT = 8
GOLDEN_TOLERANCE = 1e-4  # at least
_NUMPY = {"tensor(float)": "float32", "tensor(int64)": "int64"}
_VERSIONS = ("mope-deploy", "torch", "timm", "transformers", "onnx", "onnxscript", "onnxruntime", "optimum")


@dataclass(frozen=True)
class Exported:
    """A finished export.

    Attributes:
        bundle: as written and opened again.
        reports: the gate's report on each graph, by the graph's name.
    """

    bundle: Bundle
    reports: dict[str, ParityReport]


def export_bundle(
    model: MoPE | str | Path,
    target: str | Path,
    *,
    data: str | Path | None = None,
    name: str | None = None,
    opset: int = DEFAULT_OPSET,
    fuse: bool = False,
    routing: bool = True,
    samples: int | None = None,
    overwrite: bool = False,
    seed: int = 0,
) -> Path:
    """Export a trained model to a bundle, or to nothing: what ``mope-export`` does, from Python.

    Args:
        model: a model, a run folder, a checkpoint folder or a hub id. It stays as it is.
        target: the folder to make.
        data: JSONL of real samples; a run folder brings its own.
        name: what the bundle calls itself; default: the run's name.
        opset: of the standard operators, 17 to 20.
        fuse: also write a variant fused for ONNX Runtime.
        routing: whether the graph has the output ``routing``.
        samples: real samples the gate compares on; None for as many as give it 128 logits.
        overwrite: replace a bundle at the target.
        seed: of the generated batches and of the choice of samples.

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
        name=name or "mope", opset=opset, fuse=fuse, routing=routing, samples=samples, overwrite=overwrite, seed=seed
    )
    if isinstance(model, MoPE):
        if data is None:
            raise UsageError("a model comes without data to check the export on", todo="give data=…, a JSONL file")
        return export_model(model, Path(target), data=Path(data), options=options).bundle.path
    source = find_source(model, data=data)
    options = replace(options, name=name or source.name)
    return export_model(source.load(), Path(target), data=source.data, options=options).bundle.path


def export_model(
    model: MoPE,
    target: Path,
    *,
    data: Path,
    options: Options,
    on_step: Callable[[str], None] = lambda _: None,
    on_report: Callable[[ParityReport], None] = lambda _: None,
) -> Exported:
    """:func:`export_bundle` on a loaded model.

    Args:
        model: stays as it is.
        target: the folder to make.
        data: JSONL of real samples.
        options: how to export.
        on_step: called with a few words before each step.
        on_report: called with each report of the gate, passed or not.
    """
    check_target(target, overwrite=options.overwrite)
    on_step("reading samples")
    samples = _samples(model, data, options)
    config = exporter_config(model, routing_output=options.routing)
    gate = _Gate(model, config, samples, seed=options.seed, on_step=on_step, on_report=on_report)
    with tempfile.TemporaryDirectory(prefix="mope-export-") as temporary:
        folder = Path(temporary)
        files = _graphs(model, config, folder, options, gate)
        on_step("writing the bundle")
        golden = make_golden(model, golden_samples(model, samples, GOLDEN_COUNT), outputs=config.outputs)
        tolerance = _tolerance(gate.reports)
        graphs = [_graph_entry("model", folder / GRAPH, config, tolerance)]
        if options.fuse:
            graphs.append(_graph_entry("model-fused", folder / FUSED, config, tolerance, runs_on="onnxruntime"))
        contents: dict[str, Path | bytes] = {path.name: path for path in files} | dict(golden.files)
        contents[REPORT] = _json({name: report.to_dict() for name, report in gate.reports.items()})
        tokenizer = model.preprocessing.tokenizer
        if tokenizer is not None:
            contents[TOKENIZER] = tokenizer.encode("utf-8")
        manifest = _manifest(model, options, graphs=graphs, reports=gate.reports)
        bundle = write_bundle(target, files=contents, manifest=manifest, overwrite=options.overwrite)
    return Exported(bundle, gate.reports)


def check_bundle(
    model: MoPE,
    bundle: Bundle,
    *,
    data: Path,
    samples: int | None = None,
    seed: int = 0,
    on_step: Callable[[str], None] = lambda _: None,
) -> dict[str, ParityReport]:
    """Repeat the gate on the files of a bundle; :func:`export.report.require_parity` judges the reports.

    Args:
        model: what the bundle should compute.
        bundle: opened and verified.
        data: JSONL of real samples.
        samples: how many of them; None for as many as give the gate 128 logits.
        seed: of the generated batches and of the choice of samples.
        on_step: called with a few words before each step.

    Returns:
        A report for each graph, by name.

    Raises:
        UsageError: the bundle is of a model with other labels or other preprocessing.
    """
    _check_same_task(model, bundle)
    rows = _samples(model, data, Options(samples=samples, seed=seed))
    config = exporter_config(model, routing_output=bundle.manifest.routing is not None)
    gate = _Gate(model, config, rows, seed=seed, on_step=on_step)
    for graph in bundle.manifest.graphs:
        gate.compare(graph.name, bundle.file(graph.file), config)
    return gate.reports


def _samples(model: MoPE, data: Path, options: Options) -> list[Sample]:
    return pick_samples(data, model, options.samples or rows_needed(len(model.config.labels)), seed=options.seed)


class _Gate:
    """The gate with its batches and the model's own outputs for them, which every graph is compared with.

    Attributes:
        reports: what was found, by the graph's name.
    """

    def __init__(
        self,
        model: MoPE,
        config: MoPEExporterConfig,
        samples: Sequence[Sample],
        *,
        seed: int,
        on_step: Callable[[str], None],
        on_report: Callable[[ParityReport], None] = lambda _: None,
    ) -> None:
        self.reference = Reference(model)
        self.cases = [*generated_cases(config.graph, seed=seed), *sample_cases(model.preprocessing, samples)]
        self.on_step, self.on_report = on_step, on_report
        self.reports: dict[str, ParityReport] = {}

    def compare(self, name: str, file: Path, config: MoPEExporterConfig) -> ParityReport:
        """Compare one file with the model and keep the report."""
        report = measure(self.reference.model, file, config, self._shown(file.name), reference=self.reference)
        self.reports[name] = report
        self.on_report(report)
        return report

    def _shown(self, name: str) -> Iterator[Case]:
        for i, case in enumerate(self.cases, 1):
            self.on_step(f"comparing {name} with the model (batch {i} of {len(self.cases)})")
            yield case


def _graphs(model: MoPE, config: MoPEExporterConfig, folder: Path, options: Options, gate: _Gate) -> list[Path]:
    """Write every graph and put it through the gate; the files written."""
    routed = exporter_config(model)
    gate.on_step("rewriting the routing and tracing the graph")
    graph = trace(to_static(model), routed, opset=options.opset)
    if len(config.outputs) < len(routed.outputs):
        # Which experts the file chooses cannot be seen without this output: compared first, then dropped.
        file = folder / "model-with-routing.onnx"
        save(graph, file)
        require_parity(gate.compare("model-with-routing", file, routed))
        drop_routing(graph)
    files = save(graph, folder / GRAPH, external=options.fuse)
    require_parity(gate.compare("model", folder / GRAPH, config))
    if options.fuse:
        gate.on_step("fusing for ONNX Runtime")
        fuse(folder / GRAPH, folder / FUSED, layers=attention_layers(model), routers=routers(model))
        require_parity(gate.compare("model-fused", folder / FUSED, config))
        files.append(folder / FUSED)
    return files


def _graph_entry(
    name: str, file: Path, config: MoPEExporterConfig, tolerance: dict[str, float], *, runs_on: str = "any"
) -> dict[str, Any]:
    """A graph as the manifest describes it."""
    proto = onnx.load(file, load_external_data=False)
    data = sorted({e.value for t in proto.graph.initializer for e in t.external_data if e.key == "location"})
    return {
        "name": name,
        "file": file.name,
        "data": data,
        "precision": "fp32",
        "opset": next(opset.version for opset in proto.opset_import if opset.domain == ""),
        "ir_version": proto.ir_version,
        "runs_on": runs_on,
        "inputs": [_tensor(key, *value, config) for key, value in config.input_shapes.items()],
        "outputs": [_tensor(key, *value, config) for key, value in config.output_shapes.items()],
        "tolerance": tolerance,
        "gate": None,
    }


def _tensor(name: str, dtype: str, shape: Sequence[int | str], config: MoPEExporterConfig) -> dict[str, Any]:
    ranges: dict[str, list[float]] = {"attention_mask": [0, 1], "audio_mask": [0, 1], "routing": [0, 1]}
    ranges |= {present_name(modality): [0, 1] for modality in config.graph.missing}
    if config.graph.vocab_size is not None:
        ranges["input_ids"] = [0, config.graph.vocab_size - 1]
    return {"name": name, "dtype": _NUMPY[dtype], "shape": list(shape), "range": ranges.get(name)}


def _manifest(
    model: MoPE, options: Options, *, graphs: list[dict[str, Any]], reports: dict[str, ParityReport]
) -> dict[str, Any]:
    config = model.config
    routed = config.dynamic and options.routing
    return {
        "name": options.name,
        "versions": {name: found for name in _VERSIONS if (found := _version(name)) is not None},
        "task": {
            "type": "multi-label" if config.multi_label else "single-label",
            "labels": list(config.labels),
            "threshold": 0.5 if config.multi_label else None,
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
        "parity": {"report": REPORT, "figures": _figures(reports)},
        "build": None,
    }


def _tolerance(reports: dict[str, ParityReport]) -> dict[str, float]:
    """What another CPU's or engine's float32 may differ by and still be right: ten times what was measured here."""
    found = dict.fromkeys(("logits", "routing"), GOLDEN_TOLERANCE)
    for check in (check for report in reports.values() for check in report.values):
        found[check.output] = max(found[check.output], 10 * check.error)
    return found


def _figures(reports: dict[str, ParityReport]) -> dict[str, float | str | bool]:
    """Of the canonical graph under plain names; of the others what they are compared for."""
    found = reports["model"].figures()
    with_routing = reports.get("model-with-routing")
    if with_routing is not None:
        found |= {key: value for key, value in with_routing.figures().items() if key.startswith("experts_")}
    if "model-fused" in reports:
        found["fused_max_relative_error"] = reports["model-fused"].max_error
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


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _json(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")
