"""The trials of reliability find what is planted, and a sample of them runs here without a fault.

The whole: ``python -m benchmarks reliability`` (docs/reliability.md).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from random import Random

import pytest

from benchmarks.reliability import inputs
from benchmarks.reliability.inputs import Found
from benchmarks.reliability.kit import Kit
from benchmarks.reliability.mutate import mutate_bytes, mutate_json
from benchmarks.reliability.report import page, read_results, write_report
from benchmarks.reliability.trial import tried
from mope_deploy.errors import DataError


def test_mutants_are_the_same_for_the_same_seed_and_mostly_differ() -> None:
    data, document = bytes(range(256)) * 4, json.dumps({"a": [1, 2.5, "x"], "b": {"c": None}})
    for mutate, source in ((mutate_bytes, data), (mutate_json, document)):
        once, again = ([mutate(source, Random(f"{seed}")) for seed in range(200)] for _ in range(2))  # type: ignore[operator]
        assert once == again
        assert sum(mutant != source for mutant in once) > 180
        assert len(set(once)) > 150


def refuse(_: Random) -> str | None:
    raise DataError("line 3: no label")


class Raw(DataError):
    """An error that forgot what every other one sees to."""

    def __str__(self) -> str:
        return "label \x1b[2J"


def refuse_raw(_: Random) -> str | None:
    raise Raw("label")


def fail(_: Random) -> str | None:
    raise KeyError("a")


def test_what_counts_as_a_fault() -> None:
    random = Random(0)
    assert tried(lambda _: None, random) == ("used", "")
    assert tried(lambda _: "other weights", random) == ("wrong", "other weights")
    assert tried(refuse, random) == ("refused", "line 3: no label")
    assert tried(refuse_raw, random)[0] == "wrong"
    assert tried(fail, random) == ("traceback", "KeyError: 'a'")


def test_a_hang_and_a_crash_are_found_and_the_rest_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in for the process: mutant 2 hangs, mutant 4 crashes."""
    script = tmp_path / "stand_in.py"
    script.write_text(
        """
import json, os, sys, time
say = lambda **what: print(json.dumps(what), flush=True)
first, last = map(int, sys.argv[-2:])
say(ready=True)
for number in range(first, last):
    say(begins=number)
    if number == 2: time.sleep(60)
    if number == 4: os.abort()
    say(number=number, outcome="refused", detail="", seconds=0.1, kilobytes=1024)
""",
        encoding="utf-8",
    )
    popen = inputs.subprocess.Popen

    def start(call: list[str], **options: object) -> object:
        return popen([sys.executable, str(script), *call[3:]], **options)  # type: ignore[call-overload]

    monkeypatch.setattr(inputs.subprocess, "Popen", start)
    monkeypatch.setattr(inputs, "HANG_S", 1.0)
    began = time.monotonic()
    found = inputs.try_inputs(Kit(tmp_path), "rows", 6)
    assert time.monotonic() - began < 50
    assert dict(found.outcomes) == {"refused": 4, "hang": 1, "crash": 1}
    assert [number for number, _ in found.faults] == [2, 4]


def test_a_report_is_kept_and_read_again(tmp_path: Path) -> None:
    found = Found()
    found.add(0, "used", "")
    found.add(7, "traceback", "KeyError: 'a|b'")
    results = {"rows": {"about": "damaged inputs", "count": 2, **found.to_dict()}}
    write_report(tmp_path / "r.json", results, quick=True)
    assert read_results(tmp_path / "r.json", quick=True)["rows"]["outcomes"] == {"used": 1, "traceback": 1}
    assert read_results(tmp_path / "r.json", quick=False) == {}
    text = (tmp_path / "r.md").read_text(encoding="utf-8")
    assert "| rows, damaged inputs | 2 | 1 | 0 | 1 |" in text
    assert "- 7: traceback: KeyError: 'a/b'" in text
    assert page(json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))) == text
