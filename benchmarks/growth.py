"""How latency grows with batch size, text length, K and L; the exponent p of a fitted p50 ∝ x^p for each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.graphs import Spec, Workshop
from benchmarks.measuring import compare, graph_call, open_graph
from benchmarks.result import LATENCY, Curve, Result, Table, latency_columns
from benchmarks.settings import Settings

__all__ = ["growth"]

# quantity → values, and those of a short run
_POINTS = {
    "batch size": ((1, 2, 4, 8, 16), (1, 4)),
    "text length": ((8, 16, 32, 64, 128), (8, 64)),
    "K": ((4, 16, 64, 256), (16, 256)),
    "L": ((2, 6, 12, 24), (6, 24)),
}


def growth(workshop: Workshop) -> Result:
    """A curve for each quantity; batch size and text length also of the bare pair."""
    curves = [_sizes(workshop, "batch size"), _sizes(workshop, "text length")]
    curves += [
        _models(workshop, "K", lambda value, top_k: Spec(experts=value, top_k=top_k)),
        _models(workshop, "L", lambda value, top_k: Spec(prompt_length=value, top_k=top_k)),
    ]
    rows = tuple((curve.quantity, name, f"{p:.3f}") for curve in curves for name, p in curve.exponents.items())
    fitted = Table("exponents", ("quantity", "series", "p in p50 ∝ x^p"), rows)
    names = workshop.settings.encoders.names
    return Result(
        about=f"The exported MoPE with {names['vit']} and {names['text']} ({workshop.settings.form} form), fp32; "
        "what is not varied stays at batch 1, 32 tokens, K=16, L=6. All points of one series are measured in turn.",
        tables=(*(_table(curve) for curve in curves), fitted),
        curves=tuple(curves),
    )


def _sizes(workshop: Workshop, quantity: str) -> Curve:
    """One graph of each kind on inputs of several sizes."""
    settings = workshop.settings
    specs = {"MoPE": Spec(), "bare pair": Spec(kind="bare")}
    calls, samples = {}, {}
    for name, spec in specs.items():
        session = open_graph(workshop.graph(spec), settings)
        for value in _values(settings, quantity):
            size = {"batch": value} if quantity == "batch size" else {"batch": 1, "text_length": value}
            calls[f"{name}, {value}"] = graph_call(session, workshop.feeds(spec, **size))
            samples[f"{name}, {value}"] = size["batch"]
    found = compare(calls, settings, samples=samples)
    series = {name: [(value, f"{name}, {value}") for value in _values(settings, quantity)] for name in specs}
    return _curve(quantity, series, found)


def _models(workshop: Workshop, quantity: str, spec_of: Any) -> Curve:
    """A graph for each value."""
    settings = workshop.settings
    kinds = {"dense": 0} if settings.few else {"dense": 0, "top-1": 1}
    series: dict[str, list[tuple[int, str]]] = {}
    found: dict[str, Any] = {}
    for kind, top_k in kinds.items():  # one after the other: every graph in memory has all the weights
        calls = {}
        for value in _values(settings, quantity):
            spec = spec_of(value, top_k)
            name = f"{kind}, {quantity}={value}"
            calls[name] = graph_call(open_graph(workshop.graph(spec), settings), workshop.feeds(spec, batch=1))
            series.setdefault(kind, []).append((value, name))
        found |= compare(calls, settings, samples=1)
    return _curve(quantity, series, found)


def _curve(quantity: str, series: Mapping[str, list[tuple[int, str]]], found: Mapping[str, Mapping[str, Any]]) -> Curve:
    keys = ("p50_ms", "p95_ms", "p99_ms", "samples_per_s")
    points = {
        name: tuple({"x": float(value), **{key: found[call][key] for key in keys}} for value, call in calls)
        for name, calls in series.items()
    }
    return Curve(f"latency against {quantity}", quantity, points)


def _table(curve: Curve) -> Table:
    rows = tuple(
        (name, f"{point['x']:g}", *latency_columns(point)) for name, points in curve.series.items() for point in points
    )
    return Table(curve.title, ("series", curve.quantity, *LATENCY), rows)


def _values(settings: Settings, quantity: str) -> tuple[int, ...]:
    many, few = _POINTS[quantity]
    return few if settings.few else many
