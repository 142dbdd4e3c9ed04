"""One bad row of training data does not refuse an int8 export where training left such rows out."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.pack.golden import pick_samples
from export.precision.samples import calibration_feeds
from export.rows import Rows, draw_rows
from export.source import find_source
from mope_deploy.errors import DataError
from tests.export.conftest import Export
from tests.export.runs import write_data


def read(export: Export, data: Path, **changes: Any) -> tuple[list[dict[str, np.ndarray]], list[str]]:
    notices: list[str] = []
    options: dict[str, Any] = {"count": 40, "seed": 1, "skip_bad": False} | changes
    skip_bad = options["skip_bad"]
    drawn, skipped = draw_rows(export.model, data, seed=options["seed"], skip_bad=skip_bad)
    rows = Rows((), tuple(drawn[: options["count"]]), tuple(skipped))
    return list(calibration_feeds(export.model, rows, skip_bad=skip_bad, on_notice=notices.append, where=data)), notices


def test_the_same_samples_as_before_in_the_same_batches(exports: dict[str, Export], data: Path) -> None:
    feeds, notices = read(exports["dense"], data)
    assert [len(feed["input_ids"]) for feed in feeds] == [1, 3, 16, 16, 4]
    rows = pick_samples(data, exports["dense"].model, 40, seed=1)
    arrays = exports["dense"].model.preprocessing.collate(
        [row.load(exports["dense"].model.preprocessing) for row in rows[:1]]
    )
    assert np.array_equal(feeds[0]["pixel_values"], arrays["pixel_values"])
    assert notices == []
    assert sum(len(feed["input_ids"]) for feed in read(exports["dense"], data, count=1000)[0]) == 70  # all there are


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "pictures/0.png", "text": "", "label": "neutral"}, "text"),
        ({"image": "pictures/none.png", "text": "a card", "label": "neutral"}, "none.png"),
        ({"image": "pictures/broken.png", "text": "a card", "label": "neutral"}, "broken.png"),
    ],
)
def test_a_bad_row_is_skipped_or_named(
    row: dict[str, str], message: str, exports: dict[str, Export], tmp_path: Path
) -> None:
    data = write_data(tmp_path / "data", rows=9)
    (data.parent / "pictures" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    with data.open("a") as file:
        file.write(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=r"test.jsonl:10: .*data.skip_bad=true .*--calib-data") as caught:
        read(exports["dense"], data)
    assert message in str(caught.value)
    feeds, notices = read(exports["dense"], data, skip_bad=True)
    assert sum(len(feed["input_ids"]) for feed in feeds) == 9
    (notice,) = notices
    assert re.fullmatch(r"warning: 1 rows of .*test.jsonl skipped, the first: .*test.jsonl:10: .*", notice)


def test_a_run_says_whether_it_left_rows_out(run: Path, tmp_path: Path) -> None:
    assert not find_source(run).skip_bad
    assert not find_source(run / "best").skip_bad
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "best").symlink_to(run / "best")
    record = json.loads((run / "run.json").read_text())
    record["data"]["skipped"] = {"train": {"count": 1, "rows": ["train.jsonl:3: text"]}}
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    assert find_source(tmp_path / "run").skip_bad
