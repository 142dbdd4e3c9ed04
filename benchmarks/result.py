"""What a benchmark hands back: tables, curves with their growth, and the values that targets are about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

__all__ = ["Curve", "Result", "Table", "exponent", "latency_columns", "ratio_column"]

LATENCY = ("p50 ms", "p95 ms", "p99 ms", "samples/s")


@dataclass(frozen=True)
class Table:
    """Rows of text and numbers; columns by name."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class Curve:
    """Latency against one quantity."""

    title: str
    quantity: str  # what grows: "batch size"
    series: Mapping[str, tuple[Mapping[str, float], ...]]  # by name points {"x", "p50_ms", …, "samples_per_s"}

    @property
    def exponents(self) -> dict[str, float]:
        """p of the fitted p50 ∝ x^p of every series of more than one point."""
        return {
            name: exponent([p["x"] for p in points], [p["p50_ms"] for p in points])
            for name, points in self.series.items()
            if len(points) > 1
        }


@dataclass(frozen=True)
class Result:
    """All of one benchmark."""

    about: str  # a sentence or two: what was compared with what
    tables: tuple[Table, ...] = ()
    curves: tuple[Curve, ...] = ()
    values: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)  # target → {"value", "error"}
    not_run: Mapping[str, str] = field(default_factory=dict)  # target → why there is no value

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        curves = tuple(asdict(curve) | {"exponents": curve.exponents} for curve in self.curves)
        return asdict(self) | {"curves": curves}


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """The slope of log y over log x by least squares: y grows as x to this power."""
    assert len(x) == len(y) > 1
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def latency_columns(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The cells of :data:`LATENCY` from a summary of mope_deploy.bench.timing."""
    return (*(f"{row[key]:.2f}" for key in ("p50_ms", "p95_ms", "p99_ms")), f"{row['samples_per_s']:,.1f}")


def ratio_column(row: Mapping[str, Any]) -> str:
    """The cell of a row's ratio to the first of :func:`benchmarks.measuring.compare`."""
    return f"{row['ratio']['value']:.3f}"
