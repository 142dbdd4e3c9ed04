"""What a benchmark hands back: tables, curves with their growth, and the values that targets are about."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

__all__ = ["Curve", "Result", "Table", "exponent", "latency_columns"]

LATENCY = ("p50 ms", "p95 ms", "p99 ms", "samples/s")


@dataclass(frozen=True)
class Table:
    """Rows of text and numbers; columns by name."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class Curve:
    """Latency against one quantity.

    Attributes:
        title: what is shown.
        quantity: what grows: ``"batch size"``.
        series: name → a point for each value: ``{"x", "p50_ms", "p95_ms", "p99_ms", "samples_per_s"}``.
    """

    title: str
    quantity: str
    series: Mapping[str, tuple[Mapping[str, float], ...]]

    @property
    def exponents(self) -> dict[str, float]:
        """p of the fitted p50 ∝ x^p of every series; NaN-free: a series of one point has none."""
        return {
            name: exponent([p["x"] for p in points], [p["p50_ms"] for p in points])
            for name, points in self.series.items()
            if len(points) > 1
        }


@dataclass(frozen=True)
class Result:
    """All of one benchmark.

    Attributes:
        about: a sentence or two: what was compared with what.
        tables, curves: to print and draw.
        values: name of a target → ``{"value", "error"}``; the error may be None.
        not_run: name of a target → why there is no value.
    """

    about: str
    tables: tuple[Table, ...] = ()
    curves: tuple[Curve, ...] = ()
    values: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    not_run: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        made = asdict(self)
        for curve, document in zip(self.curves, made["curves"], strict=True):
            document["exponents"] = curve.exponents
        return made


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """The slope of log y over log x by least squares: y grows as x to this power."""
    assert len(x) == len(y) > 1
    return float(np.polyfit([math.log(value) for value in x], [math.log(value) for value in y], 1)[0])


def latency_columns(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The cells of :data:`LATENCY` from a summary of mope_deploy.bench.timing."""
    return (*(f"{row[key]:.2f}" for key in ("p50_ms", "p95_ms", "p99_ms")), f"{row['samples_per_s']:,.1f}")
