"""Hub data sets: written out as rows and pictures once, and never mistaken for another."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from mope_deploy.data import open_samples
from mope_deploy.errors import UsageError
from mope_deploy.task import SingleLabel
from train.config import DataSection
from train.data import find_splits

COLUMNS = {"image": "photo", "text": "caption", "label": "kind"}


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A data set in the hub's own layout, with class numbers and stored pictures; a folder is read as an id is."""
    rng = np.random.default_rng(0)
    features = datasets.Features(
        {
            "photo": datasets.Image(),
            "caption": datasets.Value("string"),
            "kind": datasets.ClassLabel(names=["cat", "dog"]),
            "source": datasets.Value("string"),
        }
    )
    for split, count in (("train", 6), ("test", 4)):
        rows = {
            "photo": [Image.fromarray(rng.integers(0, 255, (9, 7, 3), dtype=np.uint8)) for _ in range(count)],
            "caption": [f"animal {i}" for i in range(count)],
            "kind": [i % 2 for i in range(count)],
            "source": ["web"] * count,
        }
        folder = tmp_path / "hub" / "data"
        folder.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return tmp_path / "hub"


def test_a_hub_data_set_becomes_rows_and_pictures_once(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = DataSection(hub=str(hub), columns=COLUMNS, root=str(tmp_path / "rows"))  # type: ignore[arg-type]
    assert find_splits(section, task=SingleLabel(), fetch=False) is None
    assert not (tmp_path / "rows").exists()
    files = find_splits(section, task=SingleLabel())
    assert files is not None
    assert [name for name, _ in files.items()] == ["train", "test"]
    samples = list(open_samples(files.train, task=SingleLabel(("cat", "dog"))))
    assert [(sample.text, sample.label) for sample in samples[:2]] == [("animal 0", "cat"), ("animal 1", "dog")]
    assert samples[0].extra == {"source": "web"}
    original = datasets.load_dataset(str(hub))["train"]
    for sample, row in zip(samples, original, strict=True):
        assert np.array_equal(np.asarray(Image.open(sample.image)), np.asarray(row["photo"]))  # type: ignore[arg-type]

    monkeypatch.setattr(datasets, "load_dataset", lambda *_: pytest.fail("fetched again"))
    assert find_splits(section, task=SingleLabel()) == files


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"columns": {"image": "phto", "text": "caption", "label": "kind"}},
            "data.columns.image=phto (did you mean photo?)",
        ),
        ({"validation": "dev"}, "has no split 'dev'"),
        ({"hub": "./nowhere"}, "the data set ./nowhere could not be loaded"),
    ],
)
def test_a_hub_data_set_that_cannot_be_used(hub: Path, tmp_path: Path, change: dict[str, object], message: str) -> None:
    section = DataSection(**({"hub": str(hub), "columns": COLUMNS, "root": str(tmp_path / "rows")} | change))  # type: ignore[arg-type]
    with pytest.raises(UsageError) as caught:
        find_splits(section, task=SingleLabel())
    assert message in str(caught.value)
    assert not (tmp_path / "rows").exists()


def test_a_folder_with_other_data_is_not_taken_for_the_hubs(hub: Path, tmp_path: Path) -> None:
    section = DataSection(hub=str(hub), columns=COLUMNS, root=str(tmp_path / "rows"))  # type: ignore[arg-type]
    find_splits(section, task=SingleLabel())
    other = section.model_copy(update={"columns": section.columns.model_copy(update={"text": "source"})})
    with pytest.raises(UsageError, match="holds something else"):
        find_splits(other, task=SingleLabel())
    assert json.loads((tmp_path / "rows" / "hub.json").read_text())["request"]["columns"]["text"] == "caption"


@pytest.mark.parametrize(
    "splits", [["../../x", "train"], ["test"], [], "train", [["train"]], None, {"train": 1, "x": 2}]
)
def test_forged_splits_of_a_fetched_data_set(hub: Path, tmp_path: Path, splits: object) -> None:
    """None of them names a file outside the folder, or is a traceback."""
    section = DataSection(hub=str(hub), columns=COLUMNS, root=str(tmp_path / "rows"))  # type: ignore[arg-type]
    find_splits(section, task=SingleLabel())
    record = tmp_path / "rows" / "hub.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"splits": splits}))
    with pytest.raises(UsageError, match="holds something else"):
        find_splits(section, task=SingleLabel())
