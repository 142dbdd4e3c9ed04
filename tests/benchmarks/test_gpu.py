"""The GPU benchmark's arguments, and that it measures what it says; its figures need a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import BarePair, app, make_model
from mope_deploy.console import run_app

TINY = {"depth": 2, "width": 64, "heads": 4, "vocabulary": 100}


def inputs(batch: int) -> dict[str, torch.Tensor]:
    return {
        "pixel_values": torch.randn(batch, 3, 224, 224),
        "input_ids": torch.randint(1, 100, (batch, 32)),
        "attention_mask": torch.ones(batch, 32, dtype=torch.int64),
    }


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


def test_the_bare_pair_is_the_models_own_encoders() -> None:
    """The same modules, no prompts, so that the ratio is the cost of conditioning and nothing else."""
    model = make_model(experts=4, top_k=0, **TINY).eval()
    pair = BarePair(model).eval()
    assert pair.main is model.main
    batch = inputs(3)
    with torch.inference_mode():
        x = model.main.encoder(batch["pixel_values"])
        bert = model.complementary_encoders()["text"].backbone.encoder
        y = bert(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state[:, 0]
        torch.testing.assert_close(pair(batch), pair.head(torch.cat([x, y], dim=-1)))
        assert model(batch).routing.shape == (3, 2, 4)


def test_the_real_sizes_are_those_of_the_encoders_it_names() -> None:
    from benchmarks.gpu import _REAL

    with torch.device("meta"):
        model = make_model(experts=16, top_k=0, **_REAL)
    count = sum(parameter.numel() for parameter in model.main.encoder.parameters())
    assert 85e6 < count < 87e6  # ViT-B/16 without its classifier
    bert = model.complementary_encoders()["text"].backbone.encoder
    assert 108e6 < sum(parameter.numel() for parameter in bert.parameters()) < 110e6  # BERT-base without its pooler
