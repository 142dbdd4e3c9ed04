"""The parity gate: the saved file against the untouched eager model. It fails closed.

The file is loaded fresh in ONNX Runtime; the reference is the trained model itself, never the rewrite that was traced.
Compared are names, dtypes, axes, shapes, values, predicted labels and, per layer, which expert counts most.

Values: max|a − b| / max|b| ≤ 1e-5 in float32 over at least 128 values; where float32 itself rounds more than that, the
file has to be as near to float64 as PyTorch is (:class:`export.gate.parity_report.Rounding`). Decisions: all equal,
except near-ties, whose two best candidates are no further apart than 10 × the error measured on the values; each is
counted and listed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.gate.cases import Case, generated_cases, sample_cases
from export.gate.device import Run, origin, run_checked
from export.gate.parity_report import CEILING, Decisions, NearTie, ParityReport, Rounding, ValueCheck
from export.gate.reference import Batch, eager_outputs, in_float64, largest_difference
from export.graph.exporter_config import MoPEExporterConfig
from export.limits import MIN_VALUES
from mope_deploy.data import Sample
from mope_deploy.engines.onnxruntime.cpu import CpuSettings
from mope_deploy.model import MoPE

__all__ = ["NEAR_TIE_FACTOR", "ParityGate", "measure"]

NEAR_TIE_FACTOR = 10.0
KEPT_SHARE = 0.8  # of the samples: more near-ties than that set aside would leave nothing compared
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
    header = origin(file, parts) | {"tolerance": config.tolerance, "interface": (*opened, *ran)}
    if not runs:
        return ParityReport(**header, batches=(), values=(), decisions=(), set_aside=0)
    top_k = model.config.top_k if "routing" in config.outputs else 0
    keep = [_same_experts(run.eager, run.exported, top_k) for run in runs]
    sources = dict.fromkeys(run.case.source for run in runs)
    values = [_values(runs, keep, output, source, config.tolerance) for output in config.outputs for source in sources]
    values = _with_rounding(values, runs, keep, model, top_k)
    decisions = [_labels(runs, keep, model, NEAR_TIE_FACTOR * _measured(values, "logits"))]
    if "routing" in config.outputs:
        error = _measured(values, "routing")
        if top_k:
            # One expert kept has the weight 1 exactly; how far its scores are off shows in the logits alone.
            error = max(error, *(min(check.error, CEILING) for check in values))
        decisions.append(_experts(runs, top_k, NEAR_TIE_FACTOR * error))
    return ParityReport(
        **header,
        batches=tuple((run.case.name, run.case.source) for run in runs),
        values=tuple(values),
        decisions=tuple(decisions),
        set_aside=sum(int((~rows).sum()) for rows in keep),
    )


def _values(runs: Sequence[Run], keep: Sequence[Array], output: str, source: str, tolerance: float) -> ValueCheck:
    """The largest error of ``output`` over the kept rows of every batch from ``source``; NaN stays NaN."""
    count, given, largest, scale, worst = 0, 0, 0.0, 0.0, ""
    for run, rows in zip(runs, keep, strict=True):
        if run.case.source != source:
            continue
        b = run.eager[output][rows]
        error = largest_difference(run.exported[output][rows], b)
        if not worst or error > largest or np.isnan(error):  # once NaN, it stays
            largest, worst = error, run.case.name
        count += b.size
        given += run.eager[output].size
        scale = max(scale, float(np.abs(b).max(initial=0.0)))
    # A small data set is compared as a whole; the generated batches have the full count in any case.
    enough = MIN_VALUES if source == "generated" else min(MIN_VALUES, math.ceil(given * KEPT_SHARE))
    return ValueCheck(output, source, count, enough, largest, scale, tolerance, worst)


def _with_rounding(
    values: Sequence[ValueCheck], runs: Sequence[Run], keep: Sequence[Array], model: MoPE, top_k: int
) -> list[ValueCheck]:
    """``values`` with both sides' distance from float64, where the tolerance was missed by no more than rounding may.

    Pooled over all batches; rows that float64 routes to other experts are left out.
    """
    if not any(not check.within and check.error <= CEILING for check in values):
        return list(values)
    twin = in_float64(model)
    distances: dict[str, list[tuple[float, float]]] = {check.output: [] for check in values}
    for run, kept in zip(runs, keep, strict=True):
        exact = eager_outputs(twin, run.case.inputs)
        for row in np.flatnonzero(kept & _same_experts(exact, run.eager, top_k)).tolist():
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


def _labels(runs: Sequence[Run], keep: Sequence[Array], model: MoPE, limit: float) -> Decisions:
    """Everything that is decided about every kept row."""
    made = []
    for run, rows in zip(runs, keep, strict=True):
        for row in np.flatnonzero(rows).tolist():
            eager, exported = (model.task.verdicts(side["logits"][row]) for side in (run.eager, run.exported))
            for (where, ours, gap), (_, theirs, _) in zip(eager, exported, strict=True):
                made.append(NearTie(run.case.name, row, where, ours, theirs, gap, limit))
    return _decisions("labels", made)


def _experts(runs: Sequence[Run], top_k: int, limit: float) -> Decisions:
    """The top expert of every row and layer and, under top-k routing, the set of experts that were selected.

    Once a row's selection differs in a layer, its later layers see another x: they are not compared.
    """
    made = []
    for run in runs:
        eager, exported, soft = run.eager["routing"], run.exported["routing"], run.eager["soft"]  # (B, layers, K)
        for row in range(run.case.batch):
            for layer in range(eager.shape[1]):
                e, x = eager[row, layer], exported[row, layer]
                gap = _gap(e, 1)
                if top_k:
                    gap = min(_gap(soft[row, layer], top_k), gap if top_k > 1 else np.inf)
                ours, theirs = _choice(e, top_k), _choice(x, top_k)
                made.append(NearTie(run.case.name, row, f"layer {layer}", ours, theirs, gap, limit))
                if top_k and ((e > 0) != (x > 0)).any():
                    break
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


def _choice(weights: Array, top_k: int) -> str:
    """The top expert, and behind it the others that were selected."""
    top = int(weights.argmax())
    others = [str(k) for k in np.flatnonzero(weights > 0) if k != top] if top_k > 1 else []
    return f"expert {top}" + (f" with {', '.join(others)}" if others else "")


def _same_experts(a: Arrays, b: Arrays, top_k: int) -> Array:
    """(B,): rows for which both sides selected the same experts everywhere, so that their values can be compared."""
    if not top_k:
        return np.ones(len(a["logits"]), bool)
    return ((a["routing"] > 0) == (b["routing"] > 0)).all(axis=(1, 2))


def _gap(scores: Array, k: int) -> float:
    """By how much the k-th largest score exceeds the next one; infinite if there is no next one."""
    if len(scores) <= k:
        return np.inf
    ordered = np.sort(scores.astype(np.float64))[::-1]
    return float(ordered[k - 1] - ordered[k])
