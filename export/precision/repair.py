"""Repair of a file that its precision broke: the fewest layers that have to stay in float32 for the gate to pass."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from export.gate import PrecisionReport, hashes
from export.gate.found import json_safe
from export.limits import REPAIR_MINUTES
from export.precision.lower import Lowering
from mope_deploy.errors import ExportError, ParityError, UsageError

__all__ = ["ATTEMPTS", "Attempt", "Lowered", "lower_within_gate"]

ATTEMPTS = 32  # choices that are judged on all samples; time ends the search of a large model before

Judge = Callable[[Path], PrecisionReport]
Feeds = Iterable[Mapping[str, NDArray[Any]]]
Choice = tuple[tuple[str, ...], PrecisionReport]  # what is kept, the worst first, and the gate's report


@dataclass(frozen=True)
class Attempt:
    """One file that was written and judged.

    Attributes:
        kept: layers and products that were left in float32.
        samples: it was judged on.
        logits: relative RMS error of the logits; NaN if anything was not finite.
        drift: share of the routing weight that went to other experts; None without routing.
        labels: share of equal predictions.
        routing: share of equal top experts; None without routing.
        passed: the gate.
    """

    kept: tuple[str, ...]
    samples: int
    logits: float
    drift: float | None
    labels: float
    routing: float | None
    passed: bool


@dataclass(frozen=True)
class Lowered:
    """Final files that passed the gate.

    Attributes:
        files: as written, the graph first.
        kept: encoder layers, or single linear layers of them, left in float32; in graph order.
        report: the gate's, on all samples, of this choice.
        history: every attempt in order.
        sha256: of every file that was judged, by name: of ``files`` or, of emulated precisions, of their copy.
        errors: how far the output of each layer and product is off by itself; empty where nothing had to be repaired.
    """

    files: tuple[Path, ...]
    kept: tuple[str, ...]
    report: PrecisionReport
    history: tuple[Attempt, ...]
    sha256: Mapping[str, str] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)

    def explain(self) -> str:
        """What was kept and why, in one line for a terminal; empty if nothing was."""
        if not self.kept:
            return ""
        parts = [f"{name} ({_damage(self.errors[name])})" if name in self.errors else name for name in self.kept]
        first, tried = self.history[0], len(self.history)
        routing = "" if first.routing is None else f" and {100 * first.routing:.2f} % of the top experts"
        return (
            f"kept in fp32: {', '.join(parts)}; without, {100 * first.labels:.2f} % of the labels{routing} agree; "
            f"{tried} choices tried"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: what was kept and every attempt."""
        attempts = [asdict(attempt) for attempt in self.history]
        return json_safe({"kept": list(self.kept), "attempts": attempts, "own_errors": dict(self.errors)})


def lower_within_gate(
    lowering: Lowering,
    judge: Judge,
    folder: Path,
    name: str,
    *,
    feeds: Callable[[], Feeds],
    attempts: int = ATTEMPTS,
    minutes: float = REPAIR_MINUTES,
    on_step: Callable[[str], None] = lambda _: None,
    on_notice: Callable[[str], None] = lambda _: None,
) -> Lowered:
    """Write a lowered file that passes the gate, with as little of it left in float32 as was found to do.

    Everything is lowered first. If that fails:

    1. Layers are ranked by how far their own output is off, all in one pass over calibration samples
       (:mod:`export.precision.ranking`): lowering each layer by itself and judging that took 120 files on a small pair
       of encoders. What a layer's damage does to the labels is found out by the choices that follow.
    2. The worst one, two, four, … are kept until the gate passes on *all* samples, then bisection finds the fewest:
       k layers, where k − 1 were seen to fail.
    3. The same with linear layers, the worst of any layer first and fewer than those layers have: a smaller part of
       the file, and some product of a good layer may be among the worst.
    4. Of what remains, each is tried without: it may have been in front of the one that mattered.

    The search ends after so many choices or minutes, whichever comes first, or when it is interrupted (Ctrl-C); then
    the best choice so far is taken if there is one. How long it may take is said before it starts.

    Every choice that is returned passed on all samples, and the graph returned is the one that was judged, to the byte
    (except for emulated precisions, which cannot run here).

    Args:
        lowering: writes the file with any layers left in float32.
        judge: a file → the gate's report, on all samples.
        folder: where the final files go; nothing is written there before a choice passed.
        name: of the graph's file.
        feeds: real samples to rank layers on, as arrays by input name, batch by batch.
        attempts: choices that may be judged.
        minutes: that the search may take, once the first file was judged.
        on_step: called with a few words before each attempt.
        on_notice: called with what a user should see: that there is a search, how long it may take, how it ended.

    Raises:
        UsageError: fewer than one attempt, or no time.
        ParityError: no choice passed within these limits, or none that leaves any layer lowered; with what was tried.
        KeyboardInterrupt: before any choice passed.
        ExportError: a file could not be written as asked.
    """
    if attempts < 1:
        raise UsageError("attempts to find a file that passes", received=attempts, expected="at least 1")
    if not minutes > 0:
        raise UsageError("minutes to find a file that passes", received=minutes, expected="more than 0")
    search = _Search(lowering, judge, name, feeds, attempts, minutes, on_step, on_notice)
    kept, report = search.find()
    on_step(f"writing {name}")
    files = lowering.write(folder / name, keep=kept)
    judged = search.written[kept]
    if lowering.runtime_mark != "emulated" and hashes(files) != judged:
        for file in files:
            file.unlink()
        raise ExportError(f"{name} was written twice and differs", expected="the file that was judged")
    return Lowered(tuple(files), kept, report, tuple(search.history), judged, search.errors)


@dataclass
class _Search:
    """See :func:`lower_within_gate`."""

    lowering: Lowering
    judge: Judge
    name: str
    feeds: Callable[[], Feeds]
    attempts: int
    minutes: float
    on_step: Callable[[str], None]
    on_notice: Callable[[str], None]
    history: list[Attempt] = field(default_factory=list)
    last: PrecisionReport | None = None
    best: Choice | None = None  # the latest that passed: each is tried because it keeps less
    written: dict[tuple[str, ...], dict[str, str]] = field(default_factory=dict)  # hashes of what was judged
    errors: dict[str, float] = field(default_factory=dict)
    until: float = math.inf

    @property
    def left(self) -> int:
        """Choices that may still be judged."""
        return self.attempts - len(self.history) if time.monotonic() < self.until else 0

    def find(self) -> Choice:
        """What to keep, in graph order, and the report of that choice."""
        started = time.monotonic()
        best = self.choice(())
        if best is None:
            self.announce(time.monotonic() - started)
            try:
                best = self.without_the_needless(self.products_instead(self.fewest_layers()))
            except (KeyboardInterrupt, ParityError) as error:
                if self.best is None:
                    raise
                best = self.best  # time may also run out between two looks at the clock
                if isinstance(error, KeyboardInterrupt):
                    self.on_notice(f"interrupted: {self.name} keeps what was found, {len(best[0])} parts in fp32")
        kept, report = best
        return self.in_graph_order(kept), report

    def announce(self, seconds: float) -> None:
        """Say what will be done and how long it may take, from what one choice took."""
        self.until = time.monotonic() + 60 * self.minutes
        if not self.left:
            return
        assert self.last is not None
        most = min(self.left * seconds / 60, self.minutes)
        about = f"{math.ceil(60 * most)} s" if most < 1 else f"{math.ceil(most)} min"
        self.on_notice(
            f"{self.name} does not pass ({'; '.join(self.last.problems()[:1])}): looking for what has to stay in fp32, "
            f"at most {self.left} choices in {about} (--repair-minutes {self.minutes:g}); Ctrl-C keeps the best so far"
        )

    def fewest_layers(self) -> Choice:
        """The shortest beginning of the ranking of all layers that passes."""
        if not self.left:
            raise self.gave_up()
        self.measure()
        found = self.shortest(self.ranked(self.lowering.layers)[:-1])  # all would be float32 under another name
        if found is None:
            raise self.gave_up()
        return found

    def products_instead(self, best: Choice) -> Choice:
        """Fewer linear layers than the kept layers have, the worst of any layer first; those layers if none do."""
        unfit = self.lowering.unfit  # kept whatever is chosen, so there is nothing to find out about them
        of = {layer: [p for p in self.lowering.products(layer) if p not in unfit] for layer in self.lowering.layers}
        most = sum(len(of[layer]) for layer in best[0]) - 1
        if not self.left or most < 1:
            return best
        ranked = self.ranked([product for products in of.values() for product in products])
        return self.shortest(ranked[:most], otherwise=best) or best

    def without_the_needless(self, best: Choice) -> Choice:
        """Leave out what the gate does not miss, the least costly first; the last of all is known to be needed."""
        for name in reversed(best[0][:-1]):
            if self.left:
                best = self.choice([other for other in best[0] if other != name]) or best
        return best

    def measure(self) -> None:
        """How far the output of every product and layer is off by itself; a layer's errors add up as squares."""
        self.on_step(f"finding what each layer of {self.name} loses by itself")
        found = self.lowering.own_errors(self.feeds(), on_step=self.on_step)
        for layer in self.lowering.layers:
            parts = {name: found.get(name, 0.0) for name in self.lowering.products(layer)}
            self.errors |= parts | {layer: math.hypot(*parts.values())}

    def ranked(self, parts: Sequence[str]) -> list[str]:
        """``parts`` by what each loses by itself, the worst first; equals stay in graph order."""
        return sorted(parts, key=lambda part: -self.errors[part])

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

    def choice(self, kept: Sequence[str]) -> Choice | None:
        """``kept`` with its report if it passes on all samples; None if it does not.

        Raises:
            ParityError: if there is no attempt left, or nothing that could be repaired.
        """
        if not self.left:
            raise self.gave_up()
        what = f"keeping {len(kept)} in fp32" if kept else "everything lowered"
        self.on_step(f"{self.name}: {what} (attempt {len(self.history) + 1} of at most {self.attempts})")
        self.last = report = self.judged(kept)
        if not report.ran:
            raise self.gave_up()
        if not report.passed:
            return None
        self.best = (tuple(kept), report)
        return self.best

    def judged(self, kept: Collection[str]) -> PrecisionReport:
        """The gate's report on one file, noted in the history."""
        with tempfile.TemporaryDirectory(prefix="mope-lower-") as folder:
            files = self.lowering.write_runnable(Path(folder) / self.name, keep=tuple(kept))
            self.written[self.in_graph_order(kept)] = hashes(files)
            report = self.judge(Path(folder) / self.name)
        routed = bool(report.experts)
        self.history.append(
            Attempt(
                kept=self.in_graph_order(kept),
                samples=report.samples,
                logits=report.logits.rms,
                drift=sum(report.drift) / len(report.drift) if routed else None,
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
        precision, tried = self.lowering.precision, self.history
        most = max(tried, key=lambda attempt: len(attempt.kept))
        late = f" in {self.minutes:g} minutes" if time.monotonic() >= self.until else ""
        if not most.kept:
            return ParityError(f"{self.name} does not pass in {precision}: {problems}")
        return ParityError(
            f"{self.name} does not pass in {precision}, even with {len(most.kept)} of "
            f"{len(self.lowering.layers)} layers kept in fp32 ({', '.join(most.kept[:4])}"
            f"{', …' if len(most.kept) > 4 else ''}): {problems}",
            received=f"{len(tried)} choices tried{late}, none good enough",
            todo=f"export another precision, {'search longer (--repair-minutes), ' if late else ''}or accept less: "
            "--threshold labels=…,routing=…,metric=…,probability=…,"
            "mean_probability=…,logits=…",
        )


def _damage(error: float) -> str:
    """In words: how far off an output is."""
    if not math.isfinite(error):
        return "lowered alone it gives NaN or infinities"
    return f"lowered alone its own output is off by {100 * error:.2g} %"
