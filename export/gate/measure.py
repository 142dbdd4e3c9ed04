"""One file of lower precision against the eager model. It fails closed.

Letters: n samples · C classes · K experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from export.gate.device import origin, run_checked
from export.gate.lowered_report import Flip, LogitsError, Metric, PrecisionReport, ProbabilityError, Share
from export.gate.reference import Batch
from export.gate.tables import compare_tables
from export.gate.thresholds import Thresholds
from export.graph.exporter_config import MoPEExporterConfig
from mope_deploy.engines.onnxruntime.cpu import CpuSettings
from mope_deploy.metrics import report as scores
from mope_deploy.model import MoPE
from mope_deploy.task import Task

__all__ = ["judge_again", "measure_precision", "without_routing"]

_TIE = 1e-6  # between two weights of a router: float32 itself makes them differ by that
_CONSTANT = 1e-3  # a spread below this share of the logits' size is none: the model says the same of everything
_LISTED = 100  # flips written out; all are counted

Array = NDArray[Any]
Arrays = dict[str, Array]


class Reference(Protocol):
    """Samples with the outputs that a file is compared with: a model's (:class:`export.gate.evaluation.Evaluation`) or
    another file's (:class:`export.gate.final.JudgedFile`).
    """

    model: MoPE
    cpu: CpuSettings | None
    labelled: Array
    truth: Array

    def name(self, row: int) -> str: ...

    def batches(self, *, what: str = "a file") -> Iterator[Batch]: ...


def measure_precision(
    evaluation: Reference,
    file: Path,
    config: MoPEExporterConfig,
    *,
    precision: str,
    thresholds: Thresholds,
    mark: str = "",
    parts: Sequence[Path] = (),
) -> PrecisionReport:
    """Run ``file`` in ONNX Runtime on the CPU and compare. Never raises for a wrong file: it is in the report.

    Args:
        evaluation: the samples and the eager model's outputs.
        file: the graph as saved, or what can be run in its place.
        config: what the graph was asked to be. Without its output ``routing`` a model that routes passes only where
            none is asked for (:func:`without_routing`).
        precision: what it was lowered to.
        thresholds: what has to be reached.
        mark: what running it here does not show: ``"emulated"``, ``"CPU"``, or nothing.
        parts: of a graph in several files the others; the report's hash is that of ``file``.

    Raises:
        DataError: a sample that cannot be read.
    """
    batches = evaluation.batches(what=file.name)
    runs, opened, ran = run_checked(file, config, batches, parts, precision=precision, cpu=evaluation.cpu)
    model, n = evaluation.model.config, sum(run.case.batch for run in runs)
    eager = _joined([run.eager for run in runs])
    lowered = _joined([run.exported for run in runs])
    finite = all(bool(np.isfinite(array).all()) for array in (*eager.values(), *lowered.values()))
    labels, label_flips = _labels(eager, lowered, evaluation.model.task, evaluation.name)
    experts, expert_flips = _experts(eager, lowered, evaluation.name)
    same, tied = _same_experts(eager, lowered, 0 < model.top_k < model.experts)  # (n,) each
    if n and not same.any() and tied.all():  # there is no value to compare, and no decision is wrong
        thresholds = _without_values(thresholds)
    return PrecisionReport(
        **origin(file, parts),
        precision=precision,
        mark=mark,
        samples=n,
        interface=(*opened, *(check for check in ran if not check.passed)),
        finite=finite,
        logits=_error(eager, lowered, same),
        probabilities=_probabilities(eager, lowered, same, evaluation.model.task),
        labels=labels,
        metric=_metric(eager, lowered, evaluation, n),
        routed=model.dynamic,
        experts=experts,
        drift=_drift(eager, lowered) if finite else (np.nan,) * len(experts),
        selections=_selections(eager, lowered) if 1 < model.top_k < model.experts else (),
        label_flips=label_flips,
        expert_flips=expert_flips,
        thresholds=thresholds,
        given=_given(eager, lowered, evaluation.model.task),
        tables=compare_tables(evaluation.model, file, parts) if runs else (),
    )


def judge_again(
    evaluation: Reference,
    file: Path,
    config: MoPEExporterConfig,
    *,
    precision: str,
    thresholds: Thresholds,
    parts: Sequence[Path],
    mark: str = "",
) -> PrecisionReport:
    """:func:`measure_precision` on a final graph, whose routing may be out of sight."""
    return measure_precision(
        evaluation,
        file,
        config,
        precision=precision,
        thresholds=thresholds if "routing" in config.outputs else without_routing(thresholds, evaluation.model),
        mark=mark,
        parts=parts,
    )


def without_routing(thresholds: Thresholds, model: MoPE) -> Thresholds:
    """What can be asked of a file that does not show its routing.

    A sample for which other experts were selected cannot be told from one that is wrong, and a few of them decide what
    a largest change, a mean or an RMS is: where experts are selected no value is judged. :mod:`export.final` holds such
    a file against the one that was judged with its routing in sight.
    """
    selecting = model.config.dynamic and 0 < model.config.top_k < model.config.experts
    return replace(_without_values(thresholds) if selecting else thresholds, routing=None)


def _without_values(thresholds: Thresholds) -> Thresholds:
    return replace(thresholds, probability=None, mean_probability=None, logits=None)


def _joined(batches: Sequence[Arrays]) -> Arrays:
    """All samples in one array for each output; none without batches."""
    return {name: np.concatenate([batch[name] for batch in batches]) for name in (batches[0] if batches else ())}


def _same_experts(eager: Arrays, lowered: Arrays, selecting: bool) -> tuple[Array, Array]:
    """Samples for which the same experts were selected in every layer, and those where these or ones that tie were.

    All where none are selected, or they are not shown.
    """
    if not selecting or "routing" not in lowered:
        every = np.ones(len(eager["logits"]) if eager else 0, bool)
        return every, every
    same, tied = _selected(eager, lowered)  # (n, layers) each
    return np.asarray(same.all(axis=-1)), np.asarray((same | tied).all(axis=-1))


def _selected(eager: Arrays, lowered: Arrays) -> tuple[Array, Array]:
    """Per sample and layer (n, layers), whether the same experts were selected, and whether others that tie were."""
    ours, theirs = eager["routing"] > 0, lowered["routing"] > 0  # (n, layers, K)
    soft = eager.get("soft", eager["routing"])
    least, lowest = (np.where(chosen, soft, np.inf).min(axis=-1) for chosen in (ours, theirs))
    same = np.asarray((ours == theirs).all(axis=-1))
    return same, ~same & (ours.sum(axis=-1) == theirs.sum(axis=-1)) & (lowest >= least - _TIE)


def _error(eager: Arrays, lowered: Arrays, same: Array) -> LogitsError:
    if not same.any():
        return LogitsError(np.nan, np.nan, np.nan)
    b = eager["logits"][same].astype(np.float64)  # (n, C)
    difference = lowered["logits"][same].astype(np.float64) - b
    with np.errstate(invalid="ignore", divide="ignore"):
        changed, size = np.sqrt((difference**2).mean()), np.sqrt((b**2).mean())
        spread = b.std() if b.std() > _CONSTANT * size else size
        found = [np.abs(difference).max() / np.abs(b).max(), changed / size, changed / spread]
    if not difference.any():
        return LogitsError(0.0, 0.0, 0.0)
    return LogitsError(*(float(value) if np.isfinite(value) else np.nan for value in found))


def _probabilities(eager: Arrays, lowered: Arrays, same: Array, task: Task) -> ProbabilityError:
    if not same.any():
        return ProbabilityError(0, np.nan, np.nan)
    with np.errstate(invalid="ignore", over="ignore"):
        a, b = (task.probabilities(side["logits"][same]) for side in (lowered, eager))  # (n, C)
        changed = np.abs(a - b).max(
            axis=1
        )  # (n,); a mean over labels would hide one among hundreds that are never true
    return ProbabilityError(len(changed), float(changed.max()), float(changed.mean()))


def _labels(eager: Arrays, lowered: Arrays, task: Task, name: Callable[[int], str]) -> tuple[Share, tuple[Flip, ...]]:
    if not eager:
        return Share(0, 0), ()
    a, b = (task.cells(task.decide(side["logits"])) for side in (lowered, eager))  # (n, 1) or (n, C)
    flips = [
        Flip(name(row), *flip)
        for row in np.flatnonzero((a != b).any(axis=1)).tolist()
        for flip in task.flips(eager["logits"][row], lowered["logits"][row])
    ]
    return Share(b.size, int((a == b).sum())), _largest(flips)


def _given(eager: Arrays, lowered: Arrays, task: Task) -> Share | None:
    if not eager or not task.several:
        return None
    a, b = (task.members(task.decide(side["logits"])) for side in (lowered, eager))  # (C, n)
    return Share(int(a.sum() + b.sum()), 2 * int((a & b).sum()))


def _metric(eager: Arrays, lowered: Arrays, evaluation: Reference, n: int) -> Metric | None:
    known, task = evaluation.labelled[:n], evaluation.model.task
    if not known.any():
        return None
    truth, decided = evaluation.truth[:n][known], [task.decide(side["logits"])[known] for side in (eager, lowered)]
    before, after = (float(scores(truth, one, task.labels)[task.metric]) for one in decided)
    return Metric(task.metric, int(known.sum()), before, after)


def _experts(eager: Arrays, lowered: Arrays, name: Callable[[int], str]) -> tuple[tuple[Share, ...], tuple[Flip, ...]]:
    """The top expert of every sample and layer."""
    if "routing" not in lowered:
        return (), ()
    a, b = (side["routing"].argmax(axis=-1) for side in (lowered, eager))  # (n, layers)
    flips = []
    for row, layer in np.argwhere(a != b).tolist():
        weights = eager["soft"][row, layer].astype(np.float64)  # (K,)
        chosen, ours = int(a[row, layer]), int(b[row, layer])
        margin = float(weights[ours] - weights[chosen])
        if margin <= _TIE:  # either is right
            a[row, layer] = ours
            continue
        flips.append(Flip(name(row), f"layer {layer}", f"expert {ours}", f"expert {chosen}", margin=margin))
    return tuple(Share(len(a), int(equal)) for equal in (a == b).sum(axis=0)), _largest(flips)


def _drift(eager: Arrays, lowered: Arrays) -> tuple[float, ...]:
    """Per layer, the mean share of the routing weight that went to other experts."""
    if "routing" not in lowered:
        return ()
    moved = np.abs(lowered["routing"].astype(np.float64) - eager["routing"]).sum(axis=-1) / 2  # (n, layers)
    return tuple(moved.mean(axis=0).tolist())


def _selections(eager: Arrays, lowered: Arrays) -> tuple[Share, ...]:
    """The set of experts that top-k routing selected, in every layer; of experts that tie either is right."""
    if "routing" not in lowered:
        return ()
    same, tied = _selected(eager, lowered)  # (n, layers) each
    return tuple(Share(len(same), int(equal)) for equal in (same | tied).sum(axis=0))


def _largest(flips: list[Flip]) -> tuple[Flip, ...]:
    return tuple(sorted(flips, key=lambda flip: -flip.margin)[:_LISTED])
