"""What was tried and what became of it: as JSON, and as a page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine
from benchmarks.reliability.inputs import HANG_S, MEMORY_MB
from mope_deploy.files import json_bytes, write_file

__all__ = ["page", "read_results", "write_report"]

_INTRODUCTION = """# Reliability

Written by `python -m benchmarks reliability`: inputs that are damaged at random, commands that are killed at random
moments, machines that refuse. Right is what is refused in one line, or used as what it says. A fault is a traceback, a
crash, no answer within {hang:g} s, a process that grows by more than {memory:,} MB, or something accepted that is not
what was written.

{machine}
"""
_USED = ("used", "recovered", "finished before")


def read_results(path: Path, *, quick: bool) -> dict[str, Any]:
    """What an earlier run of the same kind left there; nothing where there is none."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return dict(report["results"]) if report.get("quick") == quick else {}


def write_report(path: Path, results: Mapping[str, Any], *, quick: bool) -> None:
    """The JSON, and the page beside it."""
    report = {"quick": quick, "machine": describe_machine(), "results": dict(results)}
    write_file(path, json_bytes(report))
    write_file(path.with_suffix(".md"), page(report))


def page(report: Mapping[str, Any]) -> str:
    """In Markdown."""
    machine = report["machine"]
    here = f"On {machine['cores']} cores of an {machine['cpu']}, Python {machine['python']}, {machine['system']}."
    if report["quick"]:
        here += " A short form: a fiftieth of everything."
    lines = [_INTRODUCTION.format(hang=HANG_S, memory=MEMORY_MB, machine=here)]
    lines += [
        "| what | tried | used or recovered | refused | faults | slowest | memory |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, result in report["results"].items():
        outcomes = result["outcomes"]
        fine = sum(outcomes.get(key, 0) for key in _USED)
        slowest = f"{result['slowest']:.2f} s" if result["slowest"] else ""
        memory = f"{result['megabytes']:+.0f} MB" if result["megabytes"] else ""
        cells = (
            f"{name}, {result['about']}",
            f"{sum(outcomes.values()):,}",
            f"{fine:,}",
            f"{outcomes.get('refused', 0):,}",
        )
        lines.append(f"| {' | '.join(cells)} | {len(result['faults']):,} | {slowest} | {memory} |")
    for name, result in report["results"].items():
        lines += [f"\n## Faults of {name}\n"] if result["faults"] else []
        lines += [f"- {number}: {fault.replace('|', '/')}" for number, fault in result["faults"]]
    return "\n".join(lines) + "\n"
