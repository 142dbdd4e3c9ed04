"""Text as the main modality: a prompted BERT that is given the image's feature y, against a bare BERT, 16 tokens."""

from __future__ import annotations

from benchmarks.graphs import Spec, Workshop
from benchmarks.measuring import compare, graph_call, open_graph
from benchmarks.result import LATENCY, Result, Table, latency_columns

__all__ = ["text_main"]

TOKENS = 16


def text_main(workshop: Workshop) -> Result:
    """Prompted BERT with a cached image feature ÷ BERT and a linear head, batch 1 and 8."""
    settings, rows, values = workshop.settings, [], {}
    specs = {"bare BERT": Spec(kind="bare-main", main="text"), "MoPE, y given": Spec(kind="given-y", main="text")}
    sessions = {name: open_graph(workshop.graph(spec), settings) for name, spec in specs.items()}
    for batch in (1, 8):
        calls = {
            name: graph_call(sessions[name], workshop.feeds(spec, batch=batch, text_length=TOKENS))
            for name, spec in specs.items()
        }
        found = compare(calls, settings, samples=batch)
        rows += [(batch, name, *latency_columns(row), f"{row['ratio']['value']:.3f}") for name, row in found.items()]
        if batch == 1:
            values["text-main"] = found["MoPE, y given"]["ratio"]
    return Result(
        about=f"{settings.encoders.names['text']} as the main encoder, prompted in every layer ({settings.form} form, "
        f"K=16, L=6), given y of the image and all that depends on y alone, "
        f"÷ the same encoder alone with a linear head; {TOKENS} tokens.",
        tables=(Table("text as main", ("batch", "graph", *LATENCY, "÷ bare"), tuple(rows)),),
        values=values,
    )
