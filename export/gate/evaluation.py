"""The eager side of the gate: real samples with what the untouched model computes for them, once for all files.

Letters: n samples · B batch · C classes · K experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.gate.reference import eager_outputs
from mope_deploy.data import Sample
from mope_deploy.errors import DataError
from mope_deploy.model import MoPE

__all__ = ["Batch", "Evaluation"]

_FIRST_SIZES = (1, 3)  # sizes that a graph was not traced with; a batch of one is what most devices run
_SIZE = 16
_KEPT_FEEDS = 128 * 2**20  # bytes; what is beyond is decoded again for every file

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Batch:
    """Consecutive samples.

    Attributes:
        start, stop: which ones.
        feeds: input arrays by name.
        eager: the eager model's ``logits`` (B, C) and, if it routes, ``routing`` and ``soft`` (B, layers, K).
    """

    start: int
    stop: int
    feeds: Arrays
    eager: Arrays


class Evaluation:
    """Real samples and the eager float32 model's outputs for them, which every file is compared with.

    The model runs once per sample, when it is first needed; only its outputs are kept, and the inputs of the first
    samples, which a repair looks at again and again. Memory does not grow with pictures.

    Args:
        model: the trained model; its mode is left as it is.
        samples: as many as there are, at best :data:`~export.gate.SAMPLES` or more. Those without a label
            count for everything but the metric.
        on_step: called with a few words after each batch.

    Attributes:
        truth: class indices (n,), -1 for none; of multi-label models booleans (n, C).
        labelled: booleans (n,), which samples have a label.

    Raises:
        DataError: a label that the model does not have.
    """

    def __init__(
        self, model: MoPE, samples: Sequence[Sample], *, on_step: Callable[[str], None] = lambda _: None
    ) -> None:
        self.model, self.samples, self.on_step = model, tuple(samples), on_step
        self.labelled = np.array([sample.label is not None for sample in self.samples], bool)  # (n,)
        self.truth = _truth(self.samples, model.config.labels, multi_label=model.task.several)
        self._eager: dict[int, Arrays] = {}
        self._feeds: dict[int, Arrays] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, row: int) -> str:
        """Where a sample is from, without the folder: that is a matter of this machine."""
        return f"{self.samples[row].source.name}:{self.samples[row].line}"

    def batches(self, *, limit: int | None = None, what: str = "a file") -> Iterator[Batch]:
        """The samples in order, in batches of 1, 3, then 16.

        Args:
            limit: only the first so many samples.
            what: is being compared, for ``on_step``.

        Raises:
            DataError: a sample that cannot be read, by file and line.
        """
        total = len(self) if limit is None else min(limit, len(self))
        for start, stop in _slices(len(self)):
            if start >= total:
                return
            feeds, rows = self._inputs(start, stop), slice(0, min(stop, total) - start)
            if start not in self._eager:
                self._eager[start] = eager_outputs(self.model, feeds)
            eager = self._eager[start]
            yield Batch(start, min(stop, total), _cut(feeds, rows), _cut(eager, rows))
            self.on_step(f"comparing {what} with the model ({min(stop, total):,} of {total:,} samples)")

    def _inputs(self, start: int, stop: int) -> Arrays:
        if start in self._feeds:
            return self._feeds[start]
        preprocessing = self.model.preprocessing
        arrays = preprocessing.collate([sample.load(preprocessing) for sample in self.samples[start:stop]])
        feeds = {name: arrays[name] for name in self.model.input_names}
        size = sum(array.nbytes for array in feeds.values())
        if self._bytes + size <= _KEPT_FEEDS:
            self._feeds[start] = feeds
            self._bytes += size
        return feeds


def _slices(count: int) -> Iterator[tuple[int, int]]:
    start = 0
    for size in _FIRST_SIZES:
        if start < count:
            yield start, min(start + size, count)
            start += size
    for begin in range(start, count, _SIZE):
        yield begin, min(begin + _SIZE, count)


def _cut(arrays: Arrays, rows: slice) -> Arrays:
    return {name: array[rows] for name, array in arrays.items()}


def _truth(samples: Sequence[Sample], labels: Sequence[str], *, multi_label: bool) -> NDArray[Any]:
    """Class indices (n,), -1 without a label; or booleans (n, C)."""
    index = {name: i for i, name in enumerate(labels)}
    truth = np.zeros((len(samples), len(labels)), bool) if multi_label else np.full(len(samples), -1)
    for row, sample in enumerate(samples):
        for name in (sample.label,) if isinstance(sample.label, str) else sample.label or ():
            if name not in index:
                raise DataError(
                    f"{sample.where}: unknown label", received=repr(name), expected=f"one of {', '.join(labels[:10])}"
                )
            if multi_label:
                truth[row, index[name]] = True
            else:
                truth[row] = index[name]
    return truth
