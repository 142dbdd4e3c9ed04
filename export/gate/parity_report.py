"""What the parity gate found: every check with its verdict, as JSON, as a table, and as the figures of a manifest."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.table import Table

from export.gate.found import InterfaceCheck, Report, json_safe, require, table_of, verdict, wrong
from export.gate.tables import TableCheck, table_cells

__all__ = [
    "CEILING",
    "Decisions",
    "NearTie",
    "ParityReport",
    "Rounding",
    "ValueCheck",
    "require_parity",
]

CEILING = 1e-4  # relative; no rounding of float32 excuses more
TYPICAL_RATIO = 2.0  # how much farther from float64 than PyTorch the file may be on a typical row
WORST_RATIO = 10.0  # and on any one


@dataclass(frozen=True)
class Rounding:
    """How far both sides are from the same model in float64.

    float32 itself may lose more than the tolerance where a router is sharp: its scores are divided by τ before softmax.
    Then the file has to be as near to the truth as PyTorch is, row by row, since such rows differ widely in how much
    they magnify rounding.

    Attributes:
        eager, exported: max|· − float64| / max|b| over all rows.
        typical: geometric mean over rows of the file's largest distance over PyTorch's.
        worst: the largest ratio of any row that misses the tolerance, to PyTorch's distance there or on average.
    """

    eager: float
    exported: float
    typical: float
    worst: float

    @property
    def alike(self) -> bool:
        """Whether the file rounds as PyTorch does."""
        return self.typical <= TYPICAL_RATIO and self.worst <= WORST_RATIO


@dataclass(frozen=True)
class ValueCheck:
    """One output over all batches of one source.

    Passed if max|a − b| / max|b| is within the tolerance; or if it is within the ceiling and the file rounds as PyTorch
    does (:class:`Rounding`).

    Attributes:
        output: its name.
        source: ``"generated"`` or ``"samples"``.
        values: how many were compared.
        enough: how many there must be.
        max_abs_error: max|a − b|.
        scale: max|b|, b from the eager model.
        tolerance: allowed ``max_abs_error / scale``.
        worst: the batch that the largest error is from.
        rounding: measured only where the tolerance was not met.
    """

    output: str
    source: str
    values: int
    enough: int
    max_abs_error: float
    scale: float
    tolerance: float
    worst: str
    rounding: Rounding | None = None

    @property
    def error(self) -> float:
        """max|a − b| / max|b|."""
        return self.max_abs_error / self.scale if self.scale > 0 else (0.0 if self.max_abs_error == 0 else np.inf)

    @property
    def within(self) -> bool:
        """Whether the error is within the tolerance; NaN is not."""
        return self.error <= self.tolerance

    @property
    def earned(self) -> bool:
        """Whether an error beyond the tolerance is float32's own."""
        if self.within or self.rounding is None or not self.error <= CEILING:
            return False
        return self.rounding.alike

    @property
    def passed(self) -> bool:
        return self.values >= self.enough and (self.within or self.earned)


@dataclass(frozen=True)
class NearTie:
    """One decision that is near a tie, or that differs.

    Attributes:
        batch: name of the batch.
        row: of the batch.
        where: ``"label"``, a label's name, or ``"layer 3"``.
        eager, exported: what each side chose.
        gap: between the two best candidates of the eager model.
        limit: gaps up to this count as near-ties.
    """

    batch: str
    row: int
    where: str
    eager: str
    exported: str
    gap: float
    limit: float


@dataclass(frozen=True)
class Decisions:
    """Decisions of one kind.

    Attributes:
        kind: ``"labels"`` or ``"experts"``.
        compared: how many were compared.
        equal: how many are the same on both sides.
        near_ties: how many have a gap within the limit, equal or not.
        different: differing ones outside near-ties.
        listed: the near-ties, at most 100.
        faults: the differing ones outside near-ties, at most 100.
    """

    kind: str
    compared: int
    equal: int
    near_ties: int
    different: int
    listed: tuple[NearTie, ...]
    faults: tuple[NearTie, ...]

    @property
    def passed(self) -> bool:
        return self.different == 0


@dataclass(frozen=True)
class ParityReport(Report):
    """What the gate found; passed only if every part did.

    Attributes:
        file: name of the graph's file.
        sha256: of that file.
        reference: what it was compared with.
        batches: name and source of every batch.
        tied: samples for which the file selected other experts than the model, which is right only between near-ties;
            their values are compared with the model's for the experts that the file selected.
        tables: every expert and router, compared directly (:mod:`export.gate.tables`).
        selected: experts of all layers that some compared sample selected in the file.
    """

    file: str
    sha256: str
    reference: str
    runtime: str
    tolerance: float
    batches: tuple[tuple[str, str], ...]
    interface: tuple[InterfaceCheck, ...]
    values: tuple[ValueCheck, ...]
    decisions: tuple[Decisions, ...]
    tied: int = 0
    tables: tuple[TableCheck, ...] = ()
    selected: int = 0

    @property
    def experts(self) -> int:
        """Experts of all layers."""
        return sum(check.experts for check in self.tables if check.what.startswith("experts"))

    @property
    def max_error(self) -> float:
        """The largest relative error of any output."""
        return max((check.error for check in self.values), default=np.inf)

    def problems(self) -> list[str]:
        found = wrong(self.interface)
        for check in self.values:
            if check.values < check.enough:
                found.append(f"{check.output} on {check.source}: only {check.values} values of {check.enough} needed")
            elif not check.passed:
                found.append(
                    f"{check.output} on {check.source} differ by {check.error:.2g} of their scale, allowed "
                    f"{check.tolerance:.0e} (worst: {check.worst}{_off(check.rounding)})"
                )
        for decided in self.decisions:
            if not decided.passed:
                first = decided.faults[0]
                found.append(
                    f"{decided.different} of {decided.compared} {decided.kind} differ (first: {first.where} of row "
                    f"{first.row} of {first.batch}: {first.exported} for {first.eager})"
                )
        found += [str(check) for check in self.tables if not check.passed]
        if not self.decisions or not any(check.output == "logits" for check in self.values):
            found = found or ["nothing was compared"]
        return found

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, every check with its verdict."""
        document: dict[str, Any] = {"passed": self.passed, "problems": self.problems()} | dataclasses.asdict(self)
        document["batches"] = [{"name": name, "source": source} for name, source in self.batches]
        for entry, value in zip(document["values"], self.values, strict=True):
            entry |= {"error": value.error, "earned": value.earned}
        document["coverage"] = {"experts": self.experts, "selected": self.selected, "compared": self.experts}
        for kind in ("interface", "values", "decisions", "tables"):
            for entry, check in zip(document[kind], getattr(self, kind), strict=True):
                entry["passed"] = check.passed
        return json_safe(document)

    def figures(self) -> dict[str, float | str | bool]:
        """The few figures that a manifest shows."""
        found: dict[str, float | str | bool] = {"passed": self.passed, "tolerance": self.tolerance}
        for output in dict.fromkeys(check.output for check in self.values):
            checks = [check for check in self.values if check.output == output]
            found[f"{output}_max_relative_error"] = max(check.error for check in checks)
            found[f"{output}_values"] = sum(check.values for check in checks)
        for decided in self.decisions:
            found |= {f"{decided.kind}_{name}": getattr(decided, name) for name in ("compared", "equal", "near_ties")}
        if self.tables:
            found |= {"tables_compared": self.experts, "tables_selected_by_samples": self.selected}
        return found

    def table(self) -> Table:
        """For a terminal: one line a check."""
        table = table_of(f"{self.file} against {self.reference}", "allowed", self.interface)
        if not wrong(self.interface):
            table.add_row("names, dtypes, axes, shapes", f"{len(self.interface)}", "equal", "equal", verdict(True))
        for check in self.values:
            table.add_row(
                f"{check.output}, {check.source}",
                f"{check.values:,} values",
                f"{check.error:.1e}",
                f"{check.tolerance:.0e}" + (" *" if check.earned else ""),
                verdict(check.passed),
            )
        for decided in self.decisions:
            ties = f", {decided.near_ties} near-ties" if decided.near_ties else ""
            name = "predicted labels" if decided.kind == "labels" else "top expert of each layer"
            table.add_row(
                name, f"{decided.compared:,}", f"{decided.equal:,} equal{ties}", "all", verdict(decided.passed)
            )
        if self.tables:
            remark = f", {self.selected} selected by samples"
            table.add_row("every expert and router", *table_cells(self.tables, remark))
        earned = [check for check in self.values if check.earned and check.rounding is not None]
        if earned:
            worst = max(earned, key=lambda check: check.error)
            table.caption = f"* float32 rounds more than that here{_off(worst.rounding)}"
        return table


def require_parity(report: ParityReport) -> ParityReport:
    """``report`` if it passed.

    Raises:
        ParityError: with every failed check.
    """
    return require(report, "does not compute what the model computes")


def _off(rounding: Rounding | None) -> str:
    if rounding is None:
        return ""
    return f"; off float64: PyTorch {rounding.eager:.1e}, the file {rounding.exported:.1e}"
