"""The parity gate: the saved file against the untouched eager model. It fails closed.

The file is loaded fresh in ONNX Runtime; the reference is the trained model itself, never the rewrite that was traced.
Compared are names, dtypes, axes, shapes, values, predicted labels and, per layer, the router's scores, which experts
were selected, and every expert's table, selected or not (:mod:`export.gate.tables`). Scores that are scaled choose the
same expert under top-1 routing, whose weight is 1. They are compared as values all the same: that a fault in them keeps
their order for every input is nothing that any number of samples shows.

Values: max|a − b| / max|b| ≤ 1e-5 in float32 over at least 128 values; where float32 itself rounds more than that, the
file has to be as near to float64 as PyTorch is (:class:`export.gate.parity_report.Rounding`). Decisions: all equal,
except near-ties, whose two best candidates are no further apart than 10 × the error measured on the values; each is
counted and listed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.gate.cases import Case, generated_cases, sample_cases
from export.gate.device import Run, origin, run_checked
from export.gate.found import InterfaceCheck
from export.gate.inside import Inside
from export.gate.parity_report import CEILING, Decisions, NearTie, ParityReport, Rounding, ValueCheck
from export.gate.reference import Batch, eager_outputs, in_float64, largest_difference
from export.gate.tables import compare_tables
from export.graph.exporter_config import MoPEExporterConfig
from export.limits import MIN_VALUES
from mope_deploy.data import Sample
from mope_deploy.engines.onnxruntime.cpu import CpuSettings
from mope_deploy.files import reason
from mope_deploy.model import MoPE

__all__ = ["NEAR_TIE_FACTOR", "ParityGate", "measure"]

NEAR_TIE_FACTOR = 10.0
_NOTHING = 1e-30  # of a weight
_LISTED = 100  # near-ties and differences written out; all are counted

Array = NDArray[Any]
Arrays = dict[str, Array]


class ParityGate:
    """The gate for fp32, with its batches and the model's own outputs for them, which every graph is compared with.

    Args:
        model: the reference.
        config: of the canonical graph.
        samples: real ones to compare on, beside generated batches.
        seed: of the generated batches.
        cpu: how a device sets its session up; see :func:`export.gate.device.open_files`.
        on_step: called with a few words before each batch.
        on_report: called with each report, passed or not.

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
        cpu: CpuSettings | None = None,
        on_step: Callable[[str], None] = lambda _: None,
        on_report: Callable[[ParityReport], None] = lambda _: None,
    ) -> None:
        self.model = model
        self.cases = [*generated_cases(config.graph, seed=seed), *sample_cases(model.preprocessing, samples)]
        self.cpu, self.on_step, self.on_report = cpu, on_step, on_report
        self._eager = functools.cache(lambda case: eager_outputs(model, case.inputs))
        self.reports: dict[str, ParityReport] = {}

    def compare(self, name: str, file: Path, config: MoPEExporterConfig, parts: Sequence[Path] = ()) -> ParityReport:
        """Compare one file, or the ``parts`` and the main file of a graph, with the model and keep the report."""
        shown = self._shown(file.name)
        report = measure(self.model, file, config, shown, eager=self._eager, parts=parts, cpu=self.cpu)
        self.reports[name] = report
        self.on_report(report)
        return report

    def _shown(self, name: str) -> Iterator[Case]:
        for i, case in enumerate(self.cases, 1):
            self.on_step(f"comparing {name} with the model (batch {i} of {len(self.cases)})")
            yield case


def measure(
    model: MoPE,
    file: Path,
    config: MoPEExporterConfig,
    cases: Iterable[Case],
    *,
    eager: Callable[[Case], Arrays] | None = None,
    parts: Sequence[Path] = (),
    cpu: CpuSettings | None = None,
) -> ParityReport:
    """Run both sides on ``cases`` and compare everything. Never raises for a wrong file: it is in the report.

    Args:
        model: the trained model; left as it is, its training mode included.
        cases: the batches.
        eager: what ``model`` computes for a batch, to compute it once for several files.
        file, config, parts, cpu: see :func:`export.gate.device.open_files`; the report's hash is that of ``file``.
    """
    batches = (Batch(case, eager(case) if eager else eager_outputs(model, case.inputs)) for case in cases)
    runs, opened, ran = run_checked(file, config, batches, parts, cpu=cpu)
    header = origin(file, parts) | {"tolerance": config.tolerance}
    tied, selected, outputs = 0, 0, list(config.outputs)
    if runs and model.config.dynamic:
        runs, found, tied = _with_routers(runs, model, file, parts)
        ran.append(found)
        outputs.append("scores")
        selected = int(np.any([(run.exported["mixture"] > 0).any(axis=0) for run in runs], axis=0).sum()) if runs else 0
    header["interface"] = (*opened, *ran)
    if not runs:
        return ParityReport(**header, batches=(), values=(), decisions=())
    sources = dict.fromkeys(run.case.source for run in runs)
    values = [_values(runs, output, source, config.tolerance) for output in outputs for source in sources]
    values = _with_rounding(values, runs, model)
    decisions = [_labels(runs, model, NEAR_TIE_FACTOR * _measured(values, "logits"))]
    if "scores" in outputs:
        decisions.append(_experts(runs, NEAR_TIE_FACTOR * _measured(values, "scores")))
    return ParityReport(
        **header,
        batches=tuple((run.case.name, run.case.source) for run in runs),
        values=tuple(values),
        decisions=tuple(decisions),
        tied=tied,
        tables=compare_tables(model, file, parts),
        selected=selected,
    )


def _with_routers(
    runs: Sequence[Run], model: MoPE, file: Path, parts: Sequence[Path]
) -> tuple[list[Run], InterfaceCheck, int]:
    """The runs with what the file's routers did inside, and in how many rows they selected other experts.

    ``scores`` and ``selected`` are as :class:`export.gate.inside.Inside` has them, ``mixture`` (B, layers, K) what the
    experts count. Where the file selected other experts than the model, the model is asked what it computes with
    those: between equals both are right, and neither says anything about the values.
    """
    try:
        inside = Inside(file, parts)
        seen = [inside(run.case.inputs) for run in runs]
    except Exception as error:  # ONNX Runtime raises many classes
        return [], InterfaceCheck("looking at the routers", reason(error), "their scores"), 0
    found = InterfaceCheck("layers whose router was found", str(len(inside.layers)), str(model.main.depth))
    if not found.passed:
        return [], found, 0
    made, tied = [], 0
    for run, routers in zip(runs, seen, strict=True):
        exported = run.exported | routers
        exported["mixture"] = run.exported.get("routing", _mixture(**routers))
        eager, rows = (
            dict(run.eager),
            (_taking_part(run.eager["routing"]) != _taking_part(_mixture(**routers))).any((1, 2)),
        )
        if rows.any():
            inputs = {name: array[rows] for name, array in run.case.inputs.items()}
            again = eager_outputs(model, inputs, selected=routers["selected"][rows])
            eager = {name: array.copy() for name, array in eager.items()}
            for name, array in again.items():
                eager[name][rows] = array
        tied += int(rows.sum())
        made.append(Run(run.case, eager, exported))
    return made, found, tied


def _mixture(scores: Array, selected: Array) -> Array:
    """The weights that scores (B, layers, K) give to the selected experts."""
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True, initial=-np.inf, where=selected)) * selected
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def _taking_part(weights: Array) -> Array:
    """Which experts count at all: what is left of a weight beside the smallest floats is up to each library."""
    return weights > _NOTHING


def _values(runs: Sequence[Run], output: str, source: str, tolerance: float) -> ValueCheck:
    """The largest error of ``output`` over every batch from ``source``; NaN stays NaN."""
    count, largest, scale, worst = 0, 0.0, 0.0, ""
    for run in runs:
        if run.case.source != source:
            continue
        b = run.eager[output]
        error = largest_difference(run.exported[output], b)
        if not worst or error > largest or np.isnan(error):  # once NaN, it stays
            largest, worst = error, run.case.name
        count += b.size
        scale = max(scale, float(np.abs(b).max(initial=0.0)))
    # A small data set is compared as a whole; the generated batches have the full count in any case.
    enough = MIN_VALUES if source == "generated" else min(MIN_VALUES, count)
    return ValueCheck(output, source, count, enough, largest, scale, tolerance, worst)


def _with_rounding(values: Sequence[ValueCheck], runs: Sequence[Run], model: MoPE) -> list[ValueCheck]:
    """``values`` with both sides' distance from float64, where the tolerance was missed by no more than rounding may.

    Pooled over all batches. float64 mixes the experts that the file selected.
    """
    if not any(not check.within and check.error <= CEILING for check in values):
        return list(values)
    twin = in_float64(model)
    distances: dict[str, list[tuple[float, float]]] = {check.output: [] for check in values}
    for run in runs:
        selected = run.exported.get("selected")
        exact = eager_outputs(twin, run.case.inputs, selected=selected)
        for row in range(run.case.batch):
            for name, pairs in distances.items():
                exported, eager = (side[name][row] for side in (run.exported, run.eager))
                pairs.append(
                    (largest_difference(exported, exact[name][row]), largest_difference(eager, exact[name][row]))
                )
    return [
        check if check.within else replace(check, rounding=_rounding(check, distances[check.output]))
        for check in values
    ]


def _rounding(check: ValueCheck, rows: Sequence[tuple[float, float]]) -> Rounding | None:
    """What (file, PyTorch) distances from float64, a pair per row, say about one check."""
    if not rows:
        return None
    exported, eager = np.array(rows).T / check.scale  # (rows,) each
    # Where a softmax is saturated both sides are exact; half a unit in the last place keeps such ratios at 1.
    ratio = (exported + 2**-25) / (eager + 2**-25)
    beyond = exported + eager > check.tolerance  # the rows that can have missed it
    return Rounding(
        eager=float(eager.max()),
        exported=float(exported.max()),
        typical=float(np.exp(np.log(ratio).mean())),
        worst=float((exported[beyond] / np.maximum(eager[beyond], eager.mean())).max(initial=0.0)),
    )


def _measured(values: Sequence[ValueCheck], output: str) -> float:
    """max|a − b| of one output, at most what could still pass: a gross error makes no decision a near-tie."""
    return max(min(check.max_abs_error, CEILING * check.scale) for check in values if check.output == output)


def _labels(runs: Sequence[Run], model: MoPE, limit: float) -> Decisions:
    """Everything that is decided about every row."""
    made = []
    for run in runs:
        for row in range(run.case.batch):
            eager, exported = (model.task.verdicts(side["logits"][row]) for side in (run.eager, run.exported))
            for (where, ours, gap), (_, theirs, _) in zip(eager, exported, strict=True):
                made.append(NearTie(run.case.name, row, where, ours, theirs, gap, limit))
    return _decisions("labels", made)


def _experts(runs: Sequence[Run], limit: float) -> Decisions:
    """The top expert of every row and layer and, under top-k routing, the set of experts that were selected.

    A layer behind another selection sees another x, and so does the model's, which was given the same selection.
    """
    made = []
    for run in runs:
        scores, mixture, selected = run.eager["scores"], run.exported["mixture"], run.exported["selected"]
        for row, layer in np.ndindex(*scores.shape[:2]):
            own, count = scores[row, layer], int(selected[row, layer].sum())  # (K,)
            gap = min(_gap(own, count), _gap(own, 1))
            soft = _mixture(own, np.ones(own.shape, bool))
            kept = np.isin(np.arange(len(own)), np.argsort(-soft, kind="stable")[:count])
            ours, theirs = (_choice(each, count < len(own)) for each in (_mixture(own, kept), mixture[row, layer]))
            made.append(NearTie(run.case.name, row, f"layer {layer}", ours, theirs, gap, limit))
    return _decisions("experts", made)


def _decisions(kind: str, made: Sequence[NearTie]) -> Decisions:
    near = [one for one in made if one.gap <= one.limit]
    faults = [one for one in made if one.eager != one.exported and not one.gap <= one.limit]
    return Decisions(
        kind=kind,
        compared=len(made),
        equal=sum(one.eager == one.exported for one in made),
        near_ties=len(near),
        different=len(faults),
        listed=tuple(near[:_LISTED]),
        faults=tuple(faults[:_LISTED]),
    )


def _choice(weights: Array, selecting: bool) -> str:
    """The top expert and, where experts are selected, behind it the others that were."""
    top = int(weights.argmax())
    others = [str(k) for k in np.flatnonzero(_taking_part(weights)) if k != top] if selecting else []
    return f"expert {top}" + (f" with {', '.join(others)}" if others else "")


def _gap(scores: Array, k: int) -> float:
    """By how much the k-th largest score exceeds the next one; infinite if there is no next one."""
    if len(scores) <= k:
        return np.inf
    ordered = np.sort(scores.astype(np.float64))[::-1]
    return float(ordered[k - 1] - ordered[k])
