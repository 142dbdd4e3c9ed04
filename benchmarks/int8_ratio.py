"""The exported model against its bare encoders when both are quantised the same way."""

from __future__ import annotations

from benchmarks.graphs import Spec, Workshop
from benchmarks.measuring import compare, graph_call, open_graph
from benchmarks.result import LATENCY, Result, Table, latency_columns
from benchmarks.settings import NotRun

__all__ = ["int8_ratio"]


def int8_ratio(workshop: Workshop) -> Result:
    """int8 ÷ int8 bare pair at batch 1, for a ViT and for a Swin; the target is about dynamic int8."""
    settings, rows, values = workshop.settings, [], {}
    not_run: dict[str, str] = {}
    for image in ("vit", "swin"):
        for precision in ("int8-dynamic",) if settings.few else ("int8-dynamic", "int8"):
            specs = {
                "bare pair": Spec(kind="bare", image=image, precision=precision),
                "MoPE": Spec(image=image, precision=precision),
            }
            try:
                files = {name: workshop.graph(spec) for name, spec in specs.items()}
            except NotRun as reason:
                not_run[f"int8-{image}"] = str(reason)
                break
            calls = {
                name: graph_call(open_graph(files[name], settings), workshop.feeds(spec, batch=1))
                for name, spec in specs.items()
            }
            found = compare(calls, settings, samples=1)
            for name, row in found.items():
                size = f"{files[name].stat().st_size / 1e6:,.1f}"
                ratio = f"{row['ratio']['value']:.3f}"
                rows.append((settings.encoders.names[image], precision, name, *latency_columns(row), ratio, size))
            if precision == "int8-dynamic":
                values[f"int8-{image}"] = found["MoPE"]["ratio"]
    return Result(
        about=f"The exported MoPE ({settings.form} form, K=16, L=6) ÷ its bare encoder pair, both quantised by the "
        "project's own lowering; batch 1. Static int8 is calibrated on random inputs, which no speed depends on.",
        tables=(Table("int8", ("image encoder", "precision", "graph", *LATENCY, "÷ bare", "MB"), tuple(rows)),),
        values=values,
        not_run=not_run,
    )
