"""What a bundle's manifest and its ``parity.json`` say, from what was exported and how it was judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec

from export.checks import check_sizes
from export.gate.device import describe
from export.graph.static import folding_of
from export.pack.golden import INPUTS, OUTPUTS, SAMPLES, Golden
from export.pack.tolerance import golden_errors, golden_tolerance
from export.variants import Variant, Work
from mope_deploy.engines.session import Session
from mope_deploy.extras import installed_versions
from mope_deploy.manifest import Gate, Graph
from mope_deploy.targets import get_target

__all__ = ["REPORT", "TOKENIZER", "graph_entry", "manifest_of", "reports_of"]

TOKENIZER, REPORT = "tokenizer.json", "parity.json"
_VERSIONS = ("mope-deploy", "torch", "timm", "transformers", "onnx", "onnxscript", "onnxruntime", "optimum")


def graph_entry(work: Work, variant: Variant, golden: Golden, session: Session | None) -> Graph:
    """A graph as the manifest describes it; its tolerances are a multiple of what was measured here.

    That is of fp32 over everything that was compared, of lower precisions on the golden samples themselves.

    Args:
        work, variant, golden: the export, one of its graphs, and its golden samples.
        session: what the graph computes here, of a lower precision.

    Raises:
        ParityError: a graph that golden samples could not check.
    """
    measured, gate = _parity_errors(work), None
    if variant.lowered is not None:
        assert session is not None
        report, measured = variant.lowered.report, golden_errors(session, golden, work.model.preprocessing)
        asked, figures = report.thresholds.to_dict(), report.figures()
        gate = Gate(samples=report.samples, mark=report.mark, kept=variant.kept, thresholds=asked, figures=figures)
    return replace(
        describe(variant.files[0], work.final, variant.part_files, precision=variant.precision),
        name=variant.name,
        runs_on=variant.runs_on,
        tolerance=golden_tolerance(variant.name, variant.precision, measured, golden),
        gate=gate,
    )


def manifest_of(work: Work, variants: Sequence[Variant], graphs: Sequence[Graph]) -> dict[str, Any]:
    """The manifest as :func:`mope_deploy.bundle.write_bundle` takes it."""
    model, options = work.model, work.options
    config, task = model.config, model.task
    routing = {"layers": model.main.depth, "experts": config.experts, "top_k": config.top_k or None}
    tokenizer = TOKENIZER if model.preprocessing.tokenizer is not None else None
    return {
        "name": options.name,
        "versions": installed_versions(_VERSIONS),
        "task": {"type": task.type, "labels": list(task.labels), "threshold": task.threshold},
        "modalities": {
            "main": config.main.modality,
            "complementary": [spec.modality for spec in config.complementary],
        },
        "preprocess": model.preprocessing.to_dict() | {"tokenizer": tokenizer},
        "graphs": [msgspec.to_builtins(graph) for graph in graphs],
        "routing": routing if config.dynamic and options.routing else None,
        "golden": {"samples": SAMPLES, "inputs": INPUTS, "outputs": OUTPUTS},
        "parity": {
            "report": REPORT,
            "figures": _figures(work, variants) | {"folding": folding_of(model, options.fold)},
        },
        "build": _build(work),
    }


def reports_of(work: Work, variants: Sequence[Variant]) -> dict[str, Any]:
    """Every report of a gate, by the graph's name; of repaired graphs also what was tried."""
    found: dict[str, Any] = {name: report.to_dict() for name, report in work.parity.reports.items()}
    for variant in variants:
        if variant.lowered is not None:
            found[variant.name] = {**variant.lowered.report.to_dict(), **variant.lowered.to_dict()}
        if variant.final is not None:
            found[variant.name]["final"] = variant.final.to_dict()
        if variant.parts:
            found[variant.name]["split"] = {
                "files": [path.name for path in variant.all_files],
                "max_relative_error": variant.split_error,
            }
    return found


def _parity_errors(work: Work) -> dict[str, float]:
    """The largest of each of the graph's outputs over everything that was compared; scores are no output of it."""
    errors: dict[str, float] = {}
    for check in (check for report in work.parity.reports.values() for check in report.values):
        if check.output in work.routed.outputs:
            errors[check.output] = max(errors.get(check.output, 0.0), check.error)
    return errors


def _build(work: Work) -> dict[str, Any] | None:
    """What engines should be built with, and sessions opened with, where the export was told."""
    options, profile = work.options, check_sizes(work.model, work.options)
    workspace = options.workspace or (get_target(options.target).workspace if options.target else None)
    cpu = {"threads": options.cpu_threads, "arena": options.cpu_arena}
    if not profile and workspace is None and options.target is None and cpu == {"threads": None, "arena": True}:
        return None
    sizes = {axis: [s.min, s.opt, s.max] for axis, s in profile.items()}
    return {"target": options.target, "profile": sizes, "workspace": workspace, "cpu": cpu}


def _figures(work: Work, variants: Sequence[Variant]) -> dict[str, float | str | bool]:
    """Of the canonical graph under plain names; of the others what they are compared for."""
    reports = work.parity.reports
    found = reports["model" if "model" in reports else "model-with-routing"].figures()
    if (routed := reports.get("model-with-routing")) is not None:
        found |= {key: value for key, value in routed.figures().items() if key.startswith("experts_")}
    if (fused := reports.get("model-fused")) is not None:
        found["fused_max_relative_error"] = fused.max_error
    if any(variant.parts for variant in variants):
        found["split_max_relative_error"] = max(variant.split_error for variant in variants)
    return found
