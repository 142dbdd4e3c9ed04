"""What MoPE is meant to cost, and how far a measurement is from it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["TARGETS", "Target", "judge"]


@dataclass(frozen=True)
class Target:
    """One aim."""

    name: str  # what benchmarks call its value
    what: str  # for people
    limit: float | None  # the value may be so much at most; None for what is only reported
    benchmark: str  # the command that measures it
    unit: str = ""  # of value and limit; empty for ratios
    strict: bool = False  # whether the value must stay below the limit instead of reaching it


_PAIR = "exported ÷ bare pair with a linear head"
_FP32 = "32 tokens, K=16, fp32"
TARGETS = (
    Target("fp32-vit-1", f"{_PAIR}, ViT-B/16 + BERT-base, {_FP32}, batch 1", 1.01, "fp32-ratio"),
    Target("fp32-vit-8", f"{_PAIR}, ViT-B/16 + BERT-base, {_FP32}, batch 8", 1.01, "fp32-ratio"),
    Target("fp32-swin-1", f"{_PAIR}, Swin-B + BERT-base, {_FP32}, batch 1", 1.03, "fp32-ratio"),
    Target("fp32-swin-8", f"{_PAIR}, Swin-B + BERT-base, {_FP32}, batch 8", 1.03, "fp32-ratio"),
    Target("text-main", "text as main (BERT-base, 16 tokens, image y cached) ÷ bare BERT", 1.05, "text-main"),
    Target("int8-vit", "int8 ÷ int8 bare pair, ViT-B/16", 1.02, "int8-ratio"),
    Target("int8-swin", "int8 ÷ int8 bare pair, Swin-B", 1.05, "int8-ratio"),
    Target("int8-speed", "int8 ÷ fp32 on a VNNI CPU, best variant", 0.50, "int8-speed"),
    Target("experts-top1", "K = 256 ÷ K = 16, top-1", 1.01, "experts-ratio"),
    Target("experts-soft", "K = 256 ÷ K = 16, soft", 1.03, "experts-ratio"),
    Target("cached-y", "cached y ÷ main encoder alone, batch 1", 1.03, "cached-y"),
    Target("training-time", "training step, prefix ÷ token, Swin-B, batch 4: time", 0.95, "training-step"),
    Target("training-memory", "training step, prefix ÷ token, Swin-B, batch 4: peak memory", 1.00, "training-step"),
    Target("process-time", "device process: import, load, first prediction", 0.6, "device-process", "s", strict=True),
    Target("process-memory", "device process: peak memory beyond the size of the model", 120.0, "device-process", "MB"),
    Target("eager-ratio", "exported ÷ our eager, batch 1", None, "eager-ratio"),
)


def judge(results: Mapping[str, Mapping[str, Any]], *, size: str, chosen: Collection[str]) -> list[dict[str, Any]]:
    """A row for every target, in their order.

    Args:
        results: benchmark → its result's ``values`` and ``not_run``.
        size: of the encoders; verdicts on others than ``base`` say so.
        chosen: benchmarks that were asked for.

    Returns:
        ``name``, ``what``, ``benchmark``, ``limit``, ``unit``, ``value``, ``error``; ``verdict``: ``met``, ``missed``,
        ``reported`` or ``not run``; ``by``: how far a missed one is beyond its limit; ``note``.
    """
    rows = []
    for target in TARGETS:
        result = results.get(target.benchmark, {})
        found = result.get("values", {}).get(target.name)
        row = {key: getattr(target, key) for key in ("name", "what", "benchmark", "limit", "unit")}
        row |= {"value": None, "error": None, "verdict": "not run", "by": None, "note": ""}
        if found is not None:
            row |= {"value": found["value"], "error": found["error"]} | _verdict(target, found["value"])
            # digits-ve is what it is at every size.
            if size != "base" and target.benchmark != "device-process":
                row["note"] = f"of {size} encoders, which the target is not about"
        elif target.name in result.get("not_run", {}):
            row["note"] = result["not_run"][target.name]
        elif target.benchmark in chosen:
            row["note"] = result.get("error", "no value")
        else:
            row["note"] = f"python -m benchmarks {target.benchmark} was not asked for"
        rows.append(row)
    return rows


def _verdict(target: Target, value: float) -> dict[str, Any]:
    if target.limit is None:
        return {"verdict": "reported"}
    missed = value >= target.limit if target.strict else value > target.limit
    return {"verdict": "missed", "by": value - target.limit} if missed else {"verdict": "met"}
