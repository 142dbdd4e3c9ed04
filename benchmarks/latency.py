"""Latency of a trained model in eager PyTorch and of its bundle in ONNX Runtime, on the same samples.

    python -m benchmarks.latency RUN BUNDLE [--batch 1] [--seconds 10] [--threads 2] [--json FILE]

Both run in this process, one call each in turn, after a warm-up, so that a slow spell of the machine meets both; the
ratio of medians is the figure to quote. Preprocessing is left out of both.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray

from benchmarks.machine import describe_machine
from mope_deploy import load
from mope_deploy.bench.timing import interleave, warm_up
from mope_deploy.console import out, run_app
from mope_deploy.data import open_samples
from mope_deploy.model import MoPE

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
_WARM_UP = 10


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
    figures = measure(run, bundle, batch=batch, seconds=seconds, threads=threads)
    if to is not None:
        to.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    for name in ("eager", "bundle"):
        row = figures[name]
        out.print(f"{name:<8} p50 {row['p50_ms']:.2f} ms   p95 {row['p95_ms']:.2f} ms   ({row['calls']} calls)")
    out.print(f"bundle ÷ eager, ratio of medians: {figures['ratio_of_medians']:.2f}")


def measure(run: Path, bundle: Path, *, batch: int, seconds: float, threads: int) -> dict[str, Any]:
    """The figures of both, JSON-ready, with the machine they were measured on."""
    torch.set_num_threads(threads)
    model = MoPE.from_pretrained(run / "best")
    predictor = load(bundle, threads=threads)
    rows = list(open_samples(predictor.bundle.file(predictor.bundle.manifest.golden.samples), require_label=False))
    raw = [{"image": row.image, "text": row.text} for row in (rows * batch)[:batch]]
    arrays = model.preprocessing.collate(raw)
    tensors = {name: torch.from_numpy(value) for name, value in arrays.items()}

    @torch.inference_mode()
    def eager() -> None:
        model(tensors)

    def exported() -> None:
        predictor.session.run(arrays, ("logits",))

    calls = {"eager": eager, "bundle": exported}
    warm_up(calls, calls_each=_WARM_UP)
    taken = interleave(calls, seconds=seconds)
    figures: dict[str, Any] = {name: _summary(values) for name, values in taken.items()}
    ratio = figures["bundle"]["p50_ms"] / figures["eager"]["p50_ms"]
    return figures | {
        "ratio_of_medians": ratio,
        "batch": batch,
        "text_length": int(arrays["input_ids"].shape[1]),
        "threads": threads,
        "machine": describe_machine(),
    }


def _summary(values: NDArray[np.float64]) -> dict[str, float]:
    p50, p95 = np.percentile(values, [50, 95])
    return {"p50_ms": float(p50), "p95_ms": float(p95), "calls": len(values)}


if __name__ == "__main__":
    raise SystemExit(run_app(app))
