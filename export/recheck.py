"""``mope-export check``: both gates once more, on the files of a bundle."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

from export.gate import THRESHOLDS, Evaluation, ParityGate, ParityReport, PrecisionReport, Thresholds, judge_again
from export.gate.cases import rows_needed
from export.graph.exporter_config import exporter_config
from export.limits import GATE_SAMPLES, THRESHOLD_NAMES
from export.pack.golden import pick_samples
from export.precision.half import write_emulated
from export.rows import judged_rows
from mope_deploy.bundle import Bundle
from mope_deploy.engines.onnxruntime.cpu import cpu_settings
from mope_deploy.errors import UsageError
from mope_deploy.manifest import Graph
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

    What ONNX Runtime cannot run (bf16) is judged on a float32 copy made of its bytes. A bundle does not say which rows
    int8 read its ranges from: where ``data`` holds some of them, they are judged as well, unlike by an export.

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
        return Evaluation(model, judged_rows(model, data, count=gate_samples, seed=seed), on_step=on_step, cpu=cpu)

    for graph in sorted(bundle.manifest.graphs, key=lambda graph: graph.precision != "fp32"):
        files = [bundle.file(name) for name in (graph.file, *(part.file for part in graph.parts))]
        if graph.precision == "fp32":
            found[graph.name] = gate().compare(graph.name, files[0], config, files[1:])
            continue
        with tempfile.TemporaryDirectory(prefix="mope-check-") as folder:
            mark = "CPU" if graph.precision == "fp16" else ""
            if not graph.takes("onnxruntime"):
                mark = "emulated"
                files = [write_emulated(file, graph.precision, Path(folder) / file.name) for file in files]
            found[graph.name] = judge_again(
                evaluation(),
                files[0],
                config,
                precision=graph.precision,
                thresholds=_asked(graph),
                parts=files[1:],
                mark=mark,
            )
    return found


def _asked(graph: Graph) -> Thresholds:
    """What the export asked of a graph of lower precision."""
    if graph.gate is None:
        return THRESHOLDS[graph.precision]
    asked = graph.gate.thresholds
    others = {name: asked.get(name) for name in THRESHOLD_NAMES if name != "labels"}
    return Thresholds(labels=asked.get("labels", 0.0), **others)


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
