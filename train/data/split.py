"""The rows of one split, checked and dictionary-coded: every picture, clip and text is kept once.

Letters: n rows · C classes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mope_deploy.data import Sample, count_rows, open_samples
from mope_deploy.errors import DataError
from mope_deploy.preprocess import MODALITIES
from mope_deploy.progress import track
from mope_deploy.task import Task

__all__ = ["Split", "drop_bad_files", "hold_out", "read_split"]

_MANY = {"image": "pictures", "video": "videos", "audio": "sounds", "text": "texts"}
QUIET_ROWS = 50_000  # fewer are read before a progress line would be of use


@dataclass(frozen=True)
class Split:
    """One split.

    Attributes:
        name: ``train``, ``validation`` or ``test``.
        source: the JSONL file.
        task: what labels mean.
        values: the different texts, and paths of files, by modality.
        columns: one value a row: each modality as an index int64 into its tuple above (-1: not there), ``line`` in the
            file, and ``group`` if asked.
        targets: what the loss compares with, as :meth:`Task.encode` returns it.
        skipped: the message of every row that was left out.
    """

    name: str
    source: Path
    task: Task
    values: Mapping[str, tuple[str, ...]]
    columns: Mapping[str, NDArray[Any]]
    targets: NDArray[Any]
    skipped: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def labels(self) -> tuple[str, ...]:
        """The C class names."""
        return self.task.labels

    @property
    def groups(self) -> dict[str, NDArray[np.bool_]]:
        """Which rows (n,) have each value of the field that rows are grouped by, sorted by value."""
        column = self.columns["group"]
        return {str(name): column == name for name in sorted(set(column.tolist()))}

    def where(self, row: int) -> str:
        """``file:line`` of a row, as errors about it begin."""
        return f"{self.source}:{self.columns['line'][row]}"

    def select(self, keep: NDArray[np.int64], *, name: str | None = None, skipped: Sequence[str] = ()) -> Split:
        """The rows at these indices."""
        return replace(
            self,
            name=name or self.name,
            columns={key: column[keep] for key, column in self.columns.items()},
            targets=self.targets[keep],
            skipped=[*self.skipped, *skipped],
        )


def read_split(
    name: str,
    path: Path,
    *,
    task: Task,
    modalities: Collection[str] = ("image", "text"),
    optional: Collection[str] = (),
    skip_bad: bool = False,
    group_by: str | None = None,
) -> Split:
    """Read and check every row of a file; pictures and clips are only looked for here, not decoded.

    Rows may lack the ``optional`` modalities.

    Raises:
        DataError: naming file and line, unless ``skip_bad``; or no row is left.
    """
    samples = open_samples(path, task=task, skip_bad=skip_bad, modalities=modalities, optional=optional)
    numbers: dict[str, dict[str, int]] = {modality: {} for modality in MODALITIES}
    columns: dict[str, list[Any]] = {column: [] for column in (*MODALITIES, "line")}
    if group_by is not None:
        columns["group"] = []
    labels = []
    total = count_rows(path)
    for sample in track(samples, what=f"reading {name}", total=total) if total > QUIET_ROWS else samples:
        for modality, known in numbers.items():
            value = getattr(sample, modality)
            columns[modality].append(-1 if value is None else known.setdefault(str(value), len(known)))
        labels.append(sample.label)
        columns["line"].append(sample.line)
        if group_by is not None:
            columns["group"].append(_group(sample, group_by))
    if not labels:
        bad = samples.skipped
        left = f"{len(bad)} rows that cannot be used, the first: {bad[0]}" if bad else "no rows"
        raise DataError(f"{path} has nothing to use for {name}", received=left, expected="at least one row")
    return Split(
        name=name,
        source=path,
        task=task,
        values={modality: tuple(known) for modality, known in numbers.items()},
        columns={key: np.array(column) for key, column in columns.items()},
        targets=task.encode(labels),
        skipped=samples.skipped,
    )


def hold_out(split: Split, *, fraction: float, seed: int) -> tuple[Split, Split]:
    """Divide training rows into those to train on and those to validate on.

    Whole pictures (or videos, sounds or texts, where rows have none) are held out, so that no picture is on both sides.

    Raises:
        DataError: there are too few pictures to divide.
    """
    name = next(name for name in _MANY if split.values.get(name))
    key = split.columns[name]
    ids = np.unique(key)
    count = max(1, round(len(ids) * fraction))
    if count >= len(ids):
        raise DataError(
            f"{split.source} has too few different {_MANY[name]} to hold out a part for validation",
            received=len(ids),
            expected="at least 2",
            todo="give data.validation",
        )
    chosen = np.random.default_rng([seed, len(ids)]).permutation(ids)[:count]
    outside = np.isin(key, chosen)
    return split.select(np.flatnonzero(~outside)), split.select(np.flatnonzero(outside), name="validation")


def drop_bad_files(split: Split, bad: Mapping[str, DataError], *, skip_bad: bool, modality: str = "image") -> Split:
    """``split`` without the rows whose picture, sound or video cannot be decoded.

    Raises:
        DataError: naming file and line of the first such row, unless ``skip_bad``; or no row is left.
    """
    paths, column = split.values[modality], split.columns[modality]
    wrong = [i for i, path in enumerate(paths) if path in bad]
    rows = np.flatnonzero(np.isin(column, wrong))
    if not len(rows):
        return split
    messages = [f"{split.where(row)}: {bad[paths[column[row]]]}" for row in rows.tolist()]
    if not skip_bad:
        more = f"{len(rows) - 1} more such rows; " if len(rows) > 1 else ""
        raise DataError(messages[0], todo=f"{more}data.skip_bad=true leaves such rows out and lists them")
    if len(rows) == len(split):
        raise DataError(f"{split.source} has nothing to use for {split.name}", received=messages[0])
    return split.select(np.setdiff1d(np.arange(len(split)), rows), skipped=messages)


def _group(sample: Sample, key: str) -> str:
    if key not in sample.extra:
        raise DataError(f"{sample.where}: {key} missing", expected=f"a value in every row, because data.group_by={key}")
    return str(sample.extra[key])
