"""The eager side of the gate: real samples with what the untouched model computes for them, once for all files."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.gate.cases import Case, batches_of
from export.gate.reference import Batch, eager_outputs
from mope_deploy.data import Sample
from mope_deploy.engines.onnxruntime.cpu import CpuSettings
from mope_deploy.errors import DataError
from mope_deploy.model import MoPE

__all__ = ["Evaluation"]

_KEPT_FEEDS = 128 * 2**20  # bytes; what is beyond is decoded again for every file

Arrays = dict[str, NDArray[Any]]


class Evaluation:
    """Real samples and the eager float32 model's outputs for them, which every file is compared with.

    The model runs once per sample, when it is first needed; only its outputs are kept, and the inputs of the first
    samples, which a repair looks at again and again. Memory does not grow with pictures.

    Args:
        model: the trained model; its mode is left as it is.
        samples: as many as there are, at best :data:`~export.limits.GATE_SAMPLES` or more. Those without a label
            count for everything but the metric.
        on_step: called with a few words after each batch.
        cpu: how a device sets up the sessions of those files; see :func:`export.gate.device.open_files`.

    Attributes:
        truth: of all samples, in the form of :meth:`mope_deploy.task.Task.encode`.
        labelled: booleans (n,), which samples have a label.

    Raises:
        DataError: a label that the model does not have.
    """

    def __init__(
        self,
        model: MoPE,
        samples: Sequence[Sample],
        *,
        on_step: Callable[[str], None] = lambda _: None,
        cpu: CpuSettings | None = None,
    ) -> None:
        self.model, self.samples, self.on_step, self.cpu = model, tuple(samples), on_step, cpu
        self.labelled = np.array([sample.label is not None for sample in self.samples], bool)  # (n,)
        _check_labels(self.samples, model.task.labels)
        self.truth = model.task.encode([sample.label for sample in self.samples])
        self._eager: dict[int, Arrays] = {}
        self._feeds: dict[int, Arrays] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, row: int) -> str:
        """Where a sample is from, without the folder: that is a matter of this machine."""
        return f"{self.samples[row].source.name}:{self.samples[row].line}"

    def rows(self, start: int) -> range:
        """The samples of one batch."""
        return range(start, next(stop for first, stop in batches_of(len(self)) if first == start))

    def covering(self, *, least: int, most: int) -> tuple[int, ...]:
        """Batches, by their first sample, with every label and every expert that the model was seen to choose on any.

        Args:
            least: samples at least, if there are as many.
            most: samples from which on no more are added.
        """
        chosen: list[int] = []
        seen: set[tuple[Any, ...]] = set()
        count = 0
        for start, eager in sorted(self._eager.items()):
            new = self._shown(eager) - seen
            if count < most and (new or count < least):
                chosen.append(start)
                seen |= new
                count += len(eager["logits"])
        return tuple(chosen)

    def _shown(self, eager: Arrays) -> set[tuple[Any, ...]]:
        """Labels given and experts selected, the first expert of each sample where all take part."""
        task = self.model.task
        cells = task.cells(task.decide(eager["logits"]))
        shown: set[tuple[Any, ...]] = {("label", *cell) for cell in set(zip(*_indexed(cells), strict=True))}
        if "routing" in eager:
            top_k = self.model.config.top_k
            routing = eager["routing"]  # (B, layers, K)
            selected = routing > 0 if top_k else routing == routing.max(axis=-1, keepdims=True)
            shown |= {("expert", layer, k) for _, layer, k in np.argwhere(selected).tolist()}
        return shown

    def batches(self, *, only: Collection[int] | None = None, what: str = "a file") -> Iterator[Batch]:
        """The samples in order, in batches of 1, 3, then 16.

        Args:
            only: only these batches, by their first sample.
            what: is being compared, for ``on_step``.

        Raises:
            DataError: a sample that cannot be read, by file and line.
        """
        for start, stop in batches_of(len(self)):
            if only is not None and start not in only:
                continue
            feeds = self._inputs(start, stop)
            if start not in self._eager:
                self._eager[start] = eager_outputs(self.model, feeds)
            yield Batch(Case(f"samples {start + 1} to {stop}", "samples", feeds), self._eager[start])
            self.on_step(f"comparing {what} with the model ({stop:,} of {len(self):,} samples)")

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


def _indexed(cells: NDArray[Any]) -> tuple[list[Any], list[Any]]:
    """Which answer each cell is, and what it says."""
    columns = np.broadcast_to(np.arange(cells.shape[1]), cells.shape)
    return columns.ravel().tolist(), cells.ravel().tolist()


def _check_labels(samples: Sequence[Sample], labels: Sequence[str]) -> None:
    expected = f"one of {', '.join(labels[:10])}"
    for sample in samples:
        for name in (sample.label,) if isinstance(sample.label, str) else sample.label or ():
            if name not in labels:
                raise DataError(f"{sample.where}: unknown label", received=repr(name), expected=expected)
