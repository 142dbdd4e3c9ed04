"""What the precision gate found on one file: as JSON, as a table, and as the figures of a manifest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from export.gate.found import InterfaceCheck, Report, json_safe, percent, require, table_of, verdict, wrong
from export.gate.tables import TableCheck, table_cells
from export.gate.thresholds import Thresholds
from export.limits import GATE_SAMPLES

__all__ = ["Flip", "LogitsError", "Metric", "PrecisionReport", "ProbabilityError", "Share", "require_precision"]

_SLACK = 1e-9  # a difference of two shares is rounded: 0.80 − 0.79 is a little more than 0.01
# The last expert that is selected is nearer to the next one than the first is to the second, so more of them change
# places; ten times as many may.
_EDGE = 10
_MARKS = {
    "CPU": "computed on a CPU, which rounds otherwise than the device will",
    "emulated": "emulated: a float32 copy whose tensors were rounded one by one",
}


@dataclass(frozen=True)
class LogitsError:
    """How far the logits are from the eager model's; NaN if any output is not finite.

    Attributes:
        maximum: max|a − b| / max|b|.
        rms: root mean square of a − b over that of b.
        spread: the same over the standard deviation of b, which a constant in all logits does not widen.
    """

    maximum: float
    rms: float
    spread: float


@dataclass(frozen=True)
class ProbabilityError:
    """How far the probabilities are from the eager model's; NaN if any output is not finite, or none was compared.

    Attributes:
        compared: samples.
        maximum, mean: over the samples, of the largest |Δp| among the labels of each.
    """

    compared: int
    maximum: float
    mean: float


@dataclass(frozen=True)
class Share:
    """How many decisions of one kind were compared, and how many were the same."""

    compared: int
    equal: int

    @property
    def share(self) -> float:
        """0 to 1; of nothing, 0: what was not compared has not agreed."""
        return self.equal / self.compared if self.compared else 0.0


@dataclass(frozen=True)
class Metric:
    """The task's metric on the samples that have labels, with the eager model and with the file.

    Attributes:
        name: ``"accuracy"``, or ``"f1_micro"`` of multi-label models.
        samples: how many had labels.
        before, after: 0 to 1.
    """

    name: str
    samples: int
    before: float
    after: float

    @property
    def change(self) -> float:
        """Negative if the file is worse."""
        return self.after - self.before


@dataclass(frozen=True)
class Flip:
    """One decision that differs.

    Attributes:
        sample: where it is from, ``file:line``.
        where: ``"label"``, ``"label red"`` of a multi-label model, or ``"layer 3"``.
        eager, lowered: what each side chose.
        margin: by how much the eager model preferred its own choice to the other one: a difference of logits (of
            multi-label models, the logit's distance from 0), or of routing weights before selection.
    """

    sample: str
    where: str
    eager: str
    lowered: str
    margin: float


@dataclass(frozen=True)
class PrecisionReport(Report):
    """What the gate found; passed only if every part did.

    Attributes:
        file: name of the file that was run.
        sha256: of that file.
        precision: ``"fp16"``, ``"bf16"``, ``"int8"``, …
        reference: what it was compared with.
        runtime: what ran it.
        mark: what this does not show: ``"emulated"``, ``"CPU"``, or nothing.
        samples: how many real samples were compared.
        interface: names, dtypes, axes, that it runs.
        finite: whether every output of both sides is a finite number.
        logits: their relative error. Like that of the probabilities, it is of samples for which the same experts were
            selected, where experts are: how many others there may be is what ``experts`` is for.
        probabilities: their error.
        labels: predictions.
        metric: None where no sample has a label.
        routed: whether the model chooses among experts.
        experts: the top expert, a share per layer; empty if the file has no output ``routing``.
        drift: share of the routing weight that went to other experts, ½ Σ|a − b|, the mean per layer; NaN if any output
            is not finite. On few samples it says more than flips, which are rare.
        selections: the set of selected experts, a share per layer, under top-k routing; else empty.
        label_flips, expert_flips: what differs, the largest margins first, at most 100 each; all are counted.
        thresholds: what had to be reached.
        given: labels that were given, by both sides together, and those of them that both gave: where most of hundreds
            of labels are never given, that all of them agree says little. None where a sample has exactly one.
        tables: every expert and router, compared directly (:mod:`export.gate.tables`).
    """

    file: str
    sha256: str
    precision: str
    reference: str
    runtime: str
    mark: str
    samples: int
    interface: tuple[InterfaceCheck, ...]
    finite: bool
    logits: LogitsError
    probabilities: ProbabilityError
    labels: Share
    metric: Metric | None
    routed: bool
    experts: tuple[Share, ...]
    drift: tuple[float, ...]
    selections: tuple[Share, ...]
    label_flips: tuple[Flip, ...]
    expert_flips: tuple[Flip, ...]
    thresholds: Thresholds
    given: Share | None = None
    tables: tuple[TableCheck, ...] = ()

    @property
    def given_asked(self) -> float:
        """What share of given labels has to agree: they differ by no more than the metric may drop by."""
        asked = self.thresholds
        return asked.labels if asked.metric is None else min(asked.labels, 1 - asked.metric)

    @property
    def given_passed(self) -> bool:
        """Whether enough of the labels agree that were given; none on either side agree."""
        return self.given is None or not self.given.compared or self.given.share >= self.given_asked

    @property
    def selections_asked(self) -> float | None:
        """What share of samples has to have the same selected experts in every layer, top-k; None asks for nothing."""
        asked = self.thresholds.routing
        return None if asked is None else max(0.0, 1 - _EDGE * (1 - asked))

    @property
    def ran(self) -> bool:
        """Whether there is anything to judge: the file is what it should be from outside, and ran on some samples."""
        return self.samples > 0 and all(check.passed for check in self.interface)

    @property
    def exact(self) -> bool:
        """Whether all outputs are equal to the last bit: logits alone are of samples with the same experts."""
        return self.logits.maximum == 0 and not any(self.drift) and self.samples == self.probabilities.compared

    @property
    def routing(self) -> Share:
        """The top expert, over all layers."""
        return _all(self.experts)

    @property
    def worst_layer(self) -> int | None:
        """The layer whose top expert agrees least; None without routing."""
        if not self.experts:
            return None
        return min(range(len(self.experts)), key=lambda i: self.experts[i].share)

    @property
    def labels_passed(self) -> bool:
        """Whether enough predictions agree."""
        return self.labels.share >= self.thresholds.labels

    @property
    def metric_passed(self) -> bool:
        """Whether the metric, if it is known, dropped by no more than it may."""
        if self.metric is None or self.thresholds.metric is None:
            return True
        return -self.metric.change - self.thresholds.metric <= _SLACK

    @property
    def routing_passed(self) -> bool:
        """Whether every layer chooses its top expert as the model does; a file that does not show it has not passed."""
        asked = self.thresholds.routing
        if asked is None or not self.routed:
            return True
        return bool(self.experts) and all(layer.share >= asked for layer in self.experts)

    def problems(self) -> list[str]:
        if found := wrong(self.interface):
            return found
        if not self.samples:
            return ["nothing was compared"]
        asked = self.thresholds
        if not self.finite:
            found.append("an output is NaN or infinite")
        if not self.labels_passed:
            found.append(f"{_of(self.labels)} predicted labels agree, at least {percent(asked.labels)} must")
        found += [str(check) for check in self.tables if not check.passed]
        if self.given is not None and not self.given_passed:
            found.append(f"{_of(self.given)} labels that are given agree, at least {percent(self.given_asked)} must")
        if (least := self.selections_asked) is not None:
            found += [
                f"{_of(layer)} samples have the same selected experts in layer {i}, at least {percent(least)} must"
                for i, layer in enumerate(self.selections)
                if layer.share < least
            ]
        if self.finite:
            found += [
                f"{what} by {_figure(value, most)}, at most {most:g} is allowed"
                for what, value, most in self._values()
                if most is not None and not value <= most
            ]
        if self.metric is not None and asked.metric is not None and not self.metric_passed:
            found.append(
                f"{self.metric.name} drops from {percent(self.metric.before)} to {percent(self.metric.after)}, at "
                f"most {100 * asked.metric:g} points are allowed"
            )
        if asked.routing is not None and not self.routing_passed:
            if not self.experts:
                found.append("the file has no output routing, so which experts it chooses was not compared")
            found += [
                f"{_of(layer)} samples have the same top expert in layer {i}, at least {percent(asked.routing)} must"
                for i, layer in enumerate(self.experts)
                if layer.share < asked.routing
            ]
        return found

    def _values(self) -> tuple[tuple[str, float, float | None], ...]:
        """What was measured on values, and the most that is allowed."""
        asked, found = self.thresholds, self.probabilities
        return (
            ("probabilities change", found.maximum, asked.probability),
            ("probabilities change, in the mean of samples,", found.mean, asked.mean_probability),
            ("logits change, of their spread,", self.logits.spread, asked.logits),
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, every part with its verdict."""
        document = {"passed": self.passed, "problems": self.problems()} | asdict(self)
        document |= {
            "few_samples": self.samples < GATE_SAMPLES,
            "thresholds": self.thresholds.to_dict(),
            "labels": _share(self.labels),
            "metric": self.metric and asdict(self.metric) | {"change": self.metric.change},
            "routing": _share(self.routing) if self.experts else None,
            "experts": [_share(layer) for layer in self.experts],
            "tables": [asdict(check) | {"passed": check.passed} for check in self.tables],
            "given": self.given and _share(self.given),
            "selections": [_share(layer) for layer in self.selections],
        }
        return json_safe(document)

    def figures(self) -> dict[str, float | str | bool]:
        """The few figures that a manifest shows."""
        found: dict[str, float | str | bool] = {
            "passed": self.passed,
            "runtime": self.runtime,
            "logits_max_relative_error": self.logits.maximum,
            "logits_rms_relative_error": self.logits.rms,
            "logits_rms_of_spread": self.logits.spread,
            "probabilities_max_error": self.probabilities.maximum,
            "probabilities_mean_error": self.probabilities.mean,
        }
        found |= _counted("labels", self.labels)
        if self.metric is not None:
            found["metric"] = self.metric.name
            found |= {f"metric_{name}": getattr(self.metric, name) for name in ("samples", "before", "after")}
        if self.worst_layer is not None:
            found |= _counted("experts", self.routing)
            found |= {
                "experts_worst_layer": self.worst_layer,
                "experts_worst_layer_agreement": self.experts[self.worst_layer].share,
            }
        return json_safe(found)

    def table(self) -> Table:
        """For a terminal: one line a check."""
        table = table_of(f"{self.file} ({self.precision}) against {self.reference}", "required", self.interface)
        if not self.ran:
            if all(check.passed for check in self.interface):
                table.add_row("samples", "0", "nothing was compared", "some", verdict(False))
            return table
        asked = self.thresholds
        error = f"max {self.logits.maximum:.1e}, RMS {self.logits.rms:.1e}"
        table.add_row("error of logits", f"{self.samples:,}", error, "finite", verdict(self.finite))
        names = ("max |Δp|", "mean |Δp|", "RMS of logits / spread")
        for name, (_, value, most) in zip(names, self._values(), strict=True):
            limit = "" if most is None else f"≤ {most:g}"
            shown = "" if most is None else verdict(value <= most)
            table.add_row(name, f"{self.probabilities.compared:,}", f"{value:.2g}", limit, shown)
        _add_share(table, "predicted labels", self.labels, asked.labels)
        if self.given is not None and self.given.compared and self.given.share < self.labels.share:
            _add_share(table, "labels that are given", self.given, self.given_asked)
        if self.metric is not None:
            change = f"{percent(self.metric.before)} → {percent(self.metric.after)}"
            limit = "" if asked.metric is None else f"drop ≤ {100 * asked.metric:g}"
            passed = verdict(self.metric_passed) if limit else ""
            table.add_row(self.metric.name, f"{self.metric.samples:,}", change, limit, passed)
        if self.worst_layer is not None:
            _add_share(table, "top expert, all layers", self.routing, None)
            name = f"top expert, worst layer ({self.worst_layer})"
            _add_share(table, name, self.experts[self.worst_layer], asked.routing)
        elif not self.routing_passed and asked.routing is not None:
            table.add_row("top expert", "0", "no output routing", f"≥ {percent(asked.routing)}", verdict(False))
        if self.selections:
            least = min(self.selections, key=lambda layer: layer.share)
            _add_share(table, "selected experts, worst layer", least, self.selections_asked)
        if self.tables:
            table.add_row("every expert and router", *table_cells(self.tables))
        remarks = [_MARKS.get(self.mark, self.mark)] if self.mark else []
        if self.samples < GATE_SAMPLES:
            remarks.append(f"{self.samples:,} samples only; {GATE_SAMPLES:,} would say more")
        if self.metric is None:
            remarks.append("no sample has a label, so no metric was compared")
        table.caption = "; ".join(remarks) or None
        return table


def require_precision(report: PrecisionReport) -> PrecisionReport:
    """``report`` if it passed.

    Raises:
        ParityError: with what failed.
    """
    return require(report, f"is not the model in {report.precision}")


def _add_share(table: Table, name: str, found: Share, asked: float | None) -> None:
    table.add_row(
        name,
        f"{found.compared:,}",
        f"{found.equal:,} equal, {percent(found.share)}",
        "" if asked is None else f"≥ {percent(asked)}",
        "" if asked is None else verdict(found.share >= asked),
    )


def _all(layers: Sequence[Share]) -> Share:
    return Share(sum(layer.compared for layer in layers), sum(layer.equal for layer in layers))


def _share(found: Share) -> dict[str, float | int]:
    return asdict(found) | {"share": found.share}


def _counted(kind: str, found: Share) -> dict[str, float | str | bool]:
    return {f"{kind}_compared": found.compared, f"{kind}_equal": found.equal, f"{kind}_agreement": found.share}


def _figure(value: float, most: float) -> str:
    """Never shown as what was allowed: 0.30001 is not 0.3."""
    return f"{value:.3g}" if float(f"{value:.3g}") > most or not value > most else f"{value:.9g}"


def _of(found: Share) -> str:
    return f"{found.equal:,} of {found.compared:,} ({percent(found.share)})"
