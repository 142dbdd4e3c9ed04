"""What training reads: the device's own arrays, every bad row named, nothing computed or kept twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mope_deploy import data
from mope_deploy.data import open_samples
from mope_deploy.errors import DataError, UsageError
from mope_deploy.preprocess import Preprocessing
from mope_deploy.task import MultiLabel, SingleLabel
from tests.tiny import LABELS
from tests.train.tools import split_of, write_rows
from train.config import DataSection
from train.data import Batches, MediaCache, Split, drop_bad_files, find_splits, hold_out, read_split


def test_what_others_read_rows_with_is_public() -> None:
    assert {"FILES", "MODALITIES", "fingerprint", "open_samples", "scan_labels"} <= set(data.__all__)


def test_a_batch_is_to_the_last_bit_what_the_device_computes(
    tiny: Path, preprocessing: Preprocessing, media: MediaCache
) -> None:
    rows = [7, 0, 41, 7, 59]
    batch = Batches(split_of(tiny), media).__getitems__(rows)
    samples = list(open_samples(tiny / "train.jsonl"))
    expected = preprocessing.collate([samples[i].load(preprocessing) for i in rows])
    assert batch["inputs"].keys() == expected.keys()
    for name, array in expected.items():
        assert batch["inputs"][name].numpy().dtype == array.dtype
        assert np.array_equal(batch["inputs"][name].numpy(), array), name
    assert batch["labels"].tolist() == [LABELS.index(samples[i].label) for i in rows]  # type: ignore[arg-type]


def test_every_picture_and_text_is_kept_once(tiny: Path, media: MediaCache) -> None:
    split = split_of(tiny)
    samples = list(open_samples(tiny / "train.jsonl"))
    assert (
        len(split.values["image"]) == len(set(split.values["image"])) == len({sample.image for sample in samples}) == 30
    )
    assert (
        len(split.values["text"])
        == len(set(split.values["text"]))
        == len({sample.text for sample in samples})
        < len(split)
    )
    assert [split.values["text"][i] for i in split.columns["text"]] == [sample.text for sample in samples]
    assert media.get(split.values["image"][0]) is media.get(split.values["image"][0])


def test_the_image_cache_keeps_to_its_bound_and_gives_the_same_pictures(
    tiny: Path, preprocessing: Preprocessing
) -> None:
    split = split_of(tiny)
    small = MediaCache(preprocessing, limit_mb=16)
    small.room = 4 * 32 * 24 * 3
    assert small.check(split.values["image"], what="decoding", threads=2) == {}
    assert len(small) == 4
    for path in split.values["image"]:
        assert np.array_equal(small.get(path), preprocessing.load_image(path))
    assert len(small) == 4
    assert MediaCache(preprocessing, limit_mb=1).room == 2**20


def test_features_take_the_place_of_the_inputs_they_were_made_from(tiny: Path, media: MediaCache) -> None:
    split = split_of(tiny)
    y = {"text": torch.arange(len(split.values["text"]), dtype=torch.float32)[:, None].expand(-1, 3)}
    batch = Batches(split, media, y=y).__getitems__([5, 2])
    assert batch["inputs"].keys() == {"pixel_values"}
    assert batch["y"]["text"][:, 0].tolist() == split.columns["text"][[5, 2]].tolist()


def test_multi_label_targets(tmp_path: Path, tiny: Path, media: MediaCache) -> None:
    picture = str(tiny / "images" / "train-0.png")
    rows = [{"image": picture, "text": "red", "label": label} for label in (["b"], [], ["c", "a"])]
    split = read_split("train", write_rows(tmp_path / "m.jsonl", rows), task=MultiLabel(("a", "b", "c")))
    assert split.targets.tolist() == [[False, True, False], [False] * 3, [True, False, True]]
    labels = Batches(split, media).__getitems__([2, 0])["labels"]
    assert labels.tolist() == [[True, False, True], [False, True, False]]


BAD = [
    ('{"image": "ok.png", "text": "red", "label": "neutral"', ":2: not JSON, or cut short"),
    ('{"image": "gone.png", "text": "red", "label": "neutral"}', "gone.png does not exist"),
    ('{"image": "ok.png", "text": " ", "label": "neutral"}', "text is empty"),
    ('{"image": "ok.png", "text": "red", "label": "neutrl"}', "unknown label; received 'neutrl'"),
    ('{"image": "ok.png", "text": "red", "lable": "neutral"}', "label missing"),
    ('{"image": "empty.png", "text": "red", "label": "neutral"}', "is empty (0 bytes)"),
    ('{"image": "cut.png", "text": "red", "label": "neutral"}', "cut.png cannot be decoded"),
    ('{"image": "words.png", "text": "red", "label": "neutral"}', "words.png is not an image"),
]


def bad_file(folder: Path, line: str) -> Path:
    Image.fromarray(np.full((40, 30, 3), 7, np.uint8)).save(folder / "ok.png")
    (folder / "empty.png").touch()
    (folder / "cut.png").write_bytes((folder / "ok.png").read_bytes()[:60])
    (folder / "words.png").write_text("not a picture")
    good = '{"image": "ok.png", "text": "red card", "label": "neutral"}'
    path = folder / "rows.jsonl"
    path.write_text(f"{good}\n{line}\n{good}\n")
    return path


@pytest.mark.parametrize(("line", "message"), BAD)
def test_a_bad_row_is_named_by_file_and_line_or_skipped(
    tmp_path: Path, media: MediaCache, line: str, message: str
) -> None:
    path = bad_file(tmp_path, line)

    def read(*, skip_bad: bool) -> Split:
        split = read_split("train", path, task=SingleLabel(LABELS), skip_bad=skip_bad)
        bad = media.check(split.values["image"], what="decoding", threads=1)
        return drop_bad_files(split, bad, skip_bad=skip_bad)

    with pytest.raises(DataError) as caught:
        read(skip_bad=False)
    assert f"{path}:2: " in str(caught.value)
    assert message in str(caught.value)
    kept = read(skip_bad=True)
    assert kept.columns["line"].tolist() == [1, 3]
    assert len(kept.skipped) == 1
    assert kept.skipped[0].startswith(f"{path}:2: ")
    assert message.removeprefix(":2: ") in kept.skipped[0]


def test_a_file_without_usable_rows(tmp_path: Path, media: MediaCache) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n\n")
    with pytest.raises(DataError, match=r"empty.jsonl has nothing to use for test; received no rows"):
        read_split("test", empty, task=SingleLabel(LABELS))
    path = tmp_path / "rows.jsonl"
    path.write_text(bad_file(tmp_path, BAD[6][0]).read_text().splitlines()[1])
    split = read_split("train", path, task=SingleLabel(LABELS), skip_bad=True)
    bad = media.check(split.values["image"], what="decoding", threads=1)
    with pytest.raises(DataError, match="nothing to use for train"):
        drop_bad_files(split, bad, skip_bad=True)


def test_rows_must_have_the_field_they_are_grouped_by(tiny: Path) -> None:
    assert split_of(tiny, group_by="template").columns["group"].tolist()[:3] == ["a", "b", "a"]
    with pytest.raises(DataError, match=r"train.jsonl:1: kind missing.*data.group_by=kind"):
        split_of(tiny, group_by="kind")


def test_held_out_rows_share_no_picture_with_the_rest_and_repeat_with_the_seed(tiny: Path) -> None:
    split = split_of(tiny)
    rest, held = hold_out(split, fraction=0.2, seed=1)
    lines = [set(part.columns["line"].tolist()) for part in (rest, held)]
    assert lines[0] | lines[1] == set(range(1, 61))
    assert not lines[0] & lines[1]
    assert not set(rest.columns["image"].tolist()) & set(held.columns["image"].tolist())
    assert len(set(held.columns["image"].tolist())) == 6
    again = hold_out(split, fraction=0.2, seed=1)[1].columns["line"].tolist()
    other = hold_out(split, fraction=0.2, seed=2)[1].columns["line"].tolist()
    assert again == held.columns["line"].tolist() != other
    assert held.where(0) == f"{split.source}:{held.columns['line'][0]}"


def test_one_picture_cannot_be_held_out(tiny: Path) -> None:
    split = split_of(tiny)
    one = split.select(np.flatnonzero(split.columns["image"] == 0))
    with pytest.raises(DataError, match="too few different pictures"):
        hold_out(one, fraction=0.5, seed=0)


def test_missing_files_are_all_named_at_once(tiny: Path, tmp_path: Path) -> None:
    section = DataSection(train=str(tmp_path / "a.jsonl"), validation=str(tiny / "validation.jsonl"), test="b.jsonl")
    with pytest.raises(UsageError) as caught:
        find_splits(section, task=SingleLabel())
    assert "a.jsonl" in str(caught.value)
    assert "data.test=b.jsonl" in str(caught.value)
    assert "validation" not in str(caught.value)
