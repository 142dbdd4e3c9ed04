"""One comparison, measured: times, ratios to the first graph of each group, and the values that targets are about."""

from __future__ import annotations

from functools import partial

from benchmarks.comparisons import Comparison
from benchmarks.graphs import Workshop
from benchmarks.machine import int8_instructions
from benchmarks.measuring import compare
from benchmarks.result import LATENCY, Result, Table, latency_columns, ratio_column

__all__ = ["ratios"]


def ratios(workshop: Workshop, comparison: Comparison) -> Result:
    """Every group of it, one after the other: graphs of a real size fill gigabytes."""
    settings, rows, values = workshop.settings, [], {}
    for group in comparison.groups:
        graphs = {name: spec for name, spec in group.graphs.items() if not (settings.few and spec.precision == "int8")}
        runs = {name: workshop.open(spec) for name, spec in graphs.items()}
        cells = [settings.encoders.names.get(cell, cell) for cell in group.cells]
        for batch, target in group.batches.items() if runs else ():
            feeds = {
                name: workshop.feeds(spec, batch=batch, text_length=comparison.text_length)
                for name, spec in graphs.items()
            }
            found = compare({name: partial(run, feeds[name]) for name, run in runs.items()}, settings, samples=batch)
            for name, row in found.items():
                first = (*cells, batch, name) if "batch" in comparison.columns else (*cells, name)
                size = [f"{workshop.graph(graphs[name]).stat().st_size / 1e6:,.1f}"] if comparison.sizes else []
                rows.append((*first, *latency_columns(row), ratio_column(row), *size))
            if target is not None:
                judged = group.judged or list(found)[1:]
                values[target] = min((found[name]["ratio"] for name in judged), key=lambda ratio: ratio["value"])
    here = int8_instructions()
    missing = comparison.needs_int8 and not here
    columns = (*comparison.columns, *LATENCY, f"÷ {comparison.base}", *(("MB",) if comparison.sizes else ()))
    return Result(
        about=comparison.about.format(**settings.encoders.names, form=settings.form, int8=", ".join(here) or "none"),
        tables=(Table(comparison.title, columns, tuple(rows)),),
        values={} if missing else values,
        not_run=dict.fromkeys(values, "this CPU has no VNNI") if missing else {},
    )
