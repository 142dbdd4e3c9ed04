"""The GPU benchmark's arguments, and that it measures what it says; its figures need a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import app
from mope_deploy.console import run_app


def test_it_runs_on_a_cpu_and_names_the_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "cpu", "--quick", "--no-compile", "--batch", "1,3", "--seconds", "0.1", "--top-k", "2"]
    assert run_app(app, [*arguments, "--json", str(tmp_path / "figures.json")]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [(row["batch"], row["name"]) for row in figures["rows"]] == [
        (1, "bare eager"),
        (1, "MoPE eager"),
        (3, "bare eager"),
        (3, "MoPE eager"),
    ]
    bare, mope = figures["rows"][:2]
    assert mope["ratio_to_bare"] == pytest.approx(mope["p50_ms"] / bare["p50_ms"])
    assert (figures["top_k"], figures["experts"], figures["tf32"]) == (2, 16, False)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == figures["machine"]["cpu"]
    assert len(printed) == 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "tpu"], "--device; received tpu; expected cuda or cpu"),
        (["--device", "cpu", "--batch", "1,x"], "--batch; received '1,x'"),
        (["--device", "cpu", "--batch", "0"], "sizes from 1"),
        (["--device", "cpu", "--autocast", "int8"], "none or bf16 or fp16"),
        (["--device", "cpu", "--autocast", "fp16"], "needs a GPU"),
        (["--device", "cpu", "--top-k", "17"], "at most --experts 16"),
    ],
)
def test_misuse(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(app, arguments) == 2
    assert words in capsys.readouterr().err


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run_app(app, []) == 2
    assert "PyTorch finds no GPU here; add --device cpu" in capsys.readouterr().err
