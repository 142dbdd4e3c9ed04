"""Predictions for the rows of a data file, with what there is to say about the whole of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mope_deploy.cli.printing import tell
from mope_deploy.errors import DataError
from mope_deploy.progress import track

if TYPE_CHECKING:
    from mope_deploy.data import Sample, Samples
    from mope_deploy.predictor import Prediction, Predictor

__all__ = ["open_rows", "predict_rows"]


def open_rows(predictor: Predictor, data: Path, *, require_label: bool, skip_bad: bool) -> Samples:
    """The rows of a file for this bundle; where labels are not required, any name may stand there."""
    from mope_deploy.data import open_samples
    from mope_deploy.task import TASKS

    manifest = predictor.bundle.manifest
    return open_samples(
        data,
        task=predictor.task if require_label else TASKS[predictor.task.type](),
        require_label=require_label,
        skip_bad=skip_bad,
        modalities=manifest.modalities,
        optional=manifest.missing,
    )


def predict_rows(
    predictor: Predictor, samples: Samples, *, batch_size: int, routing: bool = False
) -> Iterator[tuple[Sample, Prediction]]:
    """Every row's prediction with progress; afterwards what was skipped and truncated, once for the whole file.

    Raises :class:`DataError` at a row that cannot be used, or where none can.
    """
    from mope_deploy.data import count_rows

    count, truncated, other = 0, 0, []
    pairs = predictor.predict_batches(samples, batch_size=batch_size, routing=routing)
    for sample, prediction in track(pairs, what="predicting", total=count_rows(samples.path)):
        count += 1
        truncated += any(notice.startswith("text truncated") for notice in prediction.notices)
        other += [f"line {sample.line}: {n}" for n in prediction.notices if not n.startswith("text truncated")]
        yield sample, prediction
    for message in samples.skipped:
        tell(f"skipped {message}")
    if samples.skipped:
        tell(f"skipped {len(samples.skipped):,} of {count + len(samples.skipped):,} rows")
    if (kept := predictor.cache) is not None:
        tell(
            f"complementary inputs: {kept.misses:,} encoded, {kept.hits:,} not encoded again (cache: "
            f"{kept.bytes / 2**20:.1f} of {kept.limit / 2**20:,.0f} MiB)"
        )
    if truncated:
        assert predictor.preprocessing.text is not None
        tell(f"note: {truncated:,} texts were truncated to {predictor.preprocessing.text.max_length:,} tokens")
    if other:
        tell(f"note: {other[0]}" + (f", and {len(other) - 1:,} more such notes" if len(other) > 1 else ""))
    if count == 0:
        raise DataError(f"{samples.path}: no row to predict", received=f"{len(samples.skipped):,} rows skipped")
