"""Figures of several machines on one page; nothing is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import seeds
from mope_deploy.console import run_app


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Finished runs of two seeds."""
    for seed, accuracy in enumerate((0.75, 0.81)):
        run = tmp_path / f"runs/digits-ve-seed{seed}"
        run.mkdir(parents=True)
        evaluation: dict[str, Any] = {
            "split": "test",
            "accuracy": accuracy,
            "parameters": {"trained": 1000, "total": 20_000},
            "by": {"rule": {"parity": {"accuracy": 0.9}, "identity": {"accuracy": 0.8}}},
            "routing": {"used_experts": [15, 16], "experts": 16},
        }
        if seed == 0:
            evaluation["baselines"] = [
                {"name": "image only", "head": "mlp", "accuracy": {"mean": 0.333}, "parameters": 33_795}
            ]
        (run / "evaluation.json").write_text(json.dumps(evaluation))
        described = {"metrics": {"validation": {"epoch": 6, "accuracy": 0.7}}, "seconds": {"training": 214.4}}
        (run / "run.json").write_text(json.dumps(described))
    return tmp_path / "runs"


def call(runs: Path, *arguments: object) -> int:
    common = ["digits-ve", "--seeds", 2, "--runs", runs]
    return run_app(seeds.app, [str(argument) for argument in (*common, *arguments)])


def test_machines_are_kept_apart_and_together(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, page = tmp_path / "results.json", tmp_path / "results.md"
    for cpu in ("Epyc", "Xeon", "Epyc"):  # the same one again is not counted twice
        machine = {"cpu": cpu, "cores": 2, "memory_gib": 8.0, "system": "Linux x86_64"}
        monkeypatch.setattr(seeds, "describe_machine", lambda machine=machine: machine)
        assert call(runs, "--json", kept, "--markdown", page) == 0
    lines = page.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# digits-ve: 4 runs, all of them"
    assert [line for line in lines if line.startswith("## ")] == [
        f"## 2 cores of {cpu}, 8.0 GiB, Linux x86_64" for cpu in ("Epyc", "Xeon")
    ]
    assert "All runs: mean 78.0, median 78.0, lowest 75.0, highest 81.0." in lines
    assert lines.count("| 0 | 75.0 | 80.0 | 90.0 | 70.0 | 15, 16 of 16 | 214 |") == 2
    assert "| image only, mlp | 33.3 | 33,795 |" in lines


def test_what_is_not_known_is_a_dash(runs: Path, tmp_path: Path) -> None:
    kept = tmp_path / "results.json"
    assert call(runs, "--json", kept) == 0
    known = json.loads(kept.read_text())
    known["machines"]["another"] = {"seeds": [{"accuracy": 0.708}]}
    assert "| 0 | 70.8 | – | – | – |" in seeds.page(known)


@pytest.mark.parametrize("content", ["no JSON", "[]", '{"recipe": "own-data", "settings": [], "machines": {}}'])
def test_figures_of_another_recipe_are_not_mixed_in(
    content: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "results.json"
    kept.write_text(content)
    assert call(runs, "--json", kept) == 2
    assert "figures of digits-ve with the same --set" in " ".join(capsys.readouterr().err.split())
    assert kept.read_text() == content
