"""One training step: forward, cross entropy and importance loss, backward, AdamW. Time, and memory at its peak."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.child import run_child
from benchmarks.encoders import Encoders
from benchmarks.graphs import Workshop, make_feeds
from benchmarks.measuring import compare
from benchmarks.result import LATENCY, Result, Table, latency_columns, ratio_column
from benchmarks.settings import FORMS, SIZES, Spec
from mope_deploy.model import MoPE, importance_loss
from mope_deploy.model.backbones import Form

__all__ = ["peak_of_steps", "training_step"]

BATCH = 4
_IMPORTANCE = 0.01  # its weight in the loss
_STEPS = 3
_CODE = """
import json, sys
from benchmarks.training_step import peak_of_steps
print(json.dumps({"bytes": peak_of_steps(*sys.argv[1:])}))
"""


def training_step(workshop: Workshop) -> Result:
    """A step of each form against the bare encoders' forward pass, for a ViT and for a Swin, batch 4."""
    settings, rows, values = workshop.settings, [], {}
    feeds = make_feeds(settings.encoders, batch=BATCH)
    for image in ("vit", "swin"):
        pair = workshop.open(Spec(kind="bare", image=image, eager=True))
        calls: dict[str, Callable[[], object]] = {"bare pair, forward": partial(pair, feeds)}
        peaks = {}
        for form in FORMS:
            name = f"step, {form} form"
            calls[name] = step(workshop.encoders.mope(Spec(image=image)), feeds, form)
            peaks[name] = run_child(_CODE, form, settings.size, image, threads=settings.threads)["bytes"]
        found = compare(calls, settings, samples=BATCH)
        for name, row in found.items():
            peak = f"{peaks[name] / 2**20:,.0f}" if name in peaks else "–"
            rows.append((settings.encoders.names[image], name, *latency_columns(row), ratio_column(row), peak))
        if image == "swin":
            times = {name: row["p50_ms"] for name, row in found.items()}
            for target, cost in (("training-time", times), ("training-memory", peaks)):
                values[target] = {"value": cost["step, prefix form"] / cost["step, token form"], "error": None}
    columns = ("image encoder", "", *LATENCY, "÷ bare forward", "peak MiB")
    return Result(
        about=f"Eager PyTorch, batch {BATCH}, K=16, L=6: forward, cross entropy + {_IMPORTANCE} importance "
        f"loss, backward, AdamW. Peak: what {_STEPS} steps take beyond the loaded model, in a process of their own.",
        tables=(Table("training step", columns, tuple(rows)),),
        values=values,
    )


def step(model: MoPE, feeds: dict[str, Any], form: Form) -> Callable[[], object]:
    """One whole step in a form, ready to be called again and again."""
    inputs = {name: torch.from_numpy(array) for name, array in feeds.items()}
    targets = torch.arange(len(feeds["pixel_values"])) % len(model.config.labels)
    optimiser = torch.optim.AdamW(model.trained_parameters().values(), lr=4e-4, weight_decay=1e-3)
    model.train()

    def call() -> object:
        out = model(inputs, form=form)
        loss = nn.functional.cross_entropy(out.logits, targets) + _IMPORTANCE * importance_loss(out.soft_routing)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        return loss

    return call


def peak_of_steps(form: Form, size: str, image: str) -> int:
    """Bytes that a few steps take at their peak beyond the loaded model; for a process of its own."""
    from mope_deploy.bench.board import peak_memory, resident_memory

    call = step(Encoders(SIZES[size]).mope(Spec(image=image)), make_feeds(SIZES[size], batch=BATCH), form)
    before = resident_memory()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forgets the peak of building the model
    for _ in range(_STEPS):
        call()
    after = peak_memory()
    assert before is not None
    assert after is not None
    return after - before
