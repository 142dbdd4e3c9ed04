"""Real samples that int8 reads its ranges from, and that layers are ranked on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mope_deploy.data import Sample, open_samples
from mope_deploy.errors import DataError
from mope_deploy.model import MoPE

__all__ = ["calibration_feeds"]

_TODO = (
    "mend the row, train with data.skip_bad=true so that such rows are left out here too, or give other samples: "
    "--calib-data"
)


def calibration_feeds(
    model: MoPE, data: Path, count: int, *, seed: int, skip_bad: bool, on_notice: Callable[[str], None]
) -> Iterator[dict[str, NDArray[Any]]]:
    """Input arrays of ``count`` samples of a data file, in batches; of fewer if it has fewer.

    Args:
        model: whose inputs they are.
        data: JSONL.
        count: of samples.
        seed: of the choice.
        skip_bad: leave rows out that cannot be used, with a notice: the model was trained without them, too.
        on_notice: called with one line if any was left out.

    Raises:
        DataError: a row that cannot be used, by file and line, with what to do.
    """
    encoders = (model.config.main, *model.config.complementary)
    rows = open_samples(
        data,
        task=model.task,
        require_label=False,
        skip_bad=skip_bad,
        modalities=[spec.modality for spec in encoders],
        optional=model.config.missing,
    )
    try:
        known = list(rows)
        order = np.random.default_rng(seed).permutation(len(known)).tolist()
        loaded = itertools.islice(_loaded(model, (known[i] for i in order), rows.skipped if skip_bad else None), count)
        for size in itertools.chain((1, 3), itertools.repeat(16)):  # as every gate's batches: export/gate/cases.py
            batch = list(itertools.islice(loaded, size))
            if not batch:
                break
            arrays = model.preprocessing.collate(batch)
            yield {name: arrays[name] for name in model.input_names}
    except DataError as error:
        raise DataError(str(error), todo=_TODO) from error
    if rows.skipped:
        on_notice(f"warning: {len(rows.skipped):,} rows of {data} skipped, the first: {rows.skipped[0]}")


def _loaded(model: MoPE, rows: Iterable[Sample], skipped: list[str] | None) -> Iterator[dict[str, Any]]:
    """Rows that can be decoded; the messages of the others go to ``skipped``, if there is one."""
    for row in rows:
        try:
            yield row.load(model.preprocessing)
        except DataError as error:
            if skipped is None:
                raise
            skipped.append(str(error))
