"""Batches of a split as tensors: the same arrays that the device computes, without computing any of them twice.

Letters: B batch · C classes · D_y width of a complementary feature.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from mope_deploy.errors import DataError, MopeError
from mope_deploy.files import reason
from mope_deploy.preprocess import present_name
from mope_deploy.progress import track
from train.data.media import MediaCache
from train.data.split import Split

__all__ = ["Batches", "made_by_workers", "rows_of"]

TOKENISED = 256  # texts whose tokens are in memory at once, where they are only counted


class Batches(Dataset):
    """A split for a ``DataLoader``, which asks for a whole batch at once (``collate_fn=Batches.ready``).

    A batch is ``{"inputs": {name: Tensor}, "labels": Tensor}``, with ``"y": {modality: (B, D_y)}`` where features of
    the complementary encoders are given; then the inputs of those encoders are left out, but for those that say which
    rows have them. Labels are as :meth:`mope_deploy.task.Task.encode` makes them, (B,) or (B, C).

    Args:
        split: the rows.
        media: decoded pictures and clips, and the model's preprocessing.
        y: features of the split's different inputs, {modality: (number of them, D_y)}.
    """

    def __init__(self, split: Split, media: MediaCache, *, y: Mapping[str, Tensor] | None = None) -> None:
        self.split, self.media, self.preprocessing = split, media, media.preprocessing
        self.y = dict(y or {})
        self.modalities = tuple(name for name in self.preprocessing.modalities if name not in self.y)
        self._targets = torch.from_numpy(split.targets)

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        rows = np.asarray(indices, np.int64)  # (B,)
        batch: dict[str, Any] = {"inputs": self.inputs(rows), "labels": self._targets[torch.from_numpy(rows)]}
        if self.y:
            batch["y"] = {name: rows_of(features, self.split.columns[name][rows]) for name, features in self.y.items()}
        return batch

    @property
    def encodes_text(self) -> bool:
        """Whether batches hold texts, which may be of different lengths."""
        return "text" in self.modalities

    def text_lengths(self) -> NDArray[np.int64]:
        """Tokens of each row's text (n,), 0 where a row has none."""
        texts = self.split.values["text"]
        counts = np.zeros(len(texts) + 1, np.int64)  # the last one is what the index -1 means
        for start in track(range(0, len(texts), TOKENISED), what=f"counting tokens of {self.split.name}"):
            encoded = self.preprocessing.encode_text(texts[start : start + TOKENISED])
            tokens = encoded["attention_mask"].sum(axis=1)
            counts[start : start + len(tokens)] = tokens
        return counts[self.split.columns["text"]]

    def longest_first(self) -> NDArray[np.int64]:
        """The rows by the length of their texts: little padding, and what is too large for memory shows at once.

        Of equally long ones, and where no text is encoded, the order is kept.
        """
        return np.argsort(-self.text_lengths(), kind="stable") if self.encodes_text else np.arange(len(self))

    def select(self, rows: NDArray[np.int64]) -> Batches:
        """These rows alone, in this order."""
        return Batches(self.split.select(rows), self.media, y=self.y)

    @staticmethod
    def ready(batch: dict[str, Any]) -> dict[str, Any]:
        """The ``collate_fn``: what :meth:`__getitems__` returns is a batch already."""
        return _Batch(batch)

    def inputs(self, rows: NDArray[np.int64]) -> dict[str, Tensor]:
        """The model's inputs for these rows, equal to the last bit to what ``Preprocessing.collate`` makes of them.

        Raises:
            DataError: a file that was not checked before cannot be decoded; names file and line.
        """
        arrays: dict[str, NDArray[Any]] = {}
        for name in self.modalities:
            arrays |= self.preprocessing.arrays(name, [self._load(name, row) for row in rows])
        for name in self.y:
            if name in self.preprocessing.missing:
                arrays[present_name(name)] = (self.split.columns[name][rows] >= 0).astype(np.int64)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _load(self, name: str, row: int) -> Any:
        index = self.split.columns[name][row]
        if index < 0:
            return None
        value = self.split.values[name][index]
        if name == "text":
            return value
        try:
            return self.media.get(value, name)
        except DataError as error:
            raise DataError(f"{self.split.where(row)}: {error}") from error


class _Batch(dict[str, Any]):
    """A batch that comes out of a worker process as bytes in a pipe.

    Tensors would come through shared memory, of which a container often has 64 MB; where that is full, torch loses the
    batch without a word and waits for it for ever.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _from_arrays, (_converted(self, lambda tensor: tensor.numpy()),)


def _from_arrays(batch: dict[str, Any]) -> _Batch:
    return _Batch(_converted(batch, torch.from_numpy))


def _converted(values: Any, convert: Any) -> Any:
    return {k: _converted(v, convert) for k, v in values.items()} if isinstance(values, dict) else convert(values)


def made_by_workers(batches: Iterable[dict[str, Any]], *, workers: int) -> Generator[dict[str, Any], None, None]:
    """The batches of a loader, and one line where a worker cannot make one.

    Raises:
        MopeError: what a worker raised, as it would have been raised without workers; or why there is none.
    """
    todo = "use fewer, or data.workers=0, which prepares batches in the training process"
    try:
        yield from batches
    except MopeError as error:
        said = str(error)
        if workers and said.startswith("Caught "):  # torch adds the worker's traceback, whose last line is the error
            raise type(error)(said.rstrip().rpartition(f"{type(error).__name__}: ")[2]) from None
        raise
    except OSError as error:
        if not workers:
            raise
        what = f"{workers} processes that prepare batches cannot be started"
        raise MopeError(what, received=reason(error), todo=todo) from error
    except RuntimeError as error:
        if not workers or "DataLoader worker" not in str(error):
            raise
        raise MopeError("a process that prepares batches died", received=reason(error), todo=todo) from error


def rows_of(features: Tensor, index: NDArray[np.int64]) -> Tensor:
    """Features (number of them, D) by index (B,) → (B, D); zeros where the index is -1, which stands for none."""
    found = torch.from_numpy(index)
    if not len(features):
        return features.new_zeros(len(index), features.shape[1])
    return features[found.clamp(min=0)] * (found >= 0).unsqueeze(1)
