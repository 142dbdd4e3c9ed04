"""The parity gate: the saved file against the untouched eager model. It fails closed.

The file is loaded fresh in ONNX Runtime; the reference is the trained model itself, never the rewrite that was traced.
Compared are names, dtypes, axes, shapes, values, predicted labels and, per layer, which expert counts most.

Values: max|a − b| / max|b| ≤ 1e-5 in float32 over at least 128 values; where float32 itself rounds more than that, the
file has to be as near to float64 as PyTorch is (see :class:`export.gate.parity_report.Rounding`). Decisions: all equal, except
near-ties, whose two best candidates are no further apart than 10 × the error measured on the values; each is counted
and listed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from export.gate.cases import MIN_VALUES, Case
from export.gate.parity_report import CEILING, Decisions, InterfaceCheck, NearTie, ParityReport, Rounding, ValueCheck
from export.gate.reference import Reference, eager_outputs, in_float64, largest_difference
from export.gate.session import RUNTIME, GraphSession, open_graph, reason
from export.graph.exporter_config import MoPEExporterConfig
from mope_deploy.model import MoPE

__all__ = ["NEAR_TIE_FACTOR", "measure"]

NEAR_TIE_FACTOR = 10.0
KEPT_SHARE = 0.8  # of the samples: more near-ties than that set aside would leave nothing compared
_LISTED = 100  # near-ties and differences written out; all are counted

Array = NDArray[Any]
T = TypeVar("T")


def measure(
    model: MoPE,
    file: Path,
    config: MoPEExporterConfig,
    cases: Iterable[Case],
    *,
    minimum: int = MIN_VALUES,
    reference: Reference | None = None,
    parts: Sequence[Path] = (),
) -> ParityReport:
    """Run both sides on ``cases`` and compare everything. Never raises for a wrong file: it is in the report.

    Args:
        model: the trained model; left as it is, its training mode included.
        file: the graph as saved, loaded here from disk.
        config: what the graph was asked to be: inputs, outputs, axes, tolerance.
        cases: the batches.
        minimum: values that each output must be compared on, generated batches and samples each; of samples no more
            than there are.
        reference: of ``model``, to compute its outputs once for several files.
        parts: of a graph in several files the others; the report's hash is that of ``file``.
    """
    header: dict[str, Any] = {
        "file": " + ".join(path.name for path in (file, *parts)),
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "reference": "the eager model, PyTorch float32",
        "runtime": RUNTIME,
        "tolerance": config.tolerance,
    }
    reference = reference or Reference(model)
    session, interface = open_graph(file, config, parts)
    runs: list[_Run] = []
    for case in cases if session is not None else ():
        run, failures = _run(reference, session, case, tuple(config.outputs))
        interface += failures
        if run is None:
            break
        runs.append(run)
    if not runs or not all(check.passed for check in interface):
        return ParityReport(**header, batches=(), interface=tuple(interface), values=(), decisions=(), set_aside=0)
    top_k = model.config.top_k if "routing" in config.outputs else 0
    keep = [_kept(run, top_k) for run in runs]
    sources = dict.fromkeys(run.case.source for run in runs)
    values = [
        _values(runs, keep, output, source, config.tolerance, minimum)
        for output in config.outputs
        for source in sources
    ]
    if not all(check.within for check in values):
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
        interface=tuple(interface),
        values=tuple(values),
        decisions=tuple(decisions),
        set_aside=sum(int((~rows).sum()) for rows in keep),
    )


@dataclass(frozen=True)
class _Run:
    """Both sides' outputs for one batch; the eager side also has ``soft``, its scores before top-k selection."""

    case: Case
    eager: dict[str, Array]
    exported: dict[str, Array]


def _run(
    reference: Reference, session: GraphSession, case: Case, outputs: tuple[str, ...]
) -> tuple[_Run | None, list[InterfaceCheck]]:
    """Both sides on one batch, and whether the file's outputs have the eager model's dtypes and shapes."""
    eager = reference.outputs(case)
    try:
        exported = dict(zip(outputs, session.run(list(outputs), case.inputs), strict=True))
    except Exception as error:  # the library's own exceptions share no base class but this
        return None, [InterfaceCheck(f"running {case.name}", reason(error), "outputs")]
    checks = [
        InterfaceCheck(
            f"{name} of {case.name}",
            f"{exported[name].dtype} {exported[name].shape}",
            f"{eager[name].dtype} {eager[name].shape}",
        )
        for name in outputs
    ]
    return (_Run(case, eager, exported) if all(check.passed for check in checks) else None), checks


def _values(
    runs: Sequence[_Run], keep: Sequence[Array], output: str, source: str, tolerance: float, minimum: int
) -> ValueCheck:
    """The largest error of ``output`` over the kept rows of every batch from ``source``; NaN stays NaN."""
    count, given, largest, scale, worst = 0, 0, 0.0, 0.0, ""
    for run, rows in _of_source(zip(runs, keep, strict=True), source):
        b = run.eager[output][rows]
        error = largest_difference(run.exported[output][rows], b)
        if not worst or error > largest or np.isnan(error):  # once NaN, it stays
            largest, worst = error, run.case.name
        count += b.size
        given += run.eager[output].size
        scale = max(scale, float(np.abs(b).max(initial=0.0)))
    # A small data set is compared as a whole; the generated batches have the full count in any case.
    enough = minimum if source == "generated" else min(minimum, math.ceil(given * KEPT_SHARE))
    return ValueCheck(output, source, count, enough, largest, scale, tolerance, worst)


def _with_rounding(
    values: Sequence[ValueCheck], runs: Sequence[_Run], keep: Sequence[Array], model: MoPE, top_k: int
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
        rows = kept & ((exact["routing"] > 0) == (run.eager["routing"] > 0)).all(axis=(1, 2)) if top_k else kept
        for row in np.flatnonzero(rows).tolist():
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


def _of_source(pairs: Iterable[tuple[_Run, T]], source: str) -> Iterator[tuple[_Run, T]]:
    return ((run, other) for run, other in pairs if run.case.source == source)


def _measured(values: Sequence[ValueCheck], output: str) -> float:
    """max|a − b| of one output, at most what could still pass: a gross error makes no decision a near-tie."""
    return max(min(check.max_abs_error, CEILING * check.scale) for check in values if check.output == output)


def _labels(runs: Sequence[_Run], keep: Sequence[Array], model: MoPE, limit: float) -> Decisions:
    """The predicted label of every kept row; of multi-label models every label's yes or no."""
    names = model.config.labels
    judge = _Judge("labels", limit)
    for run, rows in zip(runs, keep, strict=True):
        eager, exported = run.eager["logits"], run.exported["logits"]  # (B, C)
        for row in np.flatnonzero(rows).tolist():
            if model.task.several:
                for c, name in enumerate(names):
                    verdicts = ["yes" if side[row, c] > 0 else "no" for side in (eager, exported)]
                    judge.add(run.case, row, f"label {name}", *verdicts, gap=abs(float(eager[row, c])))
            else:
                verdicts = [names[int(side[row].argmax())] for side in (eager, exported)]
                judge.add(run.case, row, "label", *verdicts, gap=float(_gap(eager[row], 1)))
    return judge.decisions()


def _experts(runs: Sequence[_Run], top_k: int, limit: float) -> Decisions:
    """The top expert of every row and layer and, under top-k routing, the set of experts that were selected.

    Once a row's selection differs in a layer, its later layers see another x: they are not compared.
    """
    judge = _Judge("experts", limit)
    for run in runs:
        eager, exported, soft = run.eager["routing"], run.exported["routing"], run.eager["soft"]  # (B, layers, K)
        for row in range(run.case.batch):
            for layer in range(eager.shape[1]):
                e, x = eager[row, layer], exported[row, layer]
                gap = float(_gap(e, 1))
                if top_k:
                    gap = min(float(_gap(soft[row, layer], top_k)), gap if top_k > 1 else np.inf)
                chosen = [_choice(side, top_k) for side in (e, x)]
                judge.add(run.case, row, f"layer {layer}", *chosen, gap=gap)
                if top_k and ((e > 0) != (x > 0)).any():
                    break
    return judge.decisions()


def _choice(weights: Array, top_k: int) -> str:
    """The top expert, and behind it the others that were selected."""
    top = int(weights.argmax())
    others = [str(k) for k in np.flatnonzero(weights > 0) if k != top] if top_k > 1 else []
    return f"expert {top}" + (f" with {', '.join(others)}" if others else "")


def _kept(run: _Run, top_k: int) -> Array:
    """(B,): rows whose values can be compared, that is, for which both sides selected the same experts everywhere."""
    if not top_k:
        return np.ones(run.case.batch, bool)
    return ~((run.eager["routing"] > 0) != (run.exported["routing"] > 0)).any(axis=(1, 2))


def _gap(scores: Array, k: int) -> float:
    """By how much the k-th largest score exceeds the next one; infinite if there is no next one."""
    if len(scores) <= k:
        return np.inf
    ordered = np.sort(scores.astype(np.float64))[::-1]
    return ordered[k - 1] - ordered[k]


class _Judge:
    """Counts decisions of one kind; see :class:`Decisions`."""

    def __init__(self, kind: str, limit: float) -> None:
        self.kind, self.limit = kind, limit
        self.compared = self.equal = self.near = self.different = 0
        self.listed: list[NearTie] = []
        self.faults: list[NearTie] = []

    def add(self, case: Case, row: int, where: str, eager: str, exported: str, *, gap: float) -> None:
        tie = NearTie(case.name, row, where, eager, exported, gap, self.limit)
        self.compared += 1
        self.equal += eager == exported
        if gap <= self.limit:
            self.near += 1
            self.listed += [tie] if len(self.listed) < _LISTED else []
        elif eager != exported:
            self.different += 1
            self.faults += [tie] if len(self.faults) < _LISTED else []

    def decisions(self) -> Decisions:
        return Decisions(
            kind=self.kind,
            compared=self.compared,
            equal=self.equal,
            near_ties=self.near,
            different=self.different,
            listed=tuple(self.listed),
            faults=tuple(self.faults),
        )
