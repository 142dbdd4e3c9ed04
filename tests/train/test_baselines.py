"""Baseline heads: each solves what it can solve, none what it cannot, and the reported split is never chosen by."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.tiny import tiny_model
from tests.train.test_data import split_of
from train import baselines
from train.baselines import run_baselines
from train.data import MediaCache
from train.features import Features


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "SEEDS", 2)
    monkeypatch.setattr(baselines, "ROUND_STEPS", 20)
    monkeypatch.setattr(baselines, "ROUNDS", 6)


def synthetic(count: int, seed: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Each modality holds one bit in noise: its own label is the bit, the joint label is their exclusive or."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(2, (count, 2), generator=generator)
    features = {}
    for column, name in enumerate(("image", "text")):
        noise = 0.2 * torch.randn(count, 6, generator=generator)
        noise[:, 0] += 3.0 * bits[:, column] + 5.0
        features[name] = noise
    return features, bits


def heads(monkeypatch: pytest.MonkeyPatch, tiny: Path, label: str) -> dict[tuple[str, str], dict]:
    made = [synthetic(count, seed) for seed, count in enumerate((600, 300, 300))]
    order = iter(made)
    monkeypatch.setattr(baselines, "unprompted_features", lambda *_, **__: next(order)[0])
    targets = {"text": lambda bits: bits[:, 1], "both": lambda bits: bits[:, 0] ^ bits[:, 1]}[label]
    answers = iter([targets(bits) for _, bits in made])
    monkeypatch.setattr(baselines, "_targets", lambda _: next(answers))
    model = tiny_model(tiny / "vit", tiny / "bert", labels=("no", "yes"))
    splits = (split_of(tiny), split_of(tiny, "validation"), split_of(tiny, "test"))
    features = Features(
        model.preprocessing, MediaCache(model.preprocessing, limit_mb=0), torch.device("cpu"), batch_size=8
    )
    found = run_baselines(model, splits, features, metric="accuracy", seed=0)
    return {(head["name"], head["head"]): head for head in found}


@pytest.mark.usefixtures("quick")
def test_a_label_that_one_modality_decides(monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    found = heads(monkeypatch, tiny, "text")
    for kind in ("linear", "mlp"):
        assert found["text only", kind]["accuracy"]["mean"] > 0.98
        assert found["late concatenation", kind]["accuracy"]["mean"] > 0.98
        assert found["image only", kind]["accuracy"]["mean"] < 0.6


@pytest.mark.usefixtures("quick")
def test_a_label_that_only_both_decide_together_needs_the_mlp(monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    found = heads(monkeypatch, tiny, "both")
    assert found["late concatenation", "mlp"]["accuracy"]["mean"] > 0.97
    assert found["late concatenation", "linear"]["accuracy"]["mean"] < 0.8
    assert (
        max(found[name, kind]["accuracy"]["mean"] for name in ("image only", "text only") for kind in ("linear", "mlp"))
        < 0.6
    )


@pytest.mark.usefixtures("quick")
def test_the_table_from_real_encoders(tiny: Path) -> None:
    model = tiny_model(tiny / "vit", tiny / "bert")
    splits = (split_of(tiny), split_of(tiny, "validation"), split_of(tiny, "test"))
    images = MediaCache(model.preprocessing, limit_mb=16)
    features = Features(model.preprocessing, images, torch.device("cpu"), batch_size=8)

    def run() -> list[dict]:
        return run_baselines(model, splits, features, metric="f1_macro", seed=5)

    found = run()
    assert [(head["name"], head["head"]) for head in found] == [
        (name, kind) for name in ("image only", "text only", "late concatenation") for kind in ("linear", "mlp")
    ]
    # Widths 32 and 16, three labels: a linear head has (48 + 1) · 3 parameters, an MLP (48 + 1) · 256 + 257 · 3.
    assert [head["parameters"] for head in found[4:]] == [49 * 3, 49 * 256 + 257 * 3]
    assert all(len(head["accuracy"]["seeds"]) == 2 for head in found)
    assert run() == found
