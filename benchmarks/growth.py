"""How latency grows with batch size, text length, K and L; the exponent p of a fitted p50 ∝ x^p for each."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from benchmarks.graphs import Workshop
from benchmarks.measuring import compare
from benchmarks.result import LATENCY, Curve, Result, Table, latency_columns
from benchmarks.settings import Spec

__all__ = ["growth"]

# quantity → values, and those of a short run
_POINTS = {
    "batch size": ((1, 2, 4, 8, 16), (1, 4)),
    "text length": ((8, 16, 32, 64, 128), (8, 64)),
    "K": ((4, 16, 64, 256), (16, 256)),
    "L": ((2, 6, 12, 24), (6, 24)),
}
_SHOWN = ("p50_ms", "p95_ms", "p99_ms", "samples_per_s")


def growth(workshop: Workshop) -> Result:
    """A curve for each quantity; batch size and text length also of the bare pair."""
    curves = [_curve(workshop, quantity) for quantity in _POINTS]
    rows = tuple((curve.quantity, name, f"{p:.3f}") for curve in curves for name, p in curve.exponents.items())
    fitted = Table("exponents", ("quantity", "series", "p in p50 ∝ x^p"), rows)
    names = workshop.settings.encoders.names
    return Result(
        about=f"The exported MoPE with {names['vit']} and {names['text']} ({workshop.settings.form} form), fp32; "
        "what is not varied stays at batch 1, 32 tokens, K=16, L=6. All points of one series are measured in turn.",
        tables=(*(_table(curve) for curve in curves), fitted),
        curves=tuple(curves),
    )


def _curve(workshop: Workshop, quantity: str) -> Curve:
    """Sizes are varied on one graph of each kind; K and L have a graph for each value, all with the same weights."""
    settings = workshop.settings
    values = _POINTS[quantity][1 if settings.few else 0]
    found: dict[str, dict[str, Any]] = {}
    if quantity in ("batch size", "text length"):
        calls, samples = {}, {}
        for name, spec in (("MoPE", Spec()), ("bare pair", Spec(kind="bare"))):
            run = workshop.open(spec)
            for value in values:
                size = {"batch": value} if quantity == "batch size" else {"batch": 1, "text_length": value}
                calls[f"{name}, {value}"] = partial(run, workshop.feeds(spec, **size))
                samples[f"{name}, {value}"] = size["batch"]
        found = compare(calls, settings, samples=samples)
    else:
        for name, top_k in (("dense", 0),) if settings.few else (("dense", 0), ("top-1", 1)):
            calls = {}  # of one series at a time: gigabytes
            for value in values:
                spec = Spec(top_k=top_k)
                spec = replace(spec, experts=value) if quantity == "K" else replace(spec, prompt_length=value)
                calls[f"{name}, {value}"] = partial(workshop.open(spec), workshop.feeds(spec, batch=1))
            found |= compare(calls, settings, samples=1)
    series: dict[str, tuple[dict[str, float], ...]] = {}
    for call, row in found.items():
        name, _, x = call.rpartition(", ")
        series[name] = (*series.get(name, ()), {"x": float(x), **{key: row[key] for key in _SHOWN}})
    return Curve(f"latency against {quantity}", quantity, series)


def _table(curve: Curve) -> Table:
    rows = tuple(
        (name, f"{point['x']:g}", *latency_columns(point)) for name, points in curve.series.items() for point in points
    )
    return Table(curve.title, ("series", curve.quantity, *LATENCY), rows)
