"""What the plan says stands in one place stands nowhere else."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def sources(*packages: str) -> list[Path]:
    return [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]


def test_only_the_task_knows_its_kind() -> None:
    """A second kind of task is one new class in task.py and its loss in train/losses.py: no flag is asked anywhere."""
    found = sources("mope_deploy", "train", "export", "benchmarks", "examples")
    assert len(found) > 100
    asking = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in found
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if re.search(r"\bmulti_label\b", line)
    ]
    assert asking == []


def test_onnxruntime_is_imported_in_one_place() -> None:
    """Its telemetry must be off before: a second import statement could come first."""
    importing = [
        str(path.relative_to(ROOT))
        for path in sources("mope_deploy", "train", "export", "benchmarks")
        if re.search(r"^\s*(import|from) onnxruntime\b", path.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert importing == []
