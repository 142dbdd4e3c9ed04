"""What a picture costs when the question stays: MoPE with its text feature y given, against the image encoder alone."""

from __future__ import annotations

from benchmarks.graphs import Spec, Workshop
from benchmarks.measuring import compare, graph_call, open_graph
from benchmarks.result import LATENCY, Result, Table, latency_columns

__all__ = ["cached_y"]


def cached_y(workshop: Workshop) -> Result:
    """MoPE with y given ÷ the main encoder alone with a linear head, batch 1."""
    settings = workshop.settings
    specs = {"main encoder": Spec(kind="bare-main"), "MoPE, y given": Spec(kind="given-y"), "whole MoPE": Spec()}
    calls = {
        name: graph_call(open_graph(workshop.graph(spec), settings), workshop.feeds(spec, batch=1))
        for name, spec in specs.items()
    }
    found = compare(calls, settings, samples=1)
    rows = tuple((name, *latency_columns(row), f"{row['ratio']['value']:.3f}") for name, row in found.items())
    return Result(
        about=f"{settings.encoders.names['vit']} prompted in every layer ({settings.form} form, K=16, L=6), given y "
        "of the text and all that depends on y alone, "
        "÷ the same encoder alone with a linear head; batch 1. The whole model is shown beside them.",
        tables=(Table("cached y", ("graph", *LATENCY, "÷ main encoder"), rows),),
        values={"cached-y": found["MoPE, y given"]["ratio"]},
    )
