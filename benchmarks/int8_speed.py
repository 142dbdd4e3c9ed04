"""How much faster the exported model is in int8 than in fp32, on a CPU with int8 dot products."""

from __future__ import annotations

from benchmarks.graphs import Spec, Workshop
from benchmarks.machine import int8_instructions
from benchmarks.measuring import compare, graph_call, open_graph
from benchmarks.result import LATENCY, Result, Table, latency_columns

__all__ = ["int8_speed"]


def int8_speed(workshop: Workshop) -> Result:
    """int8 ÷ fp32 at batch 1, the best variant counts."""
    settings = workshop.settings
    names = ("fp32", "int8-dynamic") if settings.few else ("fp32", "int8-dynamic", "int8")
    calls = {
        name: graph_call(
            open_graph(workshop.graph(Spec(precision=name)), settings), workshop.feeds(Spec(precision=name), batch=1)
        )
        for name in names
    }
    found = compare(calls, settings, samples=1)
    rows = tuple((name, *latency_columns(row), f"{row['ratio']['value']:.3f}") for name, row in found.items())
    best = min((found[name]["ratio"] for name in names[1:]), key=lambda ratio: ratio["value"])
    here = int8_instructions()
    return Result(
        about=f"The exported MoPE with {settings.encoders.names['vit']} ({settings.form} form, K=16, L=6) at each "
        f"precision ÷ itself in fp32, batch 1. This CPU's int8 instructions: {', '.join(here) or 'none'}.",
        tables=(Table("int8 against fp32", ("precision", *LATENCY, "÷ fp32"), rows),),
        values={"int8-speed": best} if here else {},
        not_run={} if here else {"int8-speed": "this CPU has no VNNI"},
    )
