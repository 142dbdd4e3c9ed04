"""Baseline heads: each solves what it can solve, none what it cannot, and the reported split is never chosen by."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mope_deploy.task import MultiLabel, SingleLabel, Task
from tests.tiny import tiny_model
from tests.train.tools import split_of
from train import baselines
from train.baselines import run_baselines
from train.data import MediaCache, Split
from train.features import Features


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "SEEDS", 2)


def synthetic(count: int, seed: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Each modality holds one bit in noise: its own label is the bit, the joint label is their exclusive or."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(2, size=(count, 2))
    features = {}
    for column, name in enumerate(("image", "text")):
        features[name] = (0.2 * rng.standard_normal((count, 6))).astype(np.float32)
        features[name][:, 0] += 3.0 * bits[:, column] + 5.0
    return features, bits


def heads(
    monkeypatch: pytest.MonkeyPatch, targets: Callable[[np.ndarray], np.ndarray], task: Task
) -> dict[tuple[str, str], dict]:
    """Heads on synthetic features, whose targets are made of the two bits (n, 2)."""
    made = {
        name: synthetic(count, seed)
        for seed, (name, count) in enumerate((("train", 600), ("validation", 300), ("test", 300)))
    }
    monkeypatch.setattr(baselines, "unprompted_features", lambda model, split, features: made[split.name][0])
    splits = [Split(name, Path(name), task, {}, {}, targets(bits)) for name, (_, bits) in made.items()]
    found = run_baselines(None, splits, None, metric=task.metric, seed=0)  # type: ignore[arg-type]
    return {(head["name"], head["head"]): head for head in found}


@pytest.mark.usefixtures("quick")
def test_a_label_that_one_modality_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    found = heads(monkeypatch, lambda bits: bits[:, 1], SingleLabel(("no", "yes")))
    for kind in ("linear", "mlp"):
        assert found["text only", kind]["accuracy"]["mean"] > 0.98
        assert found["late concatenation", kind]["accuracy"]["mean"] > 0.98
        assert found["image only", kind]["accuracy"]["mean"] < 0.6


@pytest.mark.usefixtures("quick")
def test_a_label_that_only_both_decide_together_needs_the_mlp(monkeypatch: pytest.MonkeyPatch) -> None:
    found = heads(monkeypatch, lambda bits: bits[:, 0] ^ bits[:, 1], SingleLabel(("no", "yes")))
    assert found["late concatenation", "mlp"]["accuracy"]["mean"] > 0.97
    assert found["late concatenation", "linear"]["accuracy"]["mean"] < 0.8
    assert (
        max(found[name, kind]["accuracy"]["mean"] for name in ("image only", "text only") for kind in ("linear", "mlp"))
        < 0.6
    )


@pytest.mark.usefixtures("quick")
def test_several_labels_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both bits are labels, and a third is never there: concatenation knows all, a modality its own bit."""
    targets = lambda bits: np.concatenate([bits, 0 * bits[:, :1]], axis=1).astype(bool)  # noqa: E731
    found = heads(monkeypatch, targets, MultiLabel(("first", "second", "never")))
    for kind in ("linear", "mlp"):
        assert found["late concatenation", kind]["accuracy"]["mean"] > 0.97
        assert found["late concatenation", kind]["validation"]["mean"] > 0.97
        assert found["text only", kind]["accuracy"]["mean"] < 0.7


def test_training_rows_of_one_label_have_no_baselines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert heads(monkeypatch, lambda bits: 0 * bits[:, 0], SingleLabel(("no", "yes"))) == {}
    assert "all training rows have the same label" in capsys.readouterr().err


@pytest.mark.usefixtures("quick")
def test_the_table_from_real_encoders(tiny: Path) -> None:
    model = tiny_model(tiny / "vit", tiny / "bert")
    splits = (split_of(tiny), split_of(tiny, "validation"), split_of(tiny, "test"))
    images = MediaCache(model.preprocessing, limit_mb=16)
    features = Features(images, torch.device("cpu"), batch_size=8)

    def run() -> list[dict]:
        return run_baselines(model, splits, features, metric="f1_macro", seed=5)

    found = run()
    assert [(head["name"], head["head"]) for head in found] == [
        (name, kind) for name in ("image only", "text only", "late concatenation") for kind in ("linear", "mlp")
    ]
    # Widths 32 and 16, three labels: a linear head has (48 + 1) · 3 parameters, an MLP (48 + 1) · 256 + 257 · 3.
    assert [head["parameters"] for head in found[4:]] == [49 * 3, 49 * 256 + 257 * 3]
    assert [len(head["accuracy"]["seeds"]) for head in found] == [1, 2] * 3
    assert run() == found
