"""Which rows a lower precision is judged on and which it is calibrated on: enough of them, and never the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from export.limits import MIN_JUDGED
from export.pack.golden import open_rows, pick_samples
from mope_deploy.data import Sample
from mope_deploy.errors import DataError
from mope_deploy.model import MoPE

__all__ = ["TODO_BAD", "Rows", "choose_rows", "draw_rows", "judged_rows"]

TODO_BAD = (
    "mend the row, train with data.skip_bad=true so that such rows are left out here too, or give other samples: "
    "--calib-data"
)
_APART = 4  # of rows that would be both, one in so many is kept to calibrate on


@dataclass(frozen=True)
class Rows:
    """Rows of one export, in the order in which they are used.

    Attributes:
        judged: what a lower precision is judged on.
        calibration: what int8 reads its ranges from, and layers are ranked on; empty where nothing is calibrated.
        skipped: what was wrong with rows of the calibration file that cannot be used.
    """

    judged: tuple[Sample, ...]
    calibration: tuple[Sample, ...]
    skipped: tuple[str, ...] = ()


def choose_rows(
    model: MoPE, data: Path, calibration: Path, *, judged: int, calibrated: int, seed: int, skip_bad: bool = False
) -> Rows:
    """Draw rows, the same ones for the same seed.

    Rows are the same if all that the model reads of them is, in whichever file they stand. Where both files hold the
    same rows and too few are left to calibrate on, a quarter of the judged ones is taken for that instead.

    Args:
        data: JSONL of what is judged.
        calibration: JSONL of what ranges are read from.
        judged, calibrated: how many at most; 0 calibrated where nothing is.
        seed: of the choice.
        skip_bad: leave rows of ``calibration`` out that cannot be used.

    Raises:
        DataError: a row that cannot be used, or too few of them.
    """
    ours: Sequence[Sample] = judged_rows(model, data, count=judged, seed=seed)
    if not calibrated:
        return Rows(tuple(ours), ())
    taken = {_content(row) for row in ours}
    others, skipped = draw_rows(model, calibration, seed=seed + 1, skip_bad=skip_bad)
    apart = [row for row in others if _content(row) not in taken][:calibrated]
    missing = min(calibrated, len(others)) - len(apart)
    if missing > 0:
        shared = {_content(row) for row in others}
        moved = [row for row in reversed(ours) if _content(row) in shared][: min(missing, len(ours) // _APART)]
        apart, gone = apart + moved, {_content(row) for row in moved}
        ours = [row for row in ours if _content(row) not in gone]
    return Rows(_enough(ours, data), tuple(apart), tuple(skipped))


def draw_rows(model: MoPE, data: Path, *, seed: int, skip_bad: bool) -> tuple[list[Sample], list[str]]:
    """Every row of a data file in an order that ``seed`` decides, and what was wrong with those left out.

    Raises:
        DataError: a row that cannot be used, unless they are left out, with what to do about it.
    """
    rows = open_rows(model, data, skip_bad=skip_bad)
    try:
        known = list(rows)
    except DataError as error:
        raise DataError(str(error), todo=TODO_BAD) from error
    order = np.random.default_rng(seed).permutation(len(known)).tolist()
    return [known[i] for i in order], list(rows.skipped)


def judged_rows(model: MoPE, data: Path, *, count: int, seed: int) -> tuple[Sample, ...]:
    """Rows to judge a lower precision on.

    Raises:
        DataError: a row that cannot be used, or too few of them.
    """
    return _enough(pick_samples(data, model, count, seed=seed), data)


def _enough(rows: Sequence[Sample], data: Path) -> tuple[Sample, ...]:
    if len(rows) < MIN_JUDGED:
        raise DataError(
            f"too few rows of {data} to judge a precision below fp32 on",
            received=len(rows),
            expected=f"at least {MIN_JUDGED}, beside those to calibrate on",
            todo="give more with --data and --gate-samples, or export fp32 alone",
        )
    return tuple(rows)


def _content(row: Sample) -> tuple[str, ...]:
    """What the model reads of a row."""
    files = (path if path is None else path.resolve() for path in (row.image, row.audio, row.video))
    return (repr(row.text), *map(str, files))
