"""What is odd about the labels of a data set without being wrong: said, and left as it is."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

from train.data.split import Split

__all__ = ["one_label_twice", "without_rows"]

MAX_NAMED = 5  # labels, or pairs of them, that one message names


def one_label_twice(labels: Iterable[str]) -> str | None:
    """A warning that names labels that look the same: they differ in spaces, letter case or Unicode's forms alone."""
    seen: dict[str, str] = {}
    pairs = []
    for label in labels:
        same = unicodedata.normalize("NFKC", " ".join(unicodedata.normalize("NFKC", label).split()).casefold())
        if (other := seen.setdefault(same, label)) != label:
            # Two forms of one accent look the same unless they are spelled out.
            spell = ascii if unicodedata.normalize("NFC", other) == unicodedata.normalize("NFC", label) else repr
            pairs.append(f"{spell(other)} and {spell(label)}")
    return f"labels that may be one, spelled differently: {_few(pairs)}" if pairs else None


def without_rows(split: Split) -> str | None:
    """A warning that names the labels that no row of a split has."""
    absent = [repr(name) for name, rows in zip(split.labels, split.task.counts(split.targets), strict=True) if not rows]
    return f"{len(absent):,} labels have no row in {split.name}: {_few(absent)}" if absent else None


def _few(names: list[str]) -> str:
    return ", ".join(names[:MAX_NAMED]) + (f" and {len(names) - MAX_NAMED:,} more" if len(names) > MAX_NAMED else "")
