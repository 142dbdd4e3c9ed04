"""Training on sound: a text names a pitch, a synthetic tone has one, the label says whether they agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from mope_deploy.errors import ConfigError, DataError
from mope_deploy.model import MoPE, build_model
from mope_deploy.task import SingleLabel
from tests.media import audio_folder, tone
from tests.tiny import bert_folder
from tests.train.tools import write_rows
from train.config import Recipe
from train.data import Batches, MediaCache, find_splits, read_split
from train.features import Features
from train.recipe import check_recipe
from train.run import fit


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows whose tones are low or high; every fourth has none."""
    folder, random = tmp_path_factory.mktemp("sounds"), np.random.default_rng(0)
    bert_folder(folder / "bert")
    audio_folder(folder / "audio")
    for i in range(12):
        soundfile.write(folder / f"{i}.wav", tone((90, 310)[i % 2] + i, 0.1 + 0.02 * i, rate=2000), 2000)
    for split, count in (("train", 48), ("test", 20)):
        rows: list[dict[str, Any]] = []
        for i in range(count):
            low, named_low = i % 2 == 0, bool(random.integers(2))
            text, label = ("the blue seven", "a red card")[named_low], ("differ", "agree")[low == named_low]
            row = {"text": text, "label": label}
            rows.append(row | ({"audio": f"{2 * random.integers(6) + (not low)}.wav"} if i % 4 else {"audio": None}))
        write_rows(folder / f"{split}.jsonl", rows)
    return folder


def recipe(sounds: Path, run: Path, *overrides: str) -> Recipe:
    values = {
        "name": "tones",
        "data": {"train": str(sounds / "train.jsonl"), "test": str(sounds / "test.jsonl")},
        "model": {
            "main": {"modality": "text", "source": f"dir:{sounds / 'bert'}"},
            "complementary": [{"modality": "audio", "source": f"dir:{sounds / 'audio'}", "max_seconds": 0.3}],
            "missing": ["audio"],
            "prompt_length": 2,
            "experts": 4,
        },
        "optim": {"lr_main": 1e-2, "schedule": "constant"},
        "train": {"epochs": 2, "batch_size": 8, "log_every": 2, "tensorboard": False},
        "run": {"dir": str(run)},
    }
    return check_recipe(values, overrides, what="the test's recipe")


@pytest.mark.parametrize(
    "overrides",
    [(), ("model.y_norm=standardise",), ("train.cache_y=false", "baselines=true")],
    ids=["cached", "standardised", "uncached"],
)
def test_trains_on_tones_some_of_which_are_missing(overrides: tuple[str, ...], sounds: Path, tmp_path: Path) -> None:
    """The stand-in trains too; the run's own rows, held out for validation, name their sounds."""
    outcome = fit(recipe(sounds, tmp_path / "run", *overrides), command="test")
    assert outcome.status == "finished"
    model = MoPE.from_pretrained(outcome.run.last)
    assert model.config.missing == ("audio",)
    assert model.stand_ins["audio"].abs().sum() > 0
    losses = [json.loads(line) for line in outcome.run.metrics.read_text().splitlines()]
    losses = [row["loss"] for row in losses if "loss" in row]
    assert len(losses) > 4
    assert np.isfinite(losses).all()
    described = outcome.run.read()["data"]
    assert described["fingerprint"]["train"]["audios"] == 12
    held = [json.loads(line) for line in (outcome.run.folder / described["validation"]).read_text().splitlines()]
    assert any("audio" in row for row in held)
    assert all(Path(row["audio"]).is_file() for row in held if "audio" in row)
    if "baselines=true" in overrides:
        assert {head["name"] for head in outcome.evaluation["baselines"]} >= {"text only", "audio only"}


def test_batches_are_what_collate_makes_of_the_rows(sounds: Path, tmp_path: Path) -> None:
    """With features of the sounds computed beforehand, too: then the inputs only say which rows have one."""
    made = recipe(sounds, tmp_path / "run")
    files = find_splits(made.data, task=SingleLabel())
    assert files is not None
    split = read_split(
        "train",
        files.train,
        task=SingleLabel(("agree", "differ")),
        modalities=("text", "audio"),
        optional=("audio",),
    )
    model = build_model(made.model.model_copy(update={"labels": split.labels}))
    media = MediaCache(model.preprocessing, limit_mb=1)
    rows = np.arange(8)
    batches = Batches(split, media)
    samples = [
        {
            name: None if index < 0 else model.preprocessing.load(name, split.values[name][index])
            for name, index in (("text", split.columns["text"][row]), ("audio", split.columns["audio"][row]))
        }
        for row in rows
    ]
    expected = model.preprocessing.collate(samples)
    inputs = batches.inputs(rows)
    assert set(inputs) == set(expected) == set(model.input_names)
    assert all(np.array_equal(inputs[name].numpy(), expected[name]) for name in expected)
    features = Features(media, torch.device("cpu"), batch_size=5)
    y = {"audio": features.bare(model.complementary_encoders()["audio"].backbone, "audio", split)}
    cached = Batches(split, media, y=y).__getitems__(rows.tolist())
    assert set(cached["inputs"]) == {"input_ids", "attention_mask", "audio_present"}
    with torch.no_grad():
        whole, short = model(inputs).logits, model(cached["inputs"], y=cached["y"]).logits
    assert torch.allclose(whole, short, atol=1e-5)


def test_a_missing_sound_is_an_error_unless_the_recipe_allows_it(sounds: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train.jsonl:1: audio"):
        fit(recipe(sounds, tmp_path / "run", "model.missing=[]"), command="test")
    assert not (tmp_path / "run").exists()


def test_a_sound_that_cannot_be_read_is_named_with_its_row(sounds: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.wav").write_bytes(b"no sound" * 99)
    rows = [{"text": "red", "audio": str(sounds / "1.wav"), "label": "agree"}]
    rows += [{"text": "a", "audio": "bad.wav", "label": "differ"}]
    rows += [rows[0] | {"text": f"two {i}", "audio": str(sounds / f"{i}.wav")} for i in range(3)]
    bad = f"data.train={write_rows(tmp_path / 'rows.jsonl', rows)}"
    with pytest.raises(DataError, match=r"rows.jsonl:2: audio .*bad.wav is not audio"):
        fit(recipe(sounds, tmp_path / "run", bad), command="test")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.missing=[text]", "missing"),
        ("data.train=null data.test=null data.name=digits-ve", "brings images and texts"),
    ],
)
def test_recipes_that_cannot_be(override: str, message: str, sounds: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe(sounds, tmp_path / "run", *override.split(" "))
