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
from mope_deploy.fields import hidden, shown
from mope_deploy.limits import MAX_LABEL_CHARS
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
        if group_by is not None:
            try:
                columns["group"].append(_group(sample, group_by))
            except DataError as error:
                if not skip_bad:
                    raise
                samples.skipped.append(str(error))
                continue
        for modality, known in numbers.items():
            value = getattr(sample, modality)
            columns[modality].append(-1 if value is None else known.setdefault(str(value), len(known)))
        labels.append(sample.label)
        columns["line"].append(sample.line)
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

    Whole pictures (or videos, sounds or texts, where rows have none) are held out, so that no picture is on both sides;
    of the rows with a picture and of those with a video, sound or text instead, the same share.

    Raises:
        DataError: there are too few pictures to divide.
    """
    parts = []  # (what it goes by, which one of them each row has or -1, all of them)
    rest = np.ones(len(split), bool)
    for name in _MANY:
        key = np.where(rest, split.columns[name], -1)
        parts.append((name, key, np.unique(key[key >= 0])))
        rest &= split.columns[name] < 0
    name, _, _ = max(parts, key=lambda part: len(part[2]))
    counts = {name: round(len(ids) * fraction) for name, _, ids in parts}
    counts[name] = max(1, counts[name])
    if sum(counts.values()) >= (total := sum(len(ids) for _, _, ids in parts)):
        raise DataError(
            f"{split.source} has too few different {_MANY[name]} to hold out a part for validation",
            received=total,
            expected="at least 2",
            todo="give data.validation",
        )
    outside = np.zeros(len(split), bool)
    for name, key, ids in parts:
        outside |= np.isin(key, np.random.default_rng([seed, len(ids)]).permutation(ids)[: counts[name]])
    return split.select(np.flatnonzero(~outside)), split.select(np.flatnonzero(outside), name="validation")


def drop_bad_files(split: Split, bad: Mapping[str, DataError], *, skip_bad: bool, modality: str = "image") -> Split:
    """``split`` without the rows whose text, picture, sound or video (``modality``) is among the ``bad``, by value.

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
    expected = f"a value in every row, because data.group_by={key}"
    if key not in sample.extra:
        raise DataError(f"{sample.where}: {key} missing", expected=expected)
    value = sample.extra[key]
    if not isinstance(value, str | int | float) or len(str(value)) > MAX_LABEL_CHARS or hidden(str(value)):
        expected = f"a string of at most {MAX_LABEL_CHARS} characters that can be shown, or a number"
        raise DataError(f"{sample.where}: {key}", received=shown(value), expected=expected)
    return str(value)
