"""Real samples that int8 reads its ranges from, and that layers are ranked on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from export.rows import TODO_BAD, Rows
from mope_deploy.data import Sample
from mope_deploy.errors import DataError
from mope_deploy.model import MoPE

__all__ = ["calibration_feeds"]


def calibration_feeds(
    model: MoPE, rows: Rows, *, skip_bad: bool, on_notice: Callable[[str], None], where: Path
) -> Iterator[dict[str, NDArray[Any]]]:
    """Input arrays of the rows to calibrate on, in batches.

    Args:
        model: whose inputs they are.
        rows: as they were chosen.
        skip_bad: leave rows out that cannot be decoded, with a notice: the model was trained without them, too.
        on_notice: called with one line if any was left out.
        where: the file that they are of, to name.

    Raises:
        DataError: a row that cannot be used, by file and line, with what to do.
    """
    skipped = list(rows.skipped)
    loaded = _loaded(model, rows.calibration, skipped if skip_bad else None)
    try:
        for size in itertools.chain((1, 3), itertools.repeat(16)):  # as every gate's batches: export/gate/cases.py
            batch = list(itertools.islice(loaded, size))
            if not batch:
                break
            arrays = model.preprocessing.collate(batch)
            yield {name: arrays[name] for name in model.input_names}
    except DataError as error:
        raise DataError(str(error), todo=TODO_BAD) from error
    if skipped:
        on_notice(f"warning: {len(skipped):,} rows of {where} skipped, the first: {skipped[0]}")


def _loaded(model: MoPE, rows: Iterable[Sample], skipped: list[str] | None) -> Iterator[dict[str, Any]]:
    """Rows that can be decoded; the messages of the others go to ``skipped``, if there is one."""
    for row in rows:
        try:
            yield row.load(model.preprocessing)
        except DataError as error:
            if skipped is None:
                raise
            skipped.append(str(error))
