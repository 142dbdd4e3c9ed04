"""Tiny encoders, a few pictures and rows, and a recipe over them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tiny import LABELS, bert_folder, vit_folder
from train.config import Recipe
from train.recipe import check_recipe

# These models are too small to share among threads, and several tests may run at once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

NOUNS = ("red", "blue", "card", "shows", "a", "seven", "two")


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


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


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``vit/``, ``bert/`` and train, validation and test rows; never written to."""
    folder = tmp_path_factory.mktemp("tiny")
    vit_folder(folder / "vit")
    bert_folder(folder / "bert")
    for seed, (split, count) in enumerate((("train", 60), ("validation", 24), ("test", 26))):
        make_rows(folder, split, count, seed=seed)
    return folder


@pytest.fixture
def values(tiny: Path, tmp_path: Path) -> dict[str, Any]:
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
        "run": {"dir": str(tmp_path / "run")},
    }


@pytest.fixture
def recipe(values: dict[str, Any]) -> Callable[..., Recipe]:
    """Make the recipe with overrides: ``recipe("train.epochs=1", "seed=4")``."""
    return lambda *overrides: check_recipe(values, overrides, what="the test's recipe")
