"""The exported model in ONNX Runtime against the trained model in eager PyTorch."""

from __future__ import annotations

from benchmarks.graphs import Spec, Workshop
from benchmarks.measuring import compare, eager_call, graph_call, open_graph
from benchmarks.result import LATENCY, Result, Table, latency_columns

__all__ = ["eager_ratio"]


def eager_ratio(workshop: Workshop) -> Result:
    """Exported ÷ eager at batch 1, fp32; reported, not a target."""
    settings, spec = workshop.settings, Spec()
    feeds = workshop.feeds(spec, batch=1)
    calls = {
        "eager": eager_call(workshop.model(spec).eval(), feeds),
        "exported": graph_call(open_graph(workshop.graph(spec), settings), feeds),
    }
    found = compare(calls, settings, samples=1)
    rows = tuple((name, *latency_columns(row), f"{row['ratio']['value']:.3f}") for name, row in found.items())
    return Result(
        about=f"The exported MoPE with {settings.encoders.names['vit']} (K=16, L=6) in ONNX Runtime ÷ the same "
        "model in eager PyTorch, both in this process with the same number of threads; batch 1, fp32.",
        tables=(Table("exported against eager", ("", *LATENCY, "÷ eager"), rows),),
        values={"eager-ratio": found["exported"]["ratio"]},
    )
