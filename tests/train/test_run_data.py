"""Whole runs on awkward data: bad rows, held-out rows, a hub data set, several labels a row."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from mope_deploy.data import open_samples
from mope_deploy.errors import DataError
from mope_deploy.task import SingleLabel
from tests.tiny import LABELS
from tests.train.tools import moved_rows, read_rows, resumed, trained, write_rows
from train.config import Recipe

Make = Callable[..., Recipe]
pytestmark = pytest.mark.usefixtures("no_pictures")


def test_data_that_changed_meanwhile_is_refused(values: dict[str, Any], tmp_path: Path, recipe: Make) -> None:
    rows = moved_rows(Path(values["data"]["validation"]))
    copy = write_rows(tmp_path / "validation.jsonl", rows)
    first = trained(recipe(f"data.validation={copy}", "train.epochs=1"))
    write_rows(copy, rows[:-1])
    with pytest.raises(DataError, match="changed since it was started: validation"):
        resumed(first.run, "train.early_stopping=5")


def test_skipped_rows_are_counted_and_listed(recipe: Make, tiny: Path, tmp_path: Path) -> None:
    rows = [json.dumps(row) for row in moved_rows(tiny / "train.jsonl")]
    (tmp_path / "cut.png").write_bytes(b"\x89PNG")
    rows[5:5] = ["{", json.dumps(read_rows(tiny / "train.jsonl")[0] | {"image": "cut.png"})]
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
    folder = tmp_path / "hub" / "data"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        rows = moved_rows(tiny / f"{split}.jsonl")
        table = {name: [row[name] for row in rows] for name in ("image", "text", "label")}
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
        samples = list(open_samples(outcome.run.folder / data[split], task=SingleLabel(LABELS)))
        assert len(samples) == data["rows"][split]
        assert all(sample.image.is_relative_to(outcome.run.samples) for sample in samples)  # type: ignore[union-attr]


def test_held_out_validation_is_kept_with_the_run(recipe: Make, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = trained(recipe("data.validation=null", "data.test=null", "train.epochs=1"))
    run = outcome.run.read()
    assert run["data"]["validation"] == "samples/validation.jsonl"
    assert run["data"]["test"] is None
    assert outcome.evaluation["split"] == "validation"
    rows = read_rows(outcome.run.folder / "samples" / "validation.jsonl")
    assert len(rows) == run["data"]["rows"]["validation"] == 60 - run["data"]["rows"]["train"]
    assert all(Path(row["image"]).is_file() for row in rows)
    notes = capsys.readouterr().err
    assert "note: no validation rows given" in notes
    assert "note: no test rows given" in notes


def test_a_multi_label_run(recipe: Make, tiny: Path, tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        rows = moved_rows(tiny / f"{split}.jsonl")
        for i, row in enumerate(rows):
            row["label"] = [row["label"], "rare"] if i % 3 == 0 else [row["label"]]
        write_rows(tmp_path / f"{split}.jsonl", rows)
    paths = [f"data.{split}={tmp_path / split}.jsonl" for split in ("train", "validation", "test")]
    outcome = trained(recipe(*paths, "model.task=multi-label", "model.labels=null", "train.epochs=1"))
    assert list(outcome.evaluation["per_class"]) == ["contradiction", "entailment", "neutral", "rare"]
    assert "f1_micro" in outcome.run.read()["metrics"]["validation"]
    assert (outcome.run.folder / "confusion_matrix.png").exists()


def test_a_label_that_no_test_row_has(recipe: Make, tiny: Path, tmp_path: Path) -> None:
    rows = [row for row in moved_rows(tiny / "test.jsonl") if row["label"] != "neutral"]
    test = write_rows(tmp_path / "test.jsonl", rows)
    outcome = trained(recipe(f"data.test={test}", "train.epochs=1"))
    assert outcome.evaluation["routing"]["mean_weight"]["neutral"] is None


def test_nothing_is_written_before_the_data_is_known_to_be_good(recipe: Make, tiny: Path, tmp_path: Path) -> None:
    row = {"image": str(tiny / "train.jsonl"), "text": "red", "label": "neutral"}
    bad = write_rows(tmp_path / "bad.jsonl", [row])
    with pytest.raises(DataError, match=r"bad.jsonl:1: image .* is not an image.*data.skip_bad=true"):
        trained(recipe(f"data.test={bad}"))
    assert not Path(recipe().run.dir or "").exists()


def test_of_thousands_of_labels_a_run_writes_the_top(
    recipe: Make, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with 3,129 answers: the whole confusion goes to a file, routing is listed for the most frequent."""
    for name in ("mope_deploy.metrics.DENSE", "train.evaluation.DENSE"):
        monkeypatch.setattr(name, 2)
    outcome = trained(recipe("train.epochs=1"))
    found = outcome.evaluation
    assert "confusion_matrix" not in found
    assert len(found["confusions"]["most_frequent"]) <= 2
    lines = (outcome.run.folder / "confusions.csv").read_text().splitlines()
    assert lines[0] == "true,predicted,count"
    assert sum(int(line.rpartition(",")[2]) for line in lines[1:]) == 26
    support = {label: figures["support"] for label, figures in found["per_class"].items()}
    assert set(found["routing"]["mean_weight"]) == set(sorted(support, key=lambda label: -support[label])[:2])
