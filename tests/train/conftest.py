"""Tiny encoders, a few pictures and rows, a recipe over them, and one finished run of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mope_deploy.preprocess import Preprocessing
from tests.tiny import bert_folder, tiny_model, vit_folder
from tests.train.tools import make_rows, recipe_values, trained
from train.config import Recipe
from train.data import MediaCache
from train.recipe import check_recipe
from train.report import DECISIONS
from train.run import Outcome

# These models are too small to share among threads, and several tests may run at once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``vit/``, ``bert/`` and train, validation and test rows; never written to."""
    folder = tmp_path_factory.mktemp("tiny")
    vit_folder(folder / "vit")
    bert_folder(folder / "bert")
    for seed, (split, count) in enumerate((("train", 60), ("validation", 24), ("test", 26))):
        make_rows(folder, split, count, seed=seed)
    return folder


@pytest.fixture(scope="session")
def preprocessing(tiny: Path) -> Preprocessing:
    return tiny_model(tiny / "vit", tiny / "bert").preprocessing


@pytest.fixture
def media(preprocessing: Preprocessing) -> MediaCache:
    return MediaCache(preprocessing, limit_mb=16)


@pytest.fixture
def values(tiny: Path, tmp_path: Path) -> dict[str, Any]:
    """A recipe's raw values, which a test may change."""
    return recipe_values(tiny, tmp_path / "run")


@pytest.fixture
def recipe(values: dict[str, Any]) -> Callable[..., Recipe]:
    """Make the recipe with overrides: ``recipe("train.epochs=1", "seed=4")``."""
    return lambda *overrides: check_recipe(values, overrides, what="the test's recipe")


@pytest.fixture(scope="session")
def finished(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """An uninterrupted run that others are compared with; not to be written to."""
    values = recipe_values(tiny, tmp_path_factory.mktemp("finished") / "run")
    overrides = ["data.group_by=template", "train.tensorboard=true"]
    return trained(check_recipe(values, overrides, what="the finished run's recipe"))


@pytest.fixture
def no_pictures(finished: Outcome, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than training here; ``finished`` has its pictures, and test_report.py looks at others."""

    def draw(path: Path, *_: object, **__: object) -> None:
        path.touch()

    monkeypatch.setattr("train.reporting.usage_picture", draw)
    monkeypatch.setattr("train.reporting.DECISIONS", dict.fromkeys(DECISIONS, draw))
