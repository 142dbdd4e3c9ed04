"""On a GPU: ``python -m train`` trains there, and what it leaves runs anywhere."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mope_deploy.model import MoPE
from tests.tiny import tiny_inputs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]


def train(values: dict[str, Any], folder: Path, *settings: str) -> Path:
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values), encoding="utf-8")
    command = [sys.executable, "-m", "train", str(recipe), "train.device=cuda", "run.standalone=true", *settings]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Path(values["run"]["dir"])


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_few_steps(precision: str, values: dict[str, Any], tmp_path: Path) -> None:
    run = train(values, tmp_path, f"train.precision={precision}", "train.max_steps=6")
    described = json.loads((run / "run.json").read_text())
    assert described["status"] == "finished"
    assert torch.cuda.get_device_name() in json.dumps(described)
    assert losses(run)
    assert all(math.isfinite(loss) for loss in losses(run))
    model = MoPE.from_pretrained(run / "best")  # on the CPU, where a device's bundle would be exported
    assert {x.device.type for x in model.parameters()} == {"cpu"}
    with torch.inference_mode():
        assert model(tiny_inputs(3, 5)).logits.isfinite().all()


def test_it_trains_what_a_cpu_trains(values: dict[str, Any], tmp_path: Path) -> None:
    """Without dropout and noise, which each device draws for itself."""
    values["model"] |= {"noise": 0.0, "prompt_dropout": 0.0}
    there = train(values, tmp_path, "train.max_steps=6")
    here = tmp_path / "cpu"
    command = [sys.executable, "-m", "train", str(tmp_path / "recipe.yaml"), "train.device=cpu", "train.max_steps=6"]
    done = subprocess.run([*command, f"run.dir={here}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert losses(there) == pytest.approx(losses(here), rel=1e-2)  # convolutions may be rounded to TF32 there
    samples = [json.loads((run / "evaluation.json").read_text())["samples"] for run in (there, here)]
    assert samples[0] == samples[1] > 0
