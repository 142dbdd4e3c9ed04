"""Whole training runs on tiny encoders: what is written, what repeats, what is computed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

import train.loop
from mope_deploy.data import open_samples
from mope_deploy.errors import CheckpointError, ConfigError, MopeError
from mope_deploy.metrics import report
from mope_deploy.model import MoPE
from mope_deploy.task import SingleLabel
from tests.tiny import LABELS
from tests.train.tools import assert_same, differ, logged, moved_rows, read_rows, trained, weights, write_rows
from train.config import Recipe
from train.loop import Loop
from train.resume import newest
from train.run import Outcome, plan
from train.run_folder import Run

Make = Callable[..., Recipe]
pytestmark = pytest.mark.usefixtures("no_pictures")


def test_a_run_folder_holds_what_is_documented(finished: Outcome, tiny: Path) -> None:
    folder = finished.run.folder
    names = {path.name for path in folder.iterdir()}
    assert names == {
        *("run.json", "config.yaml", "best", "last", "metrics.jsonl", "evaluation.json"),
        *("confusion_matrix.png", "expert_usage.png", "tensorboard", "checkpoints"),
    }
    run = finished.run.read()
    assert (run["schema"], run["status"], run["checkpoint"], run["steps"]) == (1, "finished", "best", 24)
    assert run["data"]["test"] == str((tiny / "test.jsonl").resolve())
    assert run["data"]["rows"] == {"train": 60, "validation": 24, "test": 26}
    assert run["metrics"]["test"]["accuracy"] == finished.evaluation["accuracy"]
    assert yaml.safe_load((folder / "config.yaml").read_text())["optim"]["lr_main"] == 1e-2
    lines = read_rows(finished.run.metrics)
    assert [line["step"] for line in lines if line["kind"] == "validation"] == [8, 16, 24]
    assert {"loss", "importance_loss", "lr_main", "lr_complementary", "grad_norm"} <= lines[0].keys()
    assert any("tfevents" in path.name for path in (folder / "tensorboard").iterdir())
    assert not list(folder.rglob(".*")), "temporary files were left"


def test_the_evaluation_is_that_of_the_best_checkpoint_on_the_whole_path(finished: Outcome, tiny: Path) -> None:
    """Recomputed from the checkpoint folder alone, sample by sample, with the device's preprocessing."""
    model = MoPE.from_pretrained(finished.run.best)
    decided, routing, true, groups = [], [], [], []
    for sample in open_samples(tiny / "test.jsonl", task=SingleLabel(LABELS)):
        arrays = model.preprocessing.collate([sample.load(model.preprocessing)])
        with torch.no_grad():
            out = model({name: torch.from_numpy(array) for name, array in arrays.items()})
        decided.append(int(out.logits.argmax()))
        routing.append(out.routing[0].numpy())
        true.append(LABELS.index(sample.label))  # type: ignore[arg-type]
        groups.append(sample.extra["template"])
    expected = report(np.array(true), np.array(decided), LABELS)
    found = finished.evaluation
    assert {key: found[key] for key in expected} == expected
    for name, group in found["by"]["template"].items():
        right = [t == d for t, d, g in zip(true, decided, groups, strict=True) if g == name]
        assert group == {"samples": len(right), "accuracy": pytest.approx(np.mean(right))}
    for c, label in enumerate(LABELS):
        mean = np.mean([r for r, t in zip(routing, true, strict=True) if t == c], axis=0)
        assert found["routing"]["mean_weight"][label] == pytest.approx(mean, abs=1e-3)
    assert found["parameters"]["trained"] == sum(p.numel() for p in model.trained_parameters().values())


def test_the_best_checkpoint_is_the_one_with_the_best_validation(finished: Outcome) -> None:
    scores = [line["accuracy"] for line in logged(finished.run, "validation")]
    best = finished.run.read()["metrics"]["validation"]
    assert best == {"accuracy": max(scores), "epoch": scores.index(max(scores)) + 1}


def test_best_is_kept_when_later_epochs_are_worse(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    scores, compute = iter([0.5, 0.9, 0.7]), train.loop.report
    monkeypatch.setattr("train.loop.report", lambda *args: compute(*args) | {"accuracy": next(scores)})
    run = trained(recipe()).run
    assert run.read()["metrics"]["validation"] == {"accuracy": 0.9, "epoch": 2}
    assert_same(weights(run, "best"), load_file(run.checkpoints / "checkpoint-16" / "model.safetensors"))
    assert differ(weights(run, "best"), weights(run, "last"))


def test_a_best_model_that_was_damaged_meanwhile_is_one_line(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    original = train.loop.Loop.train

    def damaging(self: train.loop.Loop) -> bool:
        done = original(self)
        (self.run.best / "model.safetensors").write_bytes(b"damaged")
        return done

    monkeypatch.setattr(train.loop.Loop, "train", damaging)
    with pytest.raises(CheckpointError, match=r"best/model\.safetensors cannot be read: ") as caught:
        trained(recipe("train.max_steps=1"))
    assert "\n" not in str(caught.value)


def test_a_standalone_run_loads_where_its_encoders_are_gone(
    recipe: Make, values: dict[str, Any], tiny: Path, tmp_path: Path
) -> None:
    copies = {name: shutil.copytree(tiny / name, tmp_path / name) for name in ("vit", "bert")}
    values["model"]["main"]["source"] = f"dir:{copies['vit']}"
    values["model"]["complementary"][0]["source"] = f"dir:{copies['bert']}"
    run = trained(recipe("train.epochs=1", "run.standalone=true")).run
    for copy in copies.values():
        shutil.rmtree(copy)
    assert MoPE.from_pretrained(run.best).config.experts == 4
    with pytest.raises(ConfigError, match="no encoder at"):
        MoPE.from_pretrained(run.last)


def test_resume_states_hold_the_trained_tensors_and_nothing_frozen(finished: Outcome) -> None:
    model = MoPE.from_pretrained(finished.run.last)
    state = newest(finished.run)
    assert state is not None
    assert state.folder.name == "checkpoint-24"
    stored = load_file(state.folder / "model.safetensors")
    assert stored.keys() == model.trained_state().keys()
    assert_same(stored, weights(finished.run))
    assert {path.name for path in state.folder.iterdir()} == {
        *("model.safetensors", "training.pt", "random-0.pt", "progress.json", "complete.json"),
    }
    training = torch.load(state.folder / "training.pt", weights_only=True)
    names = list(model.trained_parameters())
    assert sum(len(group["params"]) for group in training["optimiser"]["param_groups"]) == len(names)
    assert {path.name for path in finished.run.checkpoints.iterdir()} == {"checkpoint-16", "checkpoint-24"}


def test_frozen_encoders_are_untouched_and_every_trained_tensor_moves(
    recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[MoPE] = []
    before: dict[str, Tensor] = {}
    train = Loop.train

    def spied(self: Loop) -> bool:
        models.append(self.model)
        before.update({name: value.detach().clone() for name, value in self.model.named_parameters()})
        return train(self)

    monkeypatch.setattr(Loop, "train", spied)
    trained(recipe("train.epochs=1"))
    after = dict(models[0].named_parameters())
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert moved == set(models[0].trained_parameters())


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(
    recipe: Make, finished: Outcome, tmp_path: Path
) -> None:
    again = trained(recipe("train.tensorboard=true", "data.group_by=template"))
    assert_same(weights(again.run), weights(finished.run))
    assert_same(weights(again.run, "best"), weights(finished.run, "best"))
    assert again.evaluation == finished.evaluation
    kept = [
        [{key: value for key, value in line.items() if key not in ("time", "runtime")} for line in read_rows(path)]
        for path in (again.run.metrics, finished.run.metrics)
    ]
    assert kept[0] == kept[1]
    other = trained(recipe("seed=4", "train.epochs=1", f"run.dir={tmp_path / 'other'}"))
    assert differ(weights(finished.run), weights(other.run))


def test_a_loss_that_is_not_a_number_ends_the_run_with_advice(recipe: Make) -> None:
    with pytest.raises(
        MopeError, match=r"training diverged before step \d+: the loss is (nan|inf).*lower optim.lr_main"
    ):
        trained(recipe("optim.lr_main=1e30", "optim.warmup_steps=0", "optim.schedule=constant", "optim.clip=0"))
    assert Run(Path(recipe().run.dir or "")).read()["status"] == "failed"


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_changes_nothing_but_rounding(recipe: Make, tmp_path: Path, parts: int) -> None:
    """Without randomness and importance loss, parts of a batch add up to it; the last one has 7 rows, as 6 and 1."""
    plain = ("model.noise=0", "model.prompt_dropout=0", "train.importance_weight=0", "train.epochs=1")
    sizes = ("train.batch_size=24", "optim.clip=0", "optim.schedule=constant", "optim.warmup_steps=0")
    rows = moved_rows(Path(recipe().data.train or ""))
    few = write_rows(tmp_path / "train.jsonl", rows[:55])  # the last batch has 7
    made = []
    for accumulation in (1, parts):
        where = f"run.dir={tmp_path / str(accumulation)}"
        made.append(
            trained(recipe(*plain, *sizes, f"data.train={few}", f"train.accumulation={accumulation}", where)).run
        )
    whole, halves = made
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(halves)[name], value, rtol=1e-3, atol=2e-4)
    losses = [[line["loss"] for line in logged(run, "train")] for run in made]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_cached_features_and_batches_made_by_workers_train_the_same_model(recipe: Make, tmp_path: Path) -> None:
    bare = ("model.complementary.0.prompts=0", "model.y_norm=standardise", "train.epochs=1")
    cached, whole = (
        trained(recipe(*bare, f"train.cache_y={choice}", f"run.dir={tmp_path / choice}"))
        for choice in ("true", "false")
    )
    for name, value in weights(whole.run).items():
        torch.testing.assert_close(weights(cached.run)[name], value, rtol=1e-3, atol=2e-4)
    by_workers = trained(recipe(*bare, "data.workers=1", f"run.dir={tmp_path / 'workers'}"))
    assert_same(weights(by_workers.run), weights(cached.run))


def test_mixed_precision_trains_and_evaluates_in_full_precision(recipe: Make, finished: Outcome) -> None:
    outcome = trained(recipe("train.precision=bf16"))
    changed = [float((value - weights(finished.run)[name]).abs().max()) for name, value in weights(outcome.run).items()]
    assert 1e-6 < max(changed) < 0.1
    assert all(value.dtype == torch.float32 for value in weights(outcome.run).values())
    model = MoPE.from_pretrained(outcome.run.best)
    assert sum(outcome.evaluation["routing"]["mean_weight"][LABELS[0]][0]) == pytest.approx(1.0, abs=1e-3)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_a_model_without_dynamic_prompts_has_no_usage_picture(recipe: Make) -> None:
    outcome = trained(recipe("model.dynamic=false", "train.epochs=1"))
    assert "routing" not in outcome.evaluation
    assert not (outcome.run.folder / "expert_usage.png").exists()


def test_a_dry_run_counts_and_writes_nothing(recipe: Make, finished: Outcome, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    found = plan(recipe())
    assert found.rows == {"train": 60, "validation": 24, "test": 26}
    assert found.steps == 24
    assert found.parameters == finished.evaluation["parameters"]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_warning_when_fewer_samples_than_experts_are_routed(recipe: Make, capsys: pytest.CaptureFixture[str]) -> None:
    trained(recipe("model.experts=9", "train.epochs=1", "train.max_steps=2"))
    assert "warning: 8 samples are routed at a time to 9 experts" in capsys.readouterr().err
