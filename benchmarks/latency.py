"""Latency of a trained model in eager PyTorch and of its bundle in ONNX Runtime, on the same samples.

    python -m benchmarks.latency RUN BUNDLE [--batch 1] [--seconds 10] [--threads 2] [--json FILE]

Both run in this process, one call each in turn, after a warm-up, so that a slow spell of the machine meets both; the
ratio of medians is the figure to quote. Preprocessing is left out of both.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.machine import describe_machine
from benchmarks.measuring import compare, eager_call
from benchmarks.settings import Settings
from mope_deploy import load
from mope_deploy.console import out, run_app
from mope_deploy.files import json_bytes, write_file
from mope_deploy.model import MoPE

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def latency(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    bundle: Annotated[Path, typer.Argument(help="Its bundle.")],
    batch: Annotated[int, typer.Option(min=1, help="Samples per call.")] = 1,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long to measure.")] = 10.0,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each.")] = 2,
    to: Annotated[Path | None, typer.Option("--json", help="Also write the figures there.")] = None,
) -> None:
    """Measure p50 and p95 of eager PyTorch and of the bundle, interleaved."""
    model = MoPE.from_pretrained(run / "best").eval()
    predictor = load(bundle, threads=threads)
    raw = [{"image": row.image, "text": row.text} for row in predictor.bundle.golden_samples()]
    arrays = model.preprocessing.collate((raw * batch)[:batch])
    calls: dict[str, Callable[[], object]] = {
        "eager": partial(eager_call(model), arrays),
        "bundle": partial(predictor.session.run, arrays, ("logits",)),
    }
    rows = compare(calls, Settings(folder=run, threads=threads, seconds=seconds), samples=batch)
    figures: dict[str, Any] = rows | {
        "ratio_of_medians": rows["bundle"]["ratio"]["value"],
        "batch": batch,
        "text_length": int(arrays["input_ids"].shape[1]),
        "threads": threads,
        "machine": describe_machine(),
    }
    if to is not None:
        write_file(to, json_bytes(figures))
    for name, row in rows.items():
        out.print(f"{name:<8} p50 {row['p50_ms']:.2f} ms   p95 {row['p95_ms']:.2f} ms   ({row['calls']} calls)")
    out.print(f"bundle ÷ eager, ratio of medians: {figures['ratio_of_medians']:.2f}")


if __name__ == "__main__":
    raise SystemExit(run_app(app))
