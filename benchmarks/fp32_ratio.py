"""The exported model against its two bare encoders with a linear head, fp32, K = 16, L = 6, 32 tokens."""

from __future__ import annotations

from benchmarks.graphs import Spec, Workshop
from benchmarks.measuring import compare, graph_call, open_graph
from benchmarks.result import LATENCY, Result, Table, latency_columns
from benchmarks.settings import TEXT_LENGTH, NotRun

__all__ = ["fp32_ratio"]

BATCHES = (1, 8)


def fp32_ratio(workshop: Workshop) -> Result:
    """Exported ÷ bare pair at batch 1 and 8, for a ViT and for a Swin."""
    settings, rows, values = workshop.settings, [], {}
    not_run: dict[str, str] = {}
    for image in ("vit", "swin"):
        specs = {"bare pair": Spec(kind="bare", image=image), "MoPE": Spec(image=image)}
        try:
            files = {name: workshop.graph(spec) for name, spec in specs.items()}
        except NotRun as reason:
            not_run |= {f"fp32-{image}-{batch}": str(reason) for batch in BATCHES}
            continue
        sessions = {name: open_graph(path, settings) for name, path in files.items()}
        for batch in BATCHES:
            feeds = workshop.feeds(specs["MoPE"], batch=batch)
            calls = {name: graph_call(session, feeds) for name, session in sessions.items()}
            found = compare(calls, settings, samples=batch)
            for name, row in found.items():
                size = files[name].stat().st_size / 1e6
                ratio = f"{row['ratio']['value']:.3f}"
                encoder = settings.encoders.names[image]
                rows.append((encoder, batch, name, *latency_columns(row), ratio, f"{size:,.1f}"))
            values[f"fp32-{image}-{batch}"] = found["MoPE"]["ratio"]
    names = settings.encoders.names
    return Result(
        about=f"The exported MoPE ({settings.form} form, K=16, L=6, dense routing) ÷ the same two encoders without "
        f"prompts and with a linear head; {names['text']}, {TEXT_LENGTH} tokens, ONNX Runtime fp32.",
        tables=(Table("fp32", ("image encoder", "batch", "graph", *LATENCY, "÷ bare", "MB"), tuple(rows)),),
        values=values,
        not_run=not_run,
    )
