"""How measurements are judged and what a report holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as suite
from benchmarks.machine import describe_machine
from benchmarks.report import write_report
from benchmarks.result import Curve, Result, Table, exponent
from benchmarks.targets import TARGETS, judge


def test_targets_are_those_of_the_project() -> None:
    limits = {target.name: target.limit for target in TARGETS}
    assert len(limits) == len(TARGETS)
    assert limits == {
        "fp32-vit-1": 1.01,
        "fp32-vit-8": 1.01,
        "fp32-swin-1": 1.03,
        "fp32-swin-8": 1.03,
        "text-main": 1.05,
        "int8-vit": 1.02,
        "int8-swin": 1.05,
        "int8-speed": 0.50,
        "experts-top1": 1.01,
        "experts-soft": 1.03,
        "cached-y": 1.03,
        "training-time": 0.95,
        "training-memory": 1.00,
        "process-time": 0.6,
        "process-memory": 120.0,
        "eager-ratio": None,
    }
    assert {target.benchmark for target in TARGETS} <= set(suite.BENCHMARKS)


def test_verdicts() -> None:
    results = {
        "fp32-ratio": {
            "values": {"fp32-vit-1": {"value": 1.01, "error": 0.002}, "fp32-vit-8": {"value": 1.05, "error": None}},
            "not_run": {"fp32-swin-1": "no Swin"},
        },
        "device-process": {"values": {"process-time": {"value": 0.6, "error": 0.1}}, "not_run": {}},
        "eager-ratio": {"values": {"eager-ratio": {"value": 0.5, "error": 0.1}}, "not_run": {}},
        "int8-ratio": {"error": "it failed"},
    }
    rows = {row["name"]: row for row in judge(results, size="base", chosen=["fp32-ratio", "int8-ratio"])}
    assert list(rows) == [target.name for target in TARGETS]
    assert (rows["fp32-vit-1"]["verdict"], rows["fp32-vit-1"]["by"]) == ("met", None)
    assert rows["fp32-vit-8"]["verdict"] == "missed"
    assert rows["fp32-vit-8"]["by"] == pytest.approx(0.04)
    assert (rows["fp32-swin-1"]["verdict"], rows["fp32-swin-1"]["note"]) == ("not run", "no Swin")
    assert (rows["process-time"]["verdict"], rows["process-time"]["by"]) == ("missed", 0.0)  # below, not at
    assert (rows["eager-ratio"]["verdict"], rows["eager-ratio"]["limit"]) == ("reported", None)
    assert rows["int8-vit"]["note"] == "it failed"
    assert "text-main was not asked for" in rows["text-main"]["note"]
    rows = {row["name"]: row for row in judge(results, size="small", chosen=["fp32-ratio"])}
    assert rows["fp32-vit-1"]["note"] == "of small encoders, which the target is not about"
    assert rows["process-time"]["note"] == ""


def test_exponents() -> None:
    x = [1.0, 2.0, 4.0, 8.0]
    assert exponent(x, [3 * value**1.5 for value in x]) == pytest.approx(1.5)
    assert exponent(x, [7.0] * 4) == pytest.approx(0.0)
    points = tuple({"x": value, "p50_ms": value**2, "p95_ms": 1.0, "p99_ms": 1.0, "samples_per_s": 1.0} for value in x)
    curve = Curve("t", "K", {"many": points, "one": points[:1]})
    assert curve.exponents == pytest.approx({"many": 2.0})


def report_of(results: dict[str, Result]) -> dict[str, Any]:
    documents = {name: result.to_dict() for name, result in results.items()}
    return {
        "schema": 1,
        "command": "python -m benchmarks all",
        "machine": describe_machine(),
        "settings": {"size": "tiny", "form": "token", "threads": 2, "rounds": 3, "seconds": 0.1},
        "results": documents,
        "targets": judge(documents, size="tiny", chosen=list(documents)),
    }


def test_a_report(tmp_path: Path) -> None:
    points = tuple(
        {"x": x, "p50_ms": 2.0 * x, "p95_ms": 3.0 * x, "p99_ms": 4.0 * x, "samples_per_s": 500 / x} for x in (1.0, 4.0)
    )
    result = Result(
        about="A and B.",
        tables=(Table("a | b", ("name", "ms"), (("x|y", "1.25"), ("z", "2.50"))),),
        curves=(Curve("latency against K", "K", {"dense": points}),),
        values={"experts-soft": {"value": 1.2, "error": 0.01}},
        not_run={"experts-top1": "no top-1"},
    )
    files = write_report(tmp_path / "r.json", report_of({"experts-ratio": result}))
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(file.name for file in files)
    assert [file.name for file in files] == ["r.json", "r.md", "r-latency-against-k.svg"]
    document = json.loads(files[0].read_text())
    assert document["results"]["experts-ratio"]["curves"][0]["exponents"] == {"dense": pytest.approx(1.0)}
    page = files[1].read_text()
    assert "| x\\|y | 1.25 |" in page
    assert "| --- | ---: |" in page
    assert "![latency against K](r-latency-against-k.svg)" in page
    assert "| 1.03 | 1.200 ± 0.010 | missed by 0.170 (of tiny encoders" in page
    assert "Not run: no top-1." in page
    assert ">dense, p = 1.00</text>" in files[2].read_text()


def test_the_machine() -> None:
    found = describe_machine()
    json.dumps(found, allow_nan=False)
    assert {"cpu", "cores", "governor", "power_mode", "gpus", "int8_instructions", "versions", "load"} <= set(found)
    assert found["cores"] >= 1
