"""Two CPU processes: the same batches, gradients, importance and validation as one, and both stop together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mope_deploy.errors import ConfigError
from tests.train.tools import logged, moved_rows, write_rows
from train.config import Recipe
from train.machine import set_up
from train.run import fit
from train.run_folder import Run

# No randomness but the order of samples, and an importance loss that counts as much as the task's.
PLAIN = {"noise": 0.0, "prompt_dropout": 0.0}


def test_two_processes_train_what_one_does(
    values: dict[str, Any], recipe: Callable[..., Recipe], tiny: Path, tmp_path: Path
) -> None:
    # 56 rows make 7 whole batches: the rest of a batch at an epoch's end would be filled up with repeated rows.
    values["data"]["train"] = str(write_rows(tmp_path / "train.jsonl", moved_rows(tiny / "train.jsonl")[:56]))
    values["model"] |= PLAIN
    values["train"] |= {"epochs": 2, "importance_weight": 1.0, "importance_threshold": 0.0}
    alone = fit(recipe(f"run.dir={tmp_path / 'alone'}"), command="test")
    without = fit(recipe(f"run.dir={tmp_path / 'without'}", "train.importance_weight=0"), command="test")

    source = tmp_path / "recipe.yaml"
    source.write_text(yaml.safe_dump(values))
    driver = Path(__file__).with_name("distributed_driver.py")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(driver),
        str(source),
        str(tmp_path / "meeting point"),
    ]
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = Path(values["run"]["dir"])
    assert json.loads((folder / "run.json").read_text())["machine"]["processes"] == 2

    pair = load_file(folder / "last" / "model.safetensors")
    one = load_file(alone.run.last / "model.safetensors")
    assert pair.keys() == one.keys()
    for name, value in one.items():
        torch.testing.assert_close(
            pair[name], value, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
    other = load_file(without.run.last / "model.safetensors")
    assert max(float((other[name] - value).abs().max()) for name, value in one.items()) > 0.01

    # 24 validation rows divide into 3 batches of 10, so the processes share them unevenly: none may count twice.
    for found, expected in zip(logged(Run(folder), "validation"), logged(alone.run, "validation"), strict=True):
        assert (found["step"], found["accuracy"]) == (expected["step"], expected["accuracy"])
    assert done.stderr.count("parameters train") == 2, "one line a start: only the first process prints"
    assert "Warning" not in done.stderr


def test_a_batch_that_the_processes_cannot_share_is_refused(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match=r"train.batch_size: received 8, expected a multiple of 6 \(3 processes × 2"):
        set_up(recipe("train.accumulation=2"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing on a machine without a GPU")
def test_what_the_machine_lacks_is_named(recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(ConfigError, match=r"received cuda.*; train.precision: received fp16, which needs a GPU"):
        set_up(recipe("train.device=cuda", "train.precision=fp16"))
