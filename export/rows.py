"""Which rows a lower precision is judged on and which it is calibrated on: enough of them, and never the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from export.limits import MIN_JUDGED
from export.pack.golden import pick_samples
from mope_deploy.data import Sample
from mope_deploy.errors import DataError
from mope_deploy.model import MoPE

__all__ = ["Rows", "choose_rows", "judged_rows"]

_EVERY = 10**9  # more than any file has
_APART = 4  # of rows that would be both, one in so many is kept to calibrate on


@dataclass(frozen=True)
class Rows:
    """Rows of one export, in the order in which they are used."""

    judged: tuple[Sample, ...]
    calibration: tuple[Sample, ...]


def choose_rows(model: MoPE, data: Path, calibration: Path, *, judged: int, calibrated: int, seed: int) -> Rows:
    """Draw rows, the same ones for the same seed.

    Rows are the same if all that the model reads of them is, in whichever file they stand. Where both files hold the
    same rows and too few are left to calibrate on, a quarter of the judged ones is taken for that instead.

    Args:
        data: JSONL of what is judged.
        calibration: JSONL of what ranges are read from.
        judged, calibrated: how many at most; 0 calibrated where nothing is.

    Raises:
        DataError: a row that cannot be used, or too few of them.
    """
    ours: Sequence[Sample] = judged_rows(model, data, count=judged, seed=seed)
    if not calibrated:
        return Rows(tuple(ours), ())
    taken = {_content(row) for row in ours}
    others = pick_samples(calibration, model, _EVERY, seed=seed + 1)
    apart = [row for row in others if _content(row) not in taken][:calibrated]
    missing = min(calibrated, len(others)) - len(apart)
    if missing > 0:
        shared = {_content(row) for row in others}
        moved = [row for row in reversed(ours) if _content(row) in shared][: min(missing, len(ours) // _APART)]
        apart, gone = apart + moved, {_content(row) for row in moved}
        ours = [row for row in ours if _content(row) not in gone]
    return Rows(_enough(ours, data), tuple(apart))


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
