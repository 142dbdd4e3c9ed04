"""The JSONL files that hold a data set's splits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["SplitFiles"]


@dataclass(frozen=True)
class SplitFiles:
    """The JSONL file of each split.

    Attributes:
        train: the training rows.
        validation: None where a part of the training rows must be held out.
        test: None where there is none.
        copied: whether the rows were fetched from elsewhere, so that a run keeps its own copy of what export needs.
    """

    train: Path
    validation: Path | None
    test: Path | None
    copied: bool = False

    def items(self) -> list[tuple[str, Path]]:
        """(split, file) of every split that has one."""
        pairs = (("train", self.train), ("validation", self.validation), ("test", self.test))
        return [(name, path) for name, path in pairs if path is not None]
