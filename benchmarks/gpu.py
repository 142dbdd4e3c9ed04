"""What conditioning costs on a GPU: MoPE against its own two frozen encoders with a linear head, eager and compiled.

    python -m benchmarks.gpu [--batch 1,8] [--autocast none|bf16|fp16] [--seconds 5] [--json FILE]
    python -m benchmarks.gpu --device cpu --quick --no-compile     # shows that it runs, measures nothing of interest

ViT-B/16 and BERT-base with random weights, 32 tokens: no downloads, and speed does not depend on the values. The bare
pair runs the same encoder modules as their libraries do. All variants are called in turn in one process, each call
synchronised, so that a slow spell of the machine meets all of them; the ratio of medians is the figure to quote.
Products of float32 are not rounded to TF32.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from benchmarks.encoders import BarePair, Encoders
from benchmarks.graphs import make_feeds
from benchmarks.machine import describe_machine
from benchmarks.measuring import compare
from benchmarks.settings import SIZES, TEXT_LENGTH, Settings, Spec
from mope_deploy.console import out, run_app
from mope_deploy.errors import UsageError
from mope_deploy.files import json_bytes, write_file

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
_AUTOCAST = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@app.command()
def gpu(
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    batch: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1,8",
    autocast: Annotated[str, typer.Option(help="none, bf16 or fp16.")] = "none",
    experts: Annotated[int, typer.Option(min=1, help="K.")] = 16,
    top_k: Annotated[int, typer.Option(min=0, help="0 for dense routing.")] = 0,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long to measure each batch size.")] = 5.0,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Also measure torch.compile.")] = True,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny encoders: to see that it runs.")] = False,
    to: Annotated[Path | None, typer.Option("--json", help="Also write the figures there.")] = None,
) -> None:
    """Measure eager and compiled MoPE and the bare encoder pair, interleaved."""
    batches = _batches(batch)
    if device not in ("cuda", "cpu"):
        raise UsageError("--device", received=device, expected="cuda or cpu")
    if autocast not in _AUTOCAST:
        raise UsageError("--autocast", received=autocast, expected=" or ".join(_AUTOCAST))
    if autocast == "fp16" and device == "cpu":
        raise UsageError("--autocast fp16 needs a GPU", todo="use bf16 or none on a CPU")
    if top_k > experts:
        raise UsageError("--top-k", received=top_k, expected=f"at most --experts {experts}")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("PyTorch finds no GPU here", todo="add --device cpu to see that it runs")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    size = SIZES["tiny" if quick else "base"]
    encoders = Encoders(size)
    variants: dict[str, nn.Module] = {
        "bare eager": BarePair(encoders.image("vit"), encoders.text),
        "MoPE eager": encoders.mope(Spec(experts=experts, top_k=top_k)),
    }
    for name, module in list(variants.items()):
        module.to(device).eval()
        if compiled:  # each batch size gets code of its own, in the warm-up
            made = torch.compile(module, dynamic=False)
            variants[name.replace("eager", "compiled")] = made  # type: ignore[assignment]
    rows: list[dict[str, Any]] = []
    settings = Settings(folder=Path(), threads=torch.get_num_threads(), seconds=seconds)
    for count in batches:
        inputs = {name: torch.from_numpy(array).to(device) for name, array in make_feeds(size, batch=count).items()}
        calls = {name: _call(module, inputs, device, _AUTOCAST[autocast]) for name, module in variants.items()}
        found = compare(calls, settings, samples=count)
        for name, row in found.items():
            kind, _, how = name.partition(" ")
            ratio = {} if kind == "bare" else {"ratio_to_bare": row["p50_ms"] / found[f"bare {how}"]["p50_ms"]}
            rows.append({"batch": count, "name": name} | row | ratio)
    figures: dict[str, Any] = {
        "rows": rows,
        "encoders": f"{size.names['vit']} and {size.names['text']}, random weights",
        "experts": experts,
        "top_k": top_k,
        "text_length": TEXT_LENGTH,
        "autocast": autocast,
        "tf32": False,
        "machine": describe_machine() | _describe_gpu(device),
    }
    if to is not None:
        write_file(to, json_bytes(figures))
    out.print(figures["machine"]["gpu"] or figures["machine"]["cpu"], markup=False)
    for row in rows:
        text = f"batch {row['batch']:<4} {row['name']:<14} p50 {row['p50_ms']:.2f} ms   p95 {row['p95_ms']:.2f} ms"
        out.print(text + (f"   ÷ bare {row['ratio_to_bare']:.3f}" if "ratio_to_bare" in row else ""), markup=False)


def _batches(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(1 <= size <= 4096 for size in found):
        raise UsageError("--batch", received=repr(text[:60]), expected="sizes from 1 to 4,096, like 1,8")
    return found


def _call(variant: nn.Module, inputs: dict[str, Tensor], device: str, dtype: torch.dtype | None) -> Callable[[], None]:
    def call() -> None:
        context: AbstractContextManager[Any] = nullcontext() if dtype is None else torch.autocast(device, dtype)
        with torch.inference_mode(), context:
            variant(inputs)
        if device == "cuda":
            torch.cuda.synchronize()

    return call


def _describe_gpu(device: str) -> dict[str, Any]:
    if device == "cpu":
        return {"gpu": None}
    major, minor = torch.cuda.get_device_capability()
    return {"gpu": torch.cuda.get_device_name(), "compute_capability": f"{major}.{minor}", "cuda": torch.version.cuda}


if __name__ == "__main__":
    raise SystemExit(run_app(app))
