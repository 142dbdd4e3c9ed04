"""Repair of a file that its precision broke: the fewest layers that have to stay in float32 for the gate to pass."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from export.gate import PrecisionReport, hashes
from export.gate.found import json_safe
from export.precision.lower import Lowering
from mope_deploy.errors import ExportError, ParityError, UsageError

__all__ = ["ATTEMPTS", "QUICK", "Attempt", "Lowered", "lower_within_gate"]

ATTEMPTS = 12  # choices that are judged on all samples
QUICK = 96  # samples that layers are ranked on

Judge = Callable[[Path, int | None], PrecisionReport]
Choice = tuple[tuple[str, ...], PrecisionReport]  # what is kept, the worst first, and the gate's report


@dataclass(frozen=True)
class Attempt:
    """One file that was written and judged.

    Attributes:
        lowered: the part that was lowered alone, to see what it costs; None for a choice, judged on all samples.
        kept: layers and products that were left in float32 by a choice; of a part lowered alone all others were.
        samples: it was judged on.
        logits: relative RMS error of the logits; NaN if anything was not finite.
        drift: share of the routing weight that went to other experts; None without routing.
        labels: share of equal predictions.
        routing: share of equal top experts; None without routing.
        passed: the gate.
    """

    lowered: str | None
    kept: tuple[str, ...]
    samples: int
    logits: float
    drift: float | None
    labels: float
    routing: float | None
    passed: bool

    @property
    def damage(self) -> str:
        """In words: how far off the file is."""
        if not math.isfinite(self.logits):
            return "gives NaN or infinities"
        routing = f" and {_percent(self.drift)} of the routing" if self.drift and self.drift >= 5e-5 else ""
        return f"changes the logits by {_percent(self.logits)}{routing}"


@dataclass(frozen=True)
class Lowered:
    """Final files that passed the gate.

    Attributes:
        files: as written, the graph first.
        kept: encoder layers, or single linear layers of them, left in float32; in graph order.
        report: the gate's, on all samples, of this choice.
        history: every attempt in order.
        sha256: of every file that was judged, by name: of ``files`` or, of emulated precisions, of their copy.
    """

    files: tuple[Path, ...]
    kept: tuple[str, ...]
    report: PrecisionReport
    history: tuple[Attempt, ...]
    sha256: Mapping[str, str] = field(default_factory=dict)

    def explain(self) -> str:
        """What was kept and why, in one line for a terminal; empty if nothing was."""
        if not self.kept:
            return ""
        alone = {attempt.lowered: attempt.damage for attempt in self.history if attempt.lowered is not None}
        parts = [f"{name} (lowered alone it {alone[name]})" if name in alone else name for name in self.kept]
        first, tried = self.history[0], sum(attempt.lowered is None for attempt in self.history)
        routing = "" if first.routing is None else f" and {100 * first.routing:.2f} % of the top experts"
        return (
            f"kept in fp32: {', '.join(parts)}; without, {100 * first.labels:.2f} % of the labels{routing} agree; "
            f"{tried} choices tried"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: what was kept and every attempt."""
        return json_safe({"kept": list(self.kept), "attempts": [asdict(attempt) for attempt in self.history]})


def lower_within_gate(
    lowering: Lowering,
    judge: Judge,
    folder: Path,
    name: str,
    *,
    attempts: int = ATTEMPTS,
    quick: int = QUICK,
    on_step: Callable[[str], None] = lambda _: None,
) -> Lowered:
    """Write a lowered file that passes the gate, with as little of it left in float32 as was found to do.

    Everything is lowered first. If that fails:

    1. Layers are ranked by what each costs when *it alone is lowered*, on a few samples. The other way round, keeping
       one layer and lowering all others, says little once two layers are bad: whichever is kept, the other one spoils
       the result, and after a NaN all choices look the same. Alone, a layer's damage is its own.
       Counted is what the gate failed on: the error of the logits if labels or the metric did, the routing weight that
       went to other experts if routing did, each as a share of what lowering everything does to it; both where anything
       was not finite. Both are measured, not counted: on a few samples hardly any label or expert flips.
    2. The worst one, two, four, … are kept until the gate passes on *all* samples, then bisection finds the fewest:
       k layers, where k − 1 were seen to fail.
    3. The same with the linear layers of those layers, which are a smaller part of the file.
    4. Of what remains, each is tried without: it may have been in front of the one that mattered.

    Every choice that is returned passed on all samples, and the graph returned is the one that was judged, to the byte
    (except for emulated precisions, which cannot run here).

    Args:
        lowering: writes the file with any layers left in float32.
        judge: a file and a limit on samples → the gate's report.
        folder: where the final files go; nothing is written there before a choice passed.
        name: of the graph's file.
        attempts: choices that may be judged on all samples; ranking is not counted.
        quick: samples to rank with.
        on_step: called with a few words before each attempt.

    Raises:
        UsageError: fewer than one attempt.
        ParityError: no choice passed within ``attempts``, or none that leaves any layer lowered; with what was tried.
        ExportError: a file could not be written as asked.
    """
    if attempts < 1:
        raise UsageError("attempts to find a file that passes", received=attempts, expected="at least 1")
    search = _Search(lowering, judge, name, attempts, quick, on_step)
    kept, report = search.find()
    on_step(f"writing {name}")
    files = lowering.write(folder / name, keep=kept)
    judged = search.written[kept]
    if lowering.runtime_mark != "emulated" and hashes(files) != judged:
        for file in files:
            file.unlink()
        raise ExportError(f"{name} was written twice and differs", expected="the file that was judged")
    return Lowered(tuple(files), kept, report, tuple(search.history), judged)


@dataclass
class _Search:
    """See :func:`lower_within_gate`."""

    lowering: Lowering
    judge: Judge
    name: str
    attempts: int
    quick: int
    on_step: Callable[[str], None]
    history: list[Attempt] = field(default_factory=list)
    first: PrecisionReport | None = None  # of everything lowered
    last: PrecisionReport | None = None
    written: dict[tuple[str, ...], dict[str, str]] = field(default_factory=dict)  # hashes of what was judged

    @property
    def tried(self) -> list[Attempt]:
        """The choices, judged on all samples."""
        return [attempt for attempt in self.history if attempt.lowered is None]

    @property
    def left(self) -> int:
        return self.attempts - len(self.tried)

    def find(self) -> Choice:
        """What to keep, in graph order, and the report of that choice."""
        best = self.choice(())
        if best is None:
            best = self.without_the_needless(self.products_instead(self.fewest_layers()))
        kept, report = best
        return self.in_graph_order(kept), report

    def fewest_layers(self) -> Choice:
        """The shortest beginning of the ranking of all layers that passes."""
        if not self.left:
            raise self.gave_up()
        ranked = self.ranked(self.lowering.layers, self.lowering.layers)
        found = self.shortest(ranked[:-1])  # all of them would be float32 under another name
        if found is None:
            raise self.gave_up()
        return found

    def products_instead(self, best: Choice) -> Choice:
        """The fewest linear layers of the kept layers, the worst first; the layers themselves if that does not do."""
        unfit = self.lowering.unfit  # kept whatever is chosen, so there is nothing to find out about them
        products = [product for layer in best[0] for product in self.lowering.products(layer) if product not in unfit]
        if not self.left or len(products) < 2:
            return best
        others = [layer for layer in self.lowering.layers if layer not in best[0]]
        return self.shortest(self.ranked(products, [*others, *products])[:-1], otherwise=best) or best

    def without_the_needless(self, best: Choice) -> Choice:
        """Leave out what the gate does not miss, the least costly first; the last of all is known to be needed."""
        for name in reversed(best[0][:-1]):
            if self.left:
                best = self.choice([other for other in best[0] if other != name]) or best
        return best

    def shortest(self, ranked: Sequence[str], *, otherwise: Choice | None = None) -> Choice | None:
        """The shortest beginning of ``ranked`` that passes, ``otherwise`` if none was found.

        Raises:
            ParityError: there was no attempt left, and nothing else.
        """
        failed, passed = 0, None
        while passed is None:
            if failed == len(ranked) or (otherwise is not None and not self.left):
                return otherwise
            count = min(max(1, 2 * failed), len(ranked))
            passed = self.choice(ranked[:count])
            failed = count if passed is None else failed
        while len(passed[0]) - failed > 1 and self.left:
            middle = (len(passed[0]) + failed) // 2
            found = self.choice(ranked[:middle])
            failed, passed = (middle, passed) if found is None else (failed, found)
        return passed

    def ranked(self, parts: Sequence[str], everything: Collection[str]) -> list[str]:
        """``parts`` by what each costs with only it lowered, the worst first; equals stay in graph order."""
        costs: dict[str, float] = {}
        for i, part in enumerate(parts, 1):
            self.on_step(f"finding what breaks {self.name}: {part} alone ({i} of {len(parts)})")
            others = [name for name in everything if name != part]
            costs[part] = self.cost(self.judged(others, self.quick, lowered=part))
        return sorted(parts, key=lambda part: -costs[part])

    def cost(self, report: PrecisionReport) -> float:
        """See :func:`lower_within_gate`; infinite where anything is not finite."""
        assert self.first is not None
        if not report.ran or not report.finite:
            return math.inf
        logits, drift = _damage(report)
        if not self.first.finite:
            return logits + drift
        all_logits, all_drift = _damage(self.first)
        found = 0.0
        if not (self.first.labels_passed and self.first.metric_passed) and all_logits:
            found += logits / all_logits
        if not self.first.routing_passed and all_drift:
            found += drift / all_drift
        return math.inf if math.isnan(found) else found

    def choice(self, kept: Sequence[str]) -> Choice | None:
        """``kept`` with its report if it passes on all samples; None if it does not.

        Raises:
            ParityError: if there is no attempt left, or nothing that could be repaired.
        """
        if not self.left:
            raise self.gave_up()
        what = f"keeping {len(kept)} in fp32" if kept else "everything lowered"
        self.on_step(f"{self.name}: {what} (attempt {len(self.tried) + 1} of at most {self.attempts})")
        self.last = report = self.judged(kept, None)
        self.first = self.first or report
        if not report.ran:
            raise self.gave_up()
        return (tuple(kept), report) if report.passed else None

    def judged(self, kept: Collection[str], limit: int | None, *, lowered: str | None = None) -> PrecisionReport:
        """The gate's report on one file, noted in the history; of a part ``lowered`` alone, or else of a choice."""
        with tempfile.TemporaryDirectory(prefix="mope-lower-") as folder:
            files = self.lowering.write_runnable(Path(folder) / self.name, keep=tuple(kept))
            self.written[self.in_graph_order(kept)] = hashes(files)
            report = self.judge(Path(folder) / self.name, limit)
        routed = bool(report.experts)
        self.history.append(
            Attempt(
                lowered=lowered,
                kept=self.in_graph_order(kept) if lowered is None else (),
                samples=report.samples,
                logits=report.logits.rms,
                drift=_damage(report)[1] if routed else None,
                labels=report.labels.share,
                routing=report.routing.share if routed else None,
                passed=report.passed,
            )
        )
        return report

    def in_graph_order(self, kept: Collection[str]) -> tuple[str, ...]:
        order = [name for layer in self.lowering.layers for name in (layer, *self.lowering.products(layer))]
        return tuple(sorted(kept, key=order.index))

    def gave_up(self) -> ParityError:
        """What was tried, and what the last attempt was missing."""
        assert self.last is not None
        problems = "; ".join(self.last.problems()[:4])
        precision, tried = self.lowering.precision, self.tried
        most = max(tried, key=lambda attempt: len(attempt.kept))
        if not most.kept:
            return ParityError(f"{self.name} does not pass in {precision}: {problems}")
        return ParityError(
            f"{self.name} does not pass in {precision}, even with {len(most.kept)} of "
            f"{len(self.lowering.layers)} layers kept in fp32 ({', '.join(most.kept[:4])}"
            f"{', …' if len(most.kept) > 4 else ''}): {problems}",
            received=f"{len(tried)} choices tried, none good enough",
            todo="export another precision, or accept less: --threshold labels=…,routing=…,metric=…,probability=…,logits=…",
        )


def _damage(report: PrecisionReport) -> tuple[float, float]:
    """Relative RMS error of the logits, and the mean over layers of the routing weight that moved."""
    return report.logits.rms, (sum(report.drift) / len(report.drift) if report.drift else 0.0)


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.995 else f"{100 * share:.0f} %"
