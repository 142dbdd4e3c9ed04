"""Rows as people have them: what can be found before the first step is found then, and may be skipped."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mope_deploy.errors import DataError, MediaError, UsageError
from mope_deploy.preprocess import Preprocessing
from mope_deploy.task import MultiLabel, SingleLabel
from tests.tiny import LABELS
from tests.train.tools import moved_rows, read_rows, split_of, write_rows
from train.config import Recipe
from train.data import MediaCache, hold_out, read_split
from train.data.hub import _write_image
from train.data.labels import one_label_twice, without_rows
from train.data.rows import decode
from train.data.rows import read_rows as read_all
from train.data.sources import find_splits
from train.run import plan

Make = Callable[..., Recipe]


def checked(recipe: Recipe, preprocessing: Preprocessing) -> Any:
    files = find_splits(recipe.data, task=SingleLabel())
    assert files is not None
    return decode(recipe, read_all(recipe, files), preprocessing, threads=1)[0]


@pytest.mark.parametrize(
    "text", ["\ufeff", "\u200b", "\u200b \u200d", "\u00ad\u2060", "\u0001\u0002 \u000e", "\u3000\ufeff"]
)
def test_a_text_without_tokens_is_found_before_anything_is_written(
    recipe: Make, tiny: Path, tmp_path: Path, preprocessing: Preprocessing, text: str
) -> None:
    """Also where pictures are not decoded beforehand; a row of the test split too."""
    tokenizer = json.loads(str(preprocessing.tokenizer))
    bert = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None}
    tokenizer["normalizer"] = bert | {"lowercase": True}
    preprocessing = replace(preprocessing, tokenizer=json.dumps(tokenizer))
    rows = moved_rows(tiny / "test.jsonl")
    test = write_rows(tmp_path / "test.jsonl", [*rows[:5], rows[5] | {"text": text}, *rows[6:]])
    for override in ("data.check_images=true", "data.check_images=false"):
        with pytest.raises(DataError, match=r"test.jsonl:6: text .*data.skip_bad=true"):
            checked(recipe(f"data.test={test}", override), preprocessing)
    found = checked(recipe(f"data.test={test}", "data.skip_bad=true"), preprocessing)
    assert found.test.columns["line"].tolist() == [line for line in range(1, len(rows) + 1) if line != 6]
    assert found.test.skipped[0].startswith(f"{test}:6: text ")


def test_two_spellings_of_a_label_are_named() -> None:
    accents = "caf\u00e9", unicodedata.normalize("NFD", "caf\u00e9")
    for labels, words in (
        (("dog", "dog "), "'dog' and 'dog '"),
        (("Dog", "cat", "dog"), "'Dog' and 'dog'"),
        (("New  York", "New York"), "'New  York' and 'New York'"),
        (accents, r"'caf\xe9' and 'cafe\u0301'"),
        (("stra\u00dfe", "STRASSE"), "'stra\u00dfe' and 'STRASSE'"),
        (("\uff21", "a"), "'\uff21' and 'a'"),
    ):
        assert one_label_twice(labels) == f"labels that may be one, spelled differently: {words}"
    assert one_label_twice(("dog", "dogs", "$", "$$", "1", "10")) is None
    many = [f"{word}{end}" for word in "abcdefgh" for end in ("", " ")]
    assert str(one_label_twice(many)).endswith("'e' and 'e ' and 3 more")


def test_labels_that_no_training_row_has_are_named(tmp_path: Path, tiny: Path) -> None:
    assert without_rows(split_of(tiny)) is None
    split = split_of(tiny, task=SingleLabel((*LABELS, "never", "$")))
    assert without_rows(split) == "2 labels have no row in train: 'never', '$'"
    rows = [{"text": "red", "label": ["a"]}, {"text": "blue", "label": []}]
    several = read_split(
        "train", write_rows(tmp_path / "m.jsonl", rows), task=MultiLabel(("a", "b")), modalities=["text"]
    )
    assert without_rows(several) == "1 labels have no row in train: 'b'"


def test_odd_labels_are_said_and_used(
    recipe: Make, tiny: Path, tmp_path: Path, preprocessing: Preprocessing, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = moved_rows(tiny / "train.jsonl")
    train = write_rows(
        tmp_path / "train.jsonl", [row | {"label": ("[red]", "[Red]")[i % 2]} for i, row in enumerate(rows)]
    )
    paths = [f"data.{name}={train}" for name in ("train", "validation", "test")]
    found = checked(recipe(*paths, 'model.labels=["[red]", "[Red]", "[/]"]'), preprocessing)
    assert found.train.labels == ("[red]", "[Red]", "[/]")
    said = " ".join(capsys.readouterr().err.split())
    assert "warning: labels that may be one, spelled differently: '[red]' and '[Red]'" in said
    assert "warning: 1 labels have no row in train: '[/]'" in said


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5])
def test_rows_without_a_picture_are_held_out_as_often_as_those_with_one(tmp_path: Path, share: float) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    rows: list[dict[str, Any]] = []
    for i in range(100):
        (tmp_path / f"{i}.png").write_bytes((tmp_path / "a.png").read_bytes())
        rows += [{"image": f"{i}.png", "text": f"t {i}", "label": "x"}, {"text": f"u {i}", "image": None, "label": "x"}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    split = read_split("train", path, task=SingleLabel(("x", "y")), optional=["image"])
    rest, held = hold_out(split, fraction=share, seed=0)
    assert len(rest) + len(held) == 200
    for part, expected in ((held, share), (rest, 1 - share)):
        assert (part.columns["image"] < 0).sum() == (part.columns["image"] >= 0).sum() == round(100 * expected)
    without = held.columns["image"] < 0
    assert not set(held.columns["text"][without]) & set(rest.columns["text"][rest.columns["image"] < 0])


def test_few_rows_without_a_picture_do_not_keep_the_others_from_being_held_out(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    for rows, held_out in (
        ([{"text": f"t {i}", "label": "x"} for i in range(5)] + [{"image": "a.png", "text": "u", "label": "x"}], 1),
        ([{"text": "t", "label": "x"}, {"image": "a.png", "text": "u", "label": "x"}], 1),
    ):
        path = write_rows(tmp_path / "rows.jsonl", rows)
        split = read_split("train", path, task=SingleLabel(("x", "y")), optional=["image"])
        assert len(hold_out(split, fraction=0.1, seed=0)[1]) == held_out


@pytest.mark.parametrize("value", [None, ["a"], {"a": 1}, "x" * 257, "a\u001b[2J", "a\u202eb"])
def test_the_field_that_rows_are_grouped_by_honours_skip_bad(tiny: Path, tmp_path: Path, value: Any) -> None:
    rows = moved_rows(tiny / "train.jsonl")[:6]
    path = write_rows(tmp_path / "rows.jsonl", [*rows[:2], rows[2] | {"template": value}, *rows[3:]])
    with pytest.raises(DataError, match=r"rows.jsonl:3: template"):
        read_split("train", path, task=SingleLabel(LABELS), group_by="template")
    split = read_split("train", path, task=SingleLabel(LABELS), group_by="template", skip_bad=True)
    assert split.columns["line"].tolist() == [1, 2, 4, 5, 6]
    assert set(split.groups) == {"a", "b"}
    assert split.skipped[0].startswith(f"{path}:3: template")
    write_rows(path, [row | {"template": i % 2} for i, row in enumerate(rows)])
    assert set(read_split("train", path, task=SingleLabel(LABELS), group_by="template").groups) == {"0", "1"}


def test_what_is_odd_about_a_file_that_is_used_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], media: MediaCache
) -> None:
    heard: list[str] = []

    class Odd:
        def load(self, _: str, path: str, *, on_notice: Callable[[str], None]) -> np.ndarray:
            on_notice("audio cut to the first 2 seconds")
            return np.zeros(3)

    odd = MediaCache(Odd(), limit_mb=1)  # type: ignore[arg-type]
    assert odd.check(["a.wav", "b.wav"], what="decoding", threads=2, modality="audio") == {}
    assert odd.notices == ["a.wav: audio cut to the first 2 seconds", "b.wav: audio cut to the first 2 seconds"]
    assert heard == []


def test_many_bad_rows_cost_no_more_than_good_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown label is compared with all known ones for the first few rows only."""
    asked: list[str] = []
    monkeypatch.setattr("mope_deploy.data.did_you_mean", lambda name, _: asked.append(name) or "did you mean?")
    rows = [{"text": "a", "label": f"unknown {i // 2}"} for i in range(500)] + [{"text": "a", "label": "x"}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    split = read_split("train", path, task=SingleLabel(("x", "y")), modalities=["text"], skip_bad=True)
    assert (len(split), len(split.skipped)) == (1, 500)
    assert asked == [f"unknown {i}" for i in range(20)]
    assert split.skipped[1].endswith("did you mean?")


HUB = {"image": "photo", "text": "caption", "label": "kind"}


def hub(folder: Path, kinds: list[Any], kind: Any, **columns: Any) -> Any:
    """A data set with these labels, as find_splits takes it."""
    import datasets

    from train.config import DataSection

    count = len(kinds)
    pictures = [Image.fromarray(np.full((4, 4, 3), i, np.uint8)) for i in range(count)]
    table = {"photo": pictures, "caption": [f"t {i}" for i in range(count)], "kind": kinds} | columns
    features = datasets.Features({"photo": datasets.Image(), "caption": datasets.Value("string"), "kind": kind})
    for name in columns.keys() - features.keys():
        features[name] = datasets.Value("float64")
    (folder / "hub" / "data").mkdir(parents=True)
    made = datasets.Dataset.from_dict(table, features=features)
    made.to_parquet(folder / "hub" / "data" / "train-00000-of-00001.parquet")
    return DataSection(hub=str(folder / "hub"), columns=HUB, root=str(folder / "rows"))  # type: ignore[arg-type]


def labels_of(section: Any, task: Any) -> list[Any]:
    files = find_splits(section, task=task)
    assert files is not None
    return [row["label"] for row in read_rows(files.train)]


def test_labels_of_a_hub_data_set(tmp_path: Path) -> None:
    """-1 is no label where the column says what its numbers are called; elsewhere it is a number. NaN is no label."""
    from datasets import ClassLabel, List, Value

    cases = [
        ([-1, 0, 1, None], Value("int64"), SingleLabel(), ["-1", "0", "1", None]),
        ([-1, 0, 1, None], ClassLabel(names=["cat", "dog"]), SingleLabel(), [None, "cat", "dog", None]),
        ([float("nan"), 1.5, None], Value("float64"), SingleLabel(), [None, "1.5", None]),
        (["$", "a b", ""], Value("string"), SingleLabel(), ["$", "a b", ""]),
        ([["War"], [], None], List(Value("string")), MultiLabel(), [["War"], [], None]),
        ([[-1, 2], [0]], List(Value("int64")), MultiLabel(), [["-1", "2"], ["0"]]),
    ]
    for i, (kinds, kind, task, expected) in enumerate(cases):
        assert labels_of(hub(tmp_path / str(i), kinds, kind), task) == expected


def test_labels_of_the_other_kind_of_task_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    from datasets import List, Value

    for i, (kinds, kind, task, words) in enumerate(
        (
            (["War", "Drama"], Value("string"), MultiLabel(), "holds one value a row.*model.task=single-label"),
            ([["War"]], List(Value("string")), SingleLabel(), "holds lists.*model.task=multi-label"),
        )
    ):
        section = hub(tmp_path / str(i), kinds, kind)
        with pytest.raises(UsageError, match=f"data.columns.label=kind .*{words}"):
            find_splits(section, task=task)
        assert not (tmp_path / str(i) / "rows").exists()


def test_rows_of_a_hub_data_set_that_cannot_be_used_are_named_or_skipped(tmp_path: Path) -> None:
    from datasets import Value

    picture = Image.new("RGB", (4, 4))
    columns = {
        "photo": [None, picture, picture],
        "caption": ["a", None, "b"],
        "score": [1.0, 2.0, float("nan")],
    }
    files = find_splits(hub(tmp_path, ["x"] * 3, Value("string"), **columns), task=SingleLabel())
    assert files is not None
    assert json.loads(files.train.read_text().splitlines()[2]).keys() == {"image", "text", "label"}  # NaN is left out
    with pytest.raises(DataError, match=r"train.jsonl:1: image"):
        read_split("train", files.train, task=SingleLabel(("x", "y")))
    split = read_split("train", files.train, task=SingleLabel(("x", "y")), skip_bad=True)
    assert split.columns["line"].tolist() == [3]
    assert "train.jsonl:1: image" in split.skipped[0]
    assert "train.jsonl:2: text" in split.skipped[1]
    gone = {"bytes": None, "path": str(tmp_path / "gone.png")}
    assert _write_image(gone, tmp_path / "0") == "0.img"  # named, so that its row is, and not written
    assert not (tmp_path / "0.img").exists()


def test_a_dry_run_finds_a_text_without_tokens(
    recipe: Make, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(_: object, text: str) -> None:
        if text == "none":
            raise MediaError("text has no tokens")

    monkeypatch.setattr(Preprocessing, "check_text", check)
    rows = moved_rows(tiny / "test.jsonl")
    test = write_rows(tmp_path / "test.jsonl", [*rows[:3], rows[3] | {"text": "none"}])
    with pytest.raises(DataError, match=r"test.jsonl:4: text has no tokens"):
        plan(recipe(f"data.test={test}"))
