"""``mope-export check``: both gates once more, on the files of a bundle."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from export.gate import THRESHOLDS, Evaluation, ParityGate, ParityReport, PrecisionReport, Thresholds, judge_again
from export.gate.cases import rows_needed
from export.graph.exporter_config import exporter_config
from export.limits import GATE_SAMPLES, THRESHOLD_NAMES
from export.pack.golden import pick_samples
from mope_deploy.bundle import Bundle
from mope_deploy.engines.onnxruntime.cpu import cpu_settings
from mope_deploy.errors import UsageError
from mope_deploy.model import MoPE

__all__ = ["check_bundle"]


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
    """Repeat the gates on the files of a bundle; :func:`export.gate.require_parity` and
    :func:`export.gate.require_precision` judge the reports.

    Graphs that ONNX Runtime cannot run (bf16) are left out.

    Args:
        model: what the bundle should compute.
        bundle: opened and verified.
        data: JSONL of real samples.
        samples, gate_samples, seed: see :class:`export.options.Options`.
        on_step: called with a few words before each step.

    Returns:
        A report for each graph, by name.

    Raises:
        UsageError: the bundle is of a model with other labels or other preprocessing.
    """
    _check_same_task(model, bundle)
    config = exporter_config(model, routing_output=bundle.manifest.routing is not None)
    cpu = cpu_settings(bundle.manifest.build.cpu)
    found: dict[str, ParityReport | PrecisionReport] = {}

    @functools.cache
    def gate() -> ParityGate:
        rows = pick_samples(data, model, samples or rows_needed(len(model.config.labels)), seed=seed)
        return ParityGate(model, config, rows, seed=seed, cpu=cpu, on_step=on_step)

    @functools.cache
    def evaluation() -> Evaluation:
        return Evaluation(model, pick_samples(data, model, gate_samples, seed=seed), on_step=on_step, cpu=cpu)

    graphs = [graph for graph in bundle.manifest.graphs if graph.takes("onnxruntime")]
    for graph in sorted(graphs, key=lambda graph: graph.precision != "fp32"):
        file, parts = bundle.file(graph.file), [bundle.file(part.file) for part in graph.parts]
        if graph.precision == "fp32":
            found[graph.name] = gate().compare(graph.name, file, config, parts)
            continue
        limits = THRESHOLDS[graph.precision]
        if graph.gate is not None:
            asked = graph.gate.thresholds
            optional = {name: asked.get(name) for name in THRESHOLD_NAMES if name != "labels"}
            limits = Thresholds(labels=asked.get("labels", 0.0), **optional)
        found[graph.name] = judge_again(
            evaluation(), file, config, precision=graph.precision, thresholds=limits, parts=parts
        )
    return found


def _check_same_task(model: MoPE, bundle: Bundle) -> None:
    """A comparison of values means nothing between models of other labels or other preprocessing."""
    labels = bundle.manifest.task.labels
    if labels != model.task.labels:
        raise UsageError(
            f"{bundle.path} is of a model with other labels",
            received=", ".join(labels[:5]),
            expected=", ".join(model.task.labels[:5]),
        )
    if bundle.preprocessing != model.preprocessing:
        raise UsageError(
            f"{bundle.path} prepares its inputs in another way than the model",
            todo="is it of another run? export this one again",
        )
