"""The rows of one split, checked and dictionary-coded: every picture, clip and text is kept once.

Letters: n rows · C classes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray

from mope_deploy.data import Sample, count_rows, open_samples
from mope_deploy.errors import DataError
from mope_deploy.preprocess import MODALITIES
from mope_deploy.progress import track

__all__ = ["Split", "drop_bad_files", "hold_out", "read_split"]

_MANY = {"image": "pictures", "video": "videos", "audio": "sounds", "text": "texts"}
QUIET_ROWS = 50_000  # fewer are read before a progress line would be of use


@dataclass(frozen=True)
class Split:
    """One split.

    Attributes:
        name: ``train``, ``validation`` or ``test``.
        source: the JSONL file.
        rows: an Arrow table with one row per sample: each modality as an index into its tuple below (-1: not
            there), ``label`` (an index, or a list of them for multi-label), ``line`` in the file, ``group`` if asked.
        values: the different texts, and paths of files, by modality.
        labels: the C class names.
        multi_label: whether a row has several labels.
        skipped: the message of every row that was left out.
    """

    name: str
    source: Path
    rows: datasets.Dataset
    values: Mapping[str, tuple[str, ...]]
    labels: tuple[str, ...]
    multi_label: bool
    skipped: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def images(self) -> tuple[str, ...]:
        """The different picture paths."""
        return self.values.get("image", ())

    @property
    def texts(self) -> tuple[str, ...]:
        """The different texts."""
        return self.values.get("text", ())

    def column(self, name: str) -> NDArray[Any]:
        """A column as an array (n,)."""
        return np.array(self.rows.data.column(name).to_numpy())

    def where(self, row: int) -> str:
        """``file:line`` of a row, as errors about it begin."""
        return f"{self.source}:{self.rows[int(row)]['line']}"

    def targets(self) -> NDArray[Any]:
        """What the loss compares with: class indices int64 (n,), or for multi-label booleans (n, C)."""
        if not self.multi_label:
            return self.column("label").astype(np.int64)
        found = np.zeros((len(self), len(self.labels)), bool)
        for row, names in enumerate(self.rows["label"]):
            found[row, names] = True
        return found

    def select(self, keep: NDArray[np.int64], *, name: str | None = None, skipped: Sequence[str] = ()) -> Split:
        """The rows at these indices."""
        return Split(
            name=name or self.name,
            source=self.source,
            rows=self.rows.select(keep, keep_in_memory=True).flatten_indices(keep_in_memory=True),
            values=self.values,
            labels=self.labels,
            multi_label=self.multi_label,
            skipped=[*self.skipped, *skipped],
        )


def read_split(
    name: str,
    path: Path,
    *,
    labels: Sequence[str],
    multi_label: bool,
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
    samples = open_samples(
        path, labels=labels, multi_label=multi_label, skip_bad=skip_bad, modalities=modalities, optional=optional
    )
    number = {label: i for i, label in enumerate(labels)}
    numbers: dict[str, dict[str, int]] = {name: {} for name in MODALITIES}
    columns: dict[str, list[Any]] = {name: [] for name in (*MODALITIES, "label", "line")}
    if group_by is not None:
        columns["group"] = []
    total = count_rows(path)
    for sample in track(samples, what=f"reading {name}", total=total) if total > QUIET_ROWS else samples:
        for modality, known in numbers.items():
            value = getattr(sample, modality)
            columns[modality].append(-1 if value is None else known.setdefault(str(value), len(known)))
        assert sample.label is not None
        single = isinstance(sample.label, str)
        columns["label"].append(number[sample.label] if single else [number[label] for label in sample.label])  # type: ignore[index]
        columns["line"].append(sample.line)
        if group_by is not None:
            columns["group"].append(_group(sample, group_by))
    if not columns["line"]:
        left = (
            f"{len(samples.skipped)} rows that cannot be used, the first: {samples.skipped[0]}"
            if samples.skipped
            else "no rows"
        )
        raise DataError(f"{path} has nothing to use for {name}", received=left, expected="at least one row")
    return Split(
        name=name,
        source=path,
        rows=datasets.Dataset.from_dict(columns, features=_features(labels, multi_label, group_by is not None)),
        values={modality: tuple(known) for modality, known in numbers.items()},
        labels=tuple(labels),
        multi_label=multi_label,
        skipped=samples.skipped,
    )


def hold_out(split: Split, *, fraction: float, seed: int) -> tuple[Split, Split]:
    """Divide training rows into those to train on and those to validate on.

    Whole pictures (or videos, sounds or texts, where rows have none) are held out, so that no picture is on both sides.

    Raises:
        DataError: there are too few pictures to divide.
    """
    name = next(name for name in ("image", "video", "audio", "text") if split.values.get(name))
    key = split.column(name)
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


def _group(sample: Sample, key: str) -> str:
    if key not in sample.extra:
        raise DataError(f"{sample.where}: {key} missing", expected=f"a value in every row, because data.group_by={key}")
    return str(sample.extra[key])


def _features(labels: Sequence[str], multi_label: bool, grouped: bool) -> datasets.Features:
    label = datasets.ClassLabel(names=list(labels))
    features = {
        **{name: datasets.Value("int64") for name in MODALITIES},
        "label": datasets.List(label) if multi_label else label,
        "line": datasets.Value("int64"),
    }
    return datasets.Features(features | ({"group": datasets.Value("string")} if grouped else {}))


def drop_bad_files(split: Split, bad: Mapping[str, DataError], *, skip_bad: bool, modality: str = "image") -> Split:
    """``split`` without the rows whose picture, sound or video cannot be decoded.

    Raises:
        DataError: naming file and line of the first such row, unless ``skip_bad``; or no row is left.
    """
    paths, column = split.values[modality], split.column(modality)
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
