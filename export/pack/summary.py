"""What an export made, a line per format and precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from export.gate import PrecisionReport
from export.gate.device import open_files
from export.gate.found import percent
from export.pack.engines import ExportedEngine
from export.variants import Variant, Work
from mope_deploy.bench.timing import interleave, warm_up

__all__ = ["Row", "summarise", "summary_table"]

_SECONDS, _ROUNDS = 1.0, 5  # at least, of all graphs together and of each


@dataclass(frozen=True)
class Row:
    """One graph or engine.

    Attributes:
        format: ``"onnx"``, ``"onnx, fused"`` or the TensorRT library.
        graph: its name, which ``--graph`` takes.
        precision: of its graph.
        bytes: of its files.
        judged: the precision gate's report; None where only fp32 was exported, and for engines, which it never runs.
        seconds: median of one sample here; None if it cannot run here.
        proved: of an engine, whether the golden samples came out right here; None for a graph.
        kept: how many parts stayed in fp32.
        explanation: which, and why; empty if none did.
        parts: of a graph in several files their names and sizes, and what crosses; empty for one file.
    """

    format: str
    graph: str
    precision: str
    bytes: int
    judged: PrecisionReport | None
    seconds: float | None
    proved: bool | None
    kept: int = 0
    explanation: str = ""
    parts: str = ""


def summarise(
    work: Work, variants: Sequence[Variant], engines: Sequence[ExportedEngine], golden: Mapping[str, NDArray[Any]]
) -> list[Row]:
    """Rows of the graphs, then of the engines, timed on one golden sample.

    Args:
        work: of the export, while its files are there.
        variants: the graphs.
        engines: built from them.
        golden: input arrays of the golden samples.
    """
    one = {name: array[:1] for name, array in golden.items()}
    runners: dict[str, Callable[[], object]] = {}
    for variant in variants:
        if variant.runs_on != "tensorrt":
            main, parts = variant.files[0], variant.part_files
            session = open_files(main, work.final, parts, precision=variant.precision, cpu=work.cpu, spinning=True)
            runners[variant.name] = partial(session.run, one)
    for engine in engines:
        if engine.session is not None:
            runners[f"{engine.graph} engine"] = partial(engine.session.run, one)
    # Real measurements are `mope bench`'s and benchmarks/: this is a hint beside an export, one call of each in turn.
    warm_up(runners)
    taken = interleave(runners, seconds=_SECONDS, rounds=_ROUNDS)
    seconds = {name: float(np.median(milliseconds)) / 1e3 for name, milliseconds in taken.items()}
    rows = [
        Row(
            "onnx, fused" if variant.name == "model-fused" else "onnx",
            variant.name,
            variant.precision,
            sum(path.stat().st_size for path in variant.all_files),
            variant.judged,
            seconds.get(variant.name),
            None,
            len(variant.kept),
            variant.explain(),
            _parts(variant),
        )
        for variant in variants
    ]
    precisions = {variant.name: variant.precision for variant in variants}
    return rows + [
        Row(
            engine.sidecar.backend,
            engine.graph,
            precisions[engine.graph],
            engine.sidecar.engine.bytes,
            None,
            seconds.get(f"{engine.graph} engine"),
            engine.not_run is None,
        )
        for engine in engines
    ]


def _parts(variant: Variant) -> str:
    """``model.text.onnx 438.0 MB (9,312 values a sample) + model.onnx 347.0 MB``; empty for one file."""
    if not variant.parts:
        return ""
    parts = [
        f"{part.files[0].name} {_megabytes(part.files)} ({part.width:,} values a sample)" for part in variant.parts
    ]
    return " + ".join([*parts, f"{variant.files[0].name} {_megabytes(variant.files)}"])


def _megabytes(files: Sequence[Path]) -> str:
    return f"{sum(path.stat().st_size for path in files) / 1e6:,.1f} MB"


def summary_table(rows: Sequence[Row]) -> Table:
    """For a terminal of 80 columns."""
    judged = next((row.judged for row in rows if row.judged is not None), None)
    metric = judged.metric.name if judged is not None and judged.metric is not None else "metric"
    table = Table(
        box=None, padding=(0, 2, 0, 0), pad_edge=False, caption=_caption(rows, judged), caption_justify="left"
    )
    for column in ("format", "precision", "size", metric, "labels", "experts", "1 sample"):
        table.add_column(column, justify="left" if column in ("format", "precision") else "right", no_wrap=True)
    for row in rows:
        found = row.judged
        kept = f" +{row.kept}" if row.kept else ""
        emulated = " *" if found is not None and found.mark == "emulated" else ""
        table.add_row(
            row.format,
            row.precision + kept + emulated,
            f"{row.bytes / 1e6:,.1f} MB",
            f"{found.metric.after:.4f}" if found is not None and found.metric is not None else "–",
            percent(found.labels.share)[:-2] if found is not None else "–",
            percent(found.routing.share)[:-2] if found is not None and found.experts else "–",
            f"{1e3 * row.seconds:.2f} ms" if row.seconds is not None else "not run",
        )
    return table


def _caption(rows: Sequence[Row], judged: PrecisionReport | None) -> str:
    parts = []
    if judged is not None:
        parts.append(f"labels, experts: per cent equal to the eager fp32 model's, {judged.samples:,} samples")
        parts.append("1 sample: median of this machine")
    if any(row.judged is not None and row.judged.mark == "emulated" for row in rows):
        parts.append("*: rounding emulated in fp32, not a device's own arithmetic")
    if any(row.kept for row in rows):
        parts.append("+: parts of it kept in fp32, named below")
    if any(row.proved is False for row in rows):
        parts.append("engines: built, not run here; golden samples are run at the first load on a device")
    return "\n".join(parts)
