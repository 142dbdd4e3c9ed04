"""Rows that are judged and rows that are calibrated on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from export.limits import MIN_JUDGED
from export.rows import choose_rows, judged_rows
from mope_deploy.data import Sample
from mope_deploy.errors import DataError
from mope_deploy.model import MoPE
from tests.export.conftest import make_model


@pytest.fixture(scope="module")
def model(vit: Path, bert: Path) -> MoPE:
    return make_model("dense", vit, bert)


def texts(rows: tuple[Sample, ...]) -> set[tuple[str | None, str]]:
    return {(row.text, str(row.image)) for row in rows}


@pytest.mark.parametrize(
    ("judged", "calibrated", "found"), [(40, 24, (40, 24)), (1000, 128, (53, 17)), (60, 20, (50, 20))]
)
def test_no_row_of_one_file_is_both(
    judged: int, calibrated: int, found: tuple[int, int], model: MoPE, data: Path
) -> None:
    rows = choose_rows(model, data, data, judged=judged, calibrated=calibrated, seed=0)
    assert (len(rows.judged), len(rows.calibration)) == found
    assert not texts(rows.judged) & texts(rows.calibration)
    again = choose_rows(model, data, data, judged=judged, calibrated=calibrated, seed=0)
    assert rows == again


def test_nor_one_that_stands_in_both_files(model: MoPE, data: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    for row in lines:
        row["image"] = str(data.parent / row["image"])
    copied = [*lines[:30], *(row | {"text": "the red card"} for row in lines[30:])]
    other = tmp_path / "train.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in copied), encoding="utf-8")
    rows = choose_rows(model, data, other, judged=70, calibrated=128, seed=0)
    assert not texts(rows.judged) & texts(rows.calibration)
    assert len(rows.calibration) > 40


def test_the_judged_rows_are_those_of_before_where_nothing_is_calibrated(model: MoPE, data: Path) -> None:
    rows = choose_rows(model, data, data, judged=70, calibrated=0, seed=3)
    assert rows.judged == judged_rows(model, data, count=70, seed=3)
    assert rows.calibration == ()


def test_too_few_rows_are_refused(model: MoPE, data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"too few rows of .*test\.jsonl to judge .*received 1; expected at least 16"):
        judged_rows(model, data, count=1, seed=0)
    short = data.parent / "short.jsonl"
    short.write_text("".join(data.read_text(encoding="utf-8").splitlines(True)[: MIN_JUDGED + 2]), encoding="utf-8")
    assert len(judged_rows(model, short, count=1000, seed=0)) == MIN_JUDGED + 2
    with pytest.raises(DataError, match="beside those to calibrate on"):
        choose_rows(model, short, short, judged=1000, calibrated=128, seed=0)
