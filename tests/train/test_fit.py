"""Whole training runs on tiny encoders: what is written, what repeats, what stops a run and what continues it."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

import train.callbacks
import train.trainer
from mope_deploy.data import open_samples
from mope_deploy.errors import CheckpointError, ConfigError, DataError, MopeError, UsageError
from mope_deploy.metrics import report
from mope_deploy.model import MoPE
from tests.tiny import LABELS
from train.config import Recipe
from train.evaluation import decide
from train.objective import Objective
from train.run import Outcome, fit, plan
from train.run_folder import Run, open_run, resumable
from train.trainer import MopeTrainer

Make = Callable[..., Recipe]


def trained(recipe: Recipe, run: Run | None = None) -> Outcome:
    return fit(recipe, command="test", resume=run)


def weights(run: Run, which: str = "last") -> dict[str, Tensor]:
    return load_file(run.folder / which / "model.safetensors")


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


def resumed(run: Run, *overrides: str) -> Outcome:
    run, recipe = open_run(run.folder, recipe=None, overrides=overrides)
    return trained(recipe, run)


@pytest.fixture(scope="module", autouse=True)
def fast_collection() -> Iterator[None]:
    """The Trainer collects garbage at every start; what was imported so far need not be looked through each time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def finished(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """An uninterrupted run that others are compared with; not to be written to."""
    from train.recipe import check_recipe

    return trained(check_recipe(base(tiny, tmp_path_factory.mktemp("finished") / "run"), what="test"))


def base(tiny: Path, folder: Path) -> dict[str, Any]:
    """As the ``values`` fixture, for fixtures that outlive a test."""
    return {
        "name": "tiny",
        "seed": 3,
        "data": {split: str(tiny / f"{split}.jsonl") for split in ("train", "validation", "test")}
        | {"group_by": "template"},
        "model": {
            "main": {"modality": "image", "source": f"dir:{tiny / 'vit'}"},
            "complementary": [{"modality": "text", "source": f"dir:{tiny / 'bert'}", "prompts": 2}],
            "labels": list(LABELS),
            "prompt_length": 2,
            "experts": 4,
        },
        "optim": {"lr_main": 1e-2, "lr_complementary": 1e-2, "schedule": "cosine", "warmup_steps": 2},
        "train": {"epochs": 3, "batch_size": 8, "eval_batch_size": 10, "log_every": 2, "tensorboard": True},
        "run": {"dir": str(folder)},
    }


@pytest.fixture(autouse=True)
def no_pictures(finished: Outcome, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than training here; ``finished`` has its pictures, and test_report.py looks at others."""
    for name in ("confusion_picture", "label_picture", "usage_picture"):
        monkeypatch.setattr(f"train.run.{name}", lambda path, *_, **__: path.touch())


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
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "validation"] == [8, 16, 24]
    assert {"loss", "importance_loss", "lr_main", "lr_complementary", "grad_norm"} <= lines[0].keys()
    assert any("tfevents" in path.name for path in (folder / "tensorboard").iterdir())
    assert not list(folder.rglob(".*")), "temporary files were left"


def test_the_evaluation_is_that_of_the_best_checkpoint_on_the_whole_path(finished: Outcome, tiny: Path) -> None:
    """Recomputed from the checkpoint folder alone, sample by sample, with the device's preprocessing."""
    model = MoPE.from_pretrained(finished.run.best)
    decided, routing, true, groups = [], [], [], []
    for sample in open_samples(tiny / "test.jsonl", labels=LABELS):
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
    lines = [json.loads(line) for line in finished.run.metrics.read_text().splitlines()]
    scores = [line["accuracy"] for line in lines if line["kind"] == "validation"]
    best = finished.run.read()["metrics"]["validation"]
    assert best == {"accuracy": max(scores), "epoch": scores.index(max(scores)) + 1}


def test_best_is_kept_when_later_epochs_are_worse(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([0.5, 0.9, 0.7])
    compute = train.trainer.report
    monkeypatch.setattr("train.trainer.report", lambda *args: compute(*args) | {"accuracy": next(scores)})
    run = trained(recipe()).run
    assert run.read()["metrics"]["validation"] == {"accuracy": 0.9, "epoch": 2}
    assert_same(weights(run, "best"), load_file(run.checkpoints / "checkpoint-16" / "model.safetensors"))
    assert any(not torch.equal(value, weights(run, "best")[name]) for name, value in weights(run, "last").items())


def test_a_standalone_run_loads_where_its_encoders_are_gone(
    recipe: Make, values: dict[str, Any], tiny: Path, tmp_path: Path
) -> None:
    copies = {name: shutil.copytree(tiny / name, tmp_path / name) for name in ("vit", "bert")}
    values["model"]["main"]["source"] = f"dir:{copies['vit']}"
    values["model"]["complementary"][0]["source"] = f"dir:{copies['bert']}"
    run = fit(recipe("train.epochs=1", "run.standalone=true"), command="test").run
    for copy in copies.values():
        shutil.rmtree(copy)
    assert MoPE.from_pretrained(run.best).config.experts == 4
    with pytest.raises(ConfigError, match="no encoder at"):
        MoPE.from_pretrained(run.last)


def test_resume_states_hold_the_trained_tensors_and_nothing_frozen(finished: Outcome) -> None:
    model = MoPE.from_pretrained(finished.run.last)
    state = resumable(finished.run)
    assert state is not None
    assert state.name == "checkpoint-24"
    stored = load_file(state / "model.safetensors")
    assert stored.keys() == model.trained_state().keys()
    assert_same(stored, weights(finished.run))
    assert {path.name for path in state.iterdir()} == {
        *("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "complete.json"),
    }
    optimizer = torch.load(state / "optimizer.pt", weights_only=True)
    names = list(model.trained_parameters())
    assert sum(len(group["params"]) for group in optimizer["param_groups"]) == len(names)


def test_frozen_encoders_are_untouched_and_every_trained_tensor_moves(recipe: Make) -> None:
    models: list[MoPE] = []
    before: dict[str, Tensor] = {}

    class Spy(MopeTrainer):
        def train(self, *args: Any, **kwargs: Any) -> Any:
            models.append(self.objective.model)
            before.update({name: value.detach().clone() for name, value in self.objective.model.named_parameters()})
            return super().train(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.run.MopeTrainer", Spy)
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
        [{key: value for key, value in json.loads(line).items() if key not in ("time", "runtime")} for line in text]
        for text in (run.metrics.read_text().splitlines() for run in (again.run, finished.run))
    ]
    assert kept[0] == kept[1]
    other = trained(recipe("seed=4", "train.epochs=1", f"run.dir={tmp_path / 'other'}"))
    assert any(not torch.equal(value, weights(finished.run)[name]) for name, value in weights(other.run).items())


SLOW = """
import sys, time
import train.callbacks as callbacks
from train.cli import main
step = callbacks.ProgressLines.on_step_end
def slow(self, *args, **kwargs):
    time.sleep(0.1)
    return step(self, *args, **kwargs)
callbacks.ProgressLines.on_step_end = slow
sys.exit(main())
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_run_continues_to_the_same_result(
    values: dict[str, Any], finished: Outcome, tmp_path: Path, number: signal.Signals
) -> None:
    """Killed in the middle of the second epoch: dropout, routing noise, order of samples and Adam all go on."""
    source = tmp_path / "recipe.yaml"
    source.write_text(yaml.safe_dump(values))
    run = Run(Path(values["run"]["dir"]))
    command = [sys.executable, "-c", SLOW, str(source), "train.save_every=3", "data.group_by=template"]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and '"step": 10' not in (
            run.metrics.read_text() if run.metrics.exists() else ""
        ):
            assert process.poll() is None, process.stderr.read()  # type: ignore[union-attr]
            time.sleep(0.02)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    state = resumable(run)
    assert state is not None
    step = int(state.name.rpartition("-")[2])
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert errors.splitlines()[-1] == f"interrupted; continue with: python -m train --resume {run.folder}"
        assert run.read()["status"] == "interrupted"
        assert 10 <= step < 16
        assert step == run.read()["step"]
    else:
        assert run.read()["status"] == "running"
        assert step == 9
    assert not (run.folder / "evaluation.json").exists()

    again = resumed(run)
    assert again.status == "finished"
    assert_same(weights(run), weights(finished.run))
    assert_same(weights(run, "best"), weights(finished.run, "best"))
    assert again.evaluation == finished.evaluation
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "validation"] == [8, 16, 24]
    steps = [line["step"] for line in lines if line["kind"] == "train"]
    assert steps == sorted(set(steps)), "steps that were repeated are listed once"


def send_at(step: int, number: signal.Signals) -> type:
    """A callback class that sends this process a signal during a step."""

    class Sender(train.callbacks.ProgressLines):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                os.kill(os.getpid(), number)

    return Sender


@pytest.mark.parametrize("step", [3, 7, 23], ids=["within an epoch", "last step of an epoch", "last step of all"])
def test_sigterm_at_any_step_loses_nothing(
    recipe: Make, finished: Outcome, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Step 7 is the last of the first epoch: its validation must happen exactly once."""
    with monkeypatch.context() as patch:
        patch.setattr("train.run.ProgressLines", send_at(step, signal.SIGTERM))
        first = trained(recipe("data.group_by=template"))
    assert first.status == ("finished" if step == 23 else "interrupted")
    if step < 23:
        assert first.run.read()["step"] == step + 1
        state = resumable(first.run)
        assert state is not None
        assert state.name == f"checkpoint-{step + 1}"
        again = resumed(first.run)
        assert again.evaluation == finished.evaluation
    assert_same(weights(first.run), weights(finished.run))
    lines = [json.loads(line) for line in first.run.metrics.read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "validation"] == [8, 16, 24]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_second_signal_ends_at_once(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.callbacks.SAME_SIGNAL_S", -1.0)

    class Impatient(train.callbacks.ProgressLines):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 10:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
                pytest.fail("the second signal did nothing")

    monkeypatch.setattr("train.run.ProgressLines", Impatient)
    outcome = trained(recipe())
    assert outcome.status == "interrupted"
    assert outcome.run.read()["status"] == "interrupted"
    state = resumable(outcome.run)
    assert state is not None
    assert state.name == "checkpoint-8"


def test_a_finished_run_can_be_given_more_epochs(recipe: Make) -> None:
    longer = ("optim.schedule=multistep", "optim.milestones=[2]")
    first = trained(recipe(*longer, "train.epochs=1"))
    again = resumed(first.run, "train.epochs=2")
    assert again.run.read()["steps"] == 16
    whole = trained(recipe(*longer, "train.epochs=2", f"run.dir={first.run.folder}-whole"))
    assert_same(weights(again.run), weights(whole.run))


def test_a_finished_run_is_not_trained_further_unasked(recipe: Make, capsys: pytest.CaptureFixture[str]) -> None:
    first = trained(
        recipe("train.epochs=9", "train.early_stopping=1", "optim.lr_main=1e-9", "optim.lr_complementary=1e-9")
    )
    assert "stopping early: 1 epochs without a better validation accuracy" in capsys.readouterr().err
    before = (first.run.folder / "run.json").read_bytes()
    with pytest.raises(UsageError, match=r"is finished; look at .*evaluation\.json; for more, raise train\.epochs"):
        resumed(first.run)
    assert (first.run.folder / "run.json").read_bytes() == before


def test_a_run_without_a_resume_state_starts_again(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Objective, "forward", lambda *_, **__: (_ for _ in ()).throw(MopeError("broken")))
        with pytest.raises(MopeError, match="broken"):
            trained(recipe("train.epochs=1"))
    run = Run(Path(recipe().run.dir or ""))
    assert run.read()["status"] == "failed"
    assert resumable(run) is None
    assert resumed(run).status == "finished"


@pytest.fixture
def interrupted(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run interrupted at step 10 of 24."""
    with monkeypatch.context() as patch:
        patch.setattr("train.run.ProgressLines", send_at(9, signal.SIGINT))
        return trained(recipe()).run


def test_a_changed_recipe_is_refused_and_harmless_changes_are_not(interrupted: Run) -> None:
    with pytest.raises(ConfigError) as caught:
        resumed(interrupted, "optim.lr_main=0.1", "train.epochs=5", "train.log_every=7")
    message = str(caught.value)
    assert "optim.lr_main (was 0.01, now 0.1)" in message
    assert "train.epochs (was 3, now 5)" in message  # cosine: every step's rate would change
    assert "log_every (was" not in message
    assert resumed(interrupted, "train.log_every=7", "train.eval_batch_size=5").status == "finished"


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"])
def test_a_damaged_resume_state_is_refused(interrupted: Run, name: str) -> None:
    state = resumable(interrupted)
    assert state is not None
    content = bytearray((state / name).read_bytes())
    content[len(content) // 2] ^= 1
    (state / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"checkpoint-10 is damaged; received {name}.*remove .*checkpoint-10"):
        resumed(interrupted)
    (state / name).unlink()
    with pytest.raises(CheckpointError, match="checkpoint-10 is damaged"):
        resumed(interrupted)


def test_a_half_written_resume_state_is_passed_over(interrupted: Run) -> None:
    state = resumable(interrupted)
    assert state is not None
    (state / "complete.json").unlink()
    older = resumable(interrupted)
    assert older is not None
    assert older.name == "checkpoint-8"


def test_data_that_changed_meanwhile_is_refused(values: dict[str, Any], tmp_path: Path, recipe: Make) -> None:
    copy = tmp_path / "validation.jsonl"
    rows = [json.loads(line) for line in Path(values["data"]["validation"]).read_text().splitlines()]
    folder = Path(values["data"]["validation"]).parent
    lines = [json.dumps(row | {"image": str(folder / row["image"])}) for row in rows]
    copy.write_text("\n".join(lines))
    first = trained(recipe(f"data.validation={copy}", "train.epochs=1"))
    copy.write_text("\n".join(lines[:-1]))
    with pytest.raises(DataError, match="changed since it was started: validation"):
        resumed(first.run, "train.early_stopping=5")


def test_early_stopping_counts_over_an_interruption(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a learning rate of almost nothing no validation is better than the first."""
    still = ("optim.lr_main=1e-12", "optim.lr_complementary=1e-12", "train.early_stopping=2", "train.epochs=9")
    whole = trained(recipe(*still, "run.dir=" + str(recipe().run.dir) + "-whole"))
    assert whole.run.read()["steps"] == 24
    with monkeypatch.context() as patch:
        patch.setattr("train.run.ProgressLines", send_at(17, signal.SIGINT))
        first = trained(recipe(*still))
    assert first.status == "interrupted"
    assert resumed(first.run).run.read()["steps"] == 24


def test_a_loss_that_is_not_a_number_ends_the_run_with_advice(recipe: Make) -> None:
    with pytest.raises(
        MopeError, match=r"training diverged before step \d+: the loss is (nan|inf).*lower optim.lr_main"
    ):
        trained(recipe("optim.lr_main=1e30", "optim.warmup_steps=0", "optim.schedule=constant", "optim.clip=0"))
    assert Run(Path(recipe().run.dir or "")).read()["status"] == "failed"


def test_accumulation_changes_nothing_but_rounding(recipe: Make, tmp_path: Path) -> None:
    """Without randomness and importance loss, two halves of a batch add up to the batch."""
    plain = ("model.noise=0", "model.prompt_dropout=0", "train.importance_weight=0", "train.max_steps=7")
    whole = trained(recipe(*plain, f"run.dir={tmp_path / 'whole'}"))
    halves = trained(recipe(*plain, "train.accumulation=2", f"run.dir={tmp_path / 'halves'}"))
    for name, value in weights(whole.run).items():
        torch.testing.assert_close(weights(halves.run)[name], value, rtol=1e-3, atol=2e-4)


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


def test_skipped_rows_are_counted_and_listed(recipe: Make, values: dict[str, Any], tiny: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (tiny / "train.jsonl").read_text().splitlines()]
    rows = [json.dumps(line | {"image": str(tiny / line["image"])}) for line in lines]
    (tmp_path / "cut.png").write_bytes(b"\x89PNG")
    rows[5:5] = ["{", json.dumps(lines[0] | {"image": "cut.png"})]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    outcome = trained(recipe(f"data.train={tmp_path / 'rows.jsonl'}", "data.skip_bad=true", "train.epochs=1"))
    data = outcome.run.read()["data"]
    assert data["rows"]["train"] == 60
    assert data["skipped"]["train"]["count"] == 2
    assert [row.split(": ")[0] for row in data["skipped"]["train"]["rows"]] == [
        f"{tmp_path / 'rows.jsonl'}:{line}" for line in (6, 7)
    ]


def test_a_run_on_a_hub_data_set_keeps_what_export_needs(recipe: Make, tiny: Path, tmp_path: Path) -> None:
    features = datasets.Features(
        {"image": datasets.Image(), "text": datasets.Value("string"), "label": datasets.ClassLabel(names=list(LABELS))}
    )
    for split in ("train", "test"):
        rows = [json.loads(line) for line in (tiny / f"{split}.jsonl").read_text().splitlines()]
        table = {
            "image": [str(tiny / row["image"]) for row in rows],
            "text": [row["text"] for row in rows],
            "label": [row["label"] for row in rows],
        }
        folder = tmp_path / "hub" / "data"
        folder.mkdir(parents=True, exist_ok=True)
        made = datasets.Dataset.from_dict(table, features=features)
        made.map(lambda row: row).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    hub = (f"data.hub={tmp_path / 'hub'}", f"data.root={tmp_path / 'rows'}")
    none = [f"data.{split}=null" for split in ("train", "validation", "test")]
    outcome = trained(recipe(*hub, *none, "model.labels=null", "train.epochs=1"))
    data = outcome.run.read()["data"]
    assert (data["validation"], data["test"]) == ("samples/validation.jsonl", "samples/test.jsonl")
    shutil.rmtree(tmp_path / "rows")
    shutil.rmtree(tmp_path / "hub")
    for split in ("validation", "test"):
        samples = list(open_samples(outcome.run.folder / data[split], labels=LABELS))
        assert len(samples) == data["rows"][split]
        assert all(sample.image.is_relative_to(outcome.run.samples) for sample in samples)  # type: ignore[union-attr]


def test_held_out_validation_is_kept_with_the_run(recipe: Make, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = trained(recipe("data.validation=null", "data.test=null", "train.epochs=1"))
    run = outcome.run.read()
    assert run["data"]["validation"] == "samples/validation.jsonl"
    assert run["data"]["test"] is None
    assert outcome.evaluation["split"] == "validation"
    rows = (outcome.run.folder / "samples" / "validation.jsonl").read_text().splitlines()
    assert len(rows) == run["data"]["rows"]["validation"] == 60 - run["data"]["rows"]["train"]
    assert all(Path(json.loads(row)["image"]).is_file() for row in rows)
    notes = capsys.readouterr().err
    assert "note: no validation rows given" in notes
    assert "note: no test rows given" in notes


def test_a_multi_label_run(recipe: Make, tiny: Path, tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        rows = [json.loads(line) for line in (tiny / f"{split}.jsonl").read_text().splitlines()]
        for i, row in enumerate(rows):
            row |= {
                "image": str(tiny / row["image"]),
                "label": [row["label"], "rare"] if i % 3 == 0 else [row["label"]],
            }
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = [f"data.{split}={tmp_path / split}.jsonl" for split in ("train", "validation", "test")]
    outcome = trained(recipe(*paths, "model.multi_label=true", "model.labels=null", "train.epochs=1"))
    assert list(outcome.evaluation["per_class"]) == ["contradiction", "entailment", "neutral", "rare"]
    assert "f1_micro" in outcome.run.read()["metrics"]["validation"]
    assert (outcome.run.folder / "confusion_matrix.png").exists()


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


def test_nothing_is_written_before_the_data_is_known_to_be_good(recipe: Make, tiny: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"image": str(tiny / "train.jsonl"), "text": "red", "label": "neutral"}))
    with pytest.raises(DataError, match=r"bad.jsonl:1: image .* is not an image.*data.skip_bad=true"):
        trained(recipe(f"data.test={bad}"))
    assert not Path(recipe().run.dir or "").exists()


def test_a_warning_when_fewer_samples_than_experts_are_routed(recipe: Make, capsys: pytest.CaptureFixture[str]) -> None:
    trained(recipe("model.experts=9", "train.epochs=1", "train.max_steps=2"))
    assert "warning: 8 samples are routed at a time to 9 experts" in capsys.readouterr().err


def test_decisions() -> None:
    logits = np.array([[0.1, -0.2, 0.0], [-3, 5, 4]], np.float32)
    assert decide(logits, multi_label=False).tolist() == [0, 1]
    assert decide(logits, multi_label=True).tolist() == [[True, False, True], [False, True, True]]
