"""What the tests of training share: rows, splits, and runs that are compared."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from mope_deploy.task import SingleLabel
from tests.tiny import LABELS
from train.config import Recipe
from train.data import Split, read_split
from train.loop import Loop
from train.run import Outcome, fit
from train.run_folder import Run, open_run

NOUNS = ("red", "blue", "card", "shows", "a", "seven", "two")


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def moved_rows(path: Path) -> list[dict[str, Any]]:
    """Rows as they may stand in a file elsewhere."""
    return [row | {"image": str(path.parent / row["image"])} for row in read_rows(path)]


def make_rows(folder: Path, split: str, count: int, *, seed: int) -> Path:
    """Rows whose pictures and texts repeat, of three labels and two templates."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(exist_ok=True)
    names = [f"images/{split}-{i}.png" for i in range(count // 2)]
    for name in names:
        Image.fromarray(rng.integers(0, 255, (40, 30, 3), dtype=np.uint8)).save(folder / name)
    texts = [" ".join(rng.choice(NOUNS, rng.integers(1, 6))) for _ in range(count // 3)]
    rows = [
        {
            "image": names[i % len(names)],
            "text": texts[rng.integers(len(texts))],
            "label": LABELS[rng.integers(3)],
            "template": "ab"[i % 2],
        }
        for i in range(count)
    ]
    return write_rows(folder / f"{split}.jsonl", rows)


def split_of(folder: Path, name: str = "train", **options: Any) -> Split:
    return read_split(name, folder / f"{name}.jsonl", **({"task": SingleLabel(LABELS)} | options))


def recipe_values(tiny: Path, run: Path) -> dict[str, Any]:
    """A recipe's raw values: 3 epochs of 8 steps, everything random switched on."""
    return {
        "name": "tiny",
        "seed": 3,
        "data": {split: str(tiny / f"{split}.jsonl") for split in ("train", "validation", "test")},
        "model": {
            "main": {"modality": "image", "source": f"dir:{tiny / 'vit'}"},
            "complementary": [{"modality": "text", "source": f"dir:{tiny / 'bert'}", "prompts": 2}],
            "labels": list(LABELS),
            "prompt_length": 2,
            "experts": 4,
        },
        "optim": {"lr_main": 1e-2, "lr_complementary": 1e-2, "schedule": "cosine", "warmup_steps": 2},
        "train": {"epochs": 3, "batch_size": 8, "eval_batch_size": 10, "log_every": 2, "tensorboard": False},
        "run": {"dir": str(run)},
    }


def trained(recipe: Recipe, run: Run | None = None) -> Outcome:
    return fit(recipe, command="test", resume=run)


def resumed(run: Run, *overrides: str) -> Outcome:
    run, recipe = open_run(run.folder, recipe=None, overrides=overrides)
    return trained(recipe, run)


def weights(run: Run, which: str = "last") -> dict[str, Tensor]:
    return load_file(run.folder / which / "model.safetensors")


def logged(run: Run, kind: str) -> list[dict[str, Any]]:
    """The lines of a kind in ``metrics.jsonl``."""
    return [line for line in read_rows(run.metrics) if line["kind"] == kind]


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


def differ(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return any(not torch.equal(value, b[name]) for name, value in a.items())


def at_step(patch: pytest.MonkeyPatch, step: int, act: Callable[[], None]) -> None:
    """Have ``act`` called during an optimiser step, counted from 0."""
    original = Loop.step

    def spied(self: Loop, batches: list[dict[str, Any]]) -> None:
        if self.progress.step == step:
            act()
        original(self, batches)

    patch.setattr(Loop, "step", spied)


def signal_at(patch: pytest.MonkeyPatch, step: int, number: signal.Signals) -> None:
    """Have this process send itself a signal during a step."""
    at_step(patch, step, lambda: os.kill(os.getpid(), number))
