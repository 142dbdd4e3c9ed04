"""Sixteen times as many experts: what K = 256 costs against K = 16, with top-1 and with dense routing."""

from __future__ import annotations

from benchmarks.graphs import Spec, Workshop
from benchmarks.measuring import compare, graph_call, open_graph
from benchmarks.result import LATENCY, Result, Table, latency_columns

__all__ = ["experts_ratio"]


def experts_ratio(workshop: Workshop) -> Result:
    """K = 256 ÷ K = 16 at batch 1."""
    settings, rows, values = workshop.settings, [], {}
    for routing, top_k in (("top1", 1), ("soft", 0)):
        specs = {f"K={experts}": Spec(experts=experts, top_k=top_k) for experts in (16, 256)}
        calls = {
            name: graph_call(open_graph(workshop.graph(spec), settings), workshop.feeds(spec, batch=1))
            for name, spec in specs.items()
        }
        found = compare(calls, settings, samples=1)
        for name, row in found.items():
            rows.append((routing, name, *latency_columns(row), f"{row['ratio']['value']:.3f}"))
        values[f"experts-{routing}"] = found["K=256"]["ratio"]
    return Result(
        about=f"The exported MoPE with {settings.encoders.names['vit']} ({settings.form} form, L=6), batch 1, fp32.",
        tables=(Table("experts", ("routing", "K", *LATENCY, "÷ K=16"), tuple(rows)),),
        values=values,
    )
