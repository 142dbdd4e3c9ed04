"""Batches of a split as tensors: the same arrays that the device computes, without computing any of them twice.

Letters: B batch · C classes · D_y width of a complementary feature.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from mope_deploy.errors import DataError
from mope_deploy.preprocess import Preprocessing
from train.data.images import ImageCache
from train.data.split import Split

__all__ = ["Batches"]


class Batches(Dataset):
    """A split for a ``DataLoader``, which asks for a whole batch at once (``collate_fn=Batches.ready``).

    A batch is ``{"inputs": {name: Tensor}, "labels": Tensor}``, with ``"y": {modality: (B, D_y)}`` where features of
    the complementary encoders are given; then the inputs of those encoders are left out. Labels are class indices int64
    (B,), or for multi-label float32 (B, C) of 0 and 1.

    Args:
        split: the rows.
        preprocessing: of the model.
        images: decoded pictures; None if the model reads none.
        modalities: those whose inputs a batch has.
        y: features of the split's different texts (or pictures), {modality: (number of them, D_y)}.
    """

    def __init__(
        self,
        split: Split,
        preprocessing: Preprocessing,
        images: ImageCache | None,
        *,
        modalities: Collection[str] = ("image", "text"),
        y: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.split, self.preprocessing, self.images = split, preprocessing, images
        self.y = dict(y or {})
        self.modalities = tuple(name for name in modalities if name not in self.y)
        self._index = {"image": split.column("image"), "text": split.column("text")}
        targets = split.targets()
        self._targets = torch.from_numpy(targets.astype(np.float32) if split.multi_label else targets)

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        rows = np.asarray(indices, np.int64)  # (B,)
        batch: dict[str, Any] = {"inputs": self.inputs(rows), "labels": self._targets[torch.from_numpy(rows)]}
        if self.y:
            batch["y"] = {
                name: features[torch.from_numpy(self._index[name][rows])] for name, features in self.y.items()
            }
        return batch

    @staticmethod
    def ready(batch: dict[str, Any]) -> dict[str, Any]:
        """The ``collate_fn``: what :meth:`__getitems__` returns is a batch already."""
        return batch

    def inputs(self, rows: NDArray[np.int64]) -> dict[str, Tensor]:
        """The model's inputs for these rows, equal to the last bit to what ``Preprocessing.collate`` makes of them.

        Raises:
            DataError: a picture that was not checked before cannot be decoded; names file and line.
        """
        arrays: dict[str, NDArray[Any]] = {}
        if "image" in self.modalities:
            arrays["pixel_values"] = self.preprocessing.normalise(np.stack([self._image(row) for row in rows]))
        if "text" in self.modalities:
            texts = [self.split.texts[i] for i in self._index["text"][rows]]
            arrays.update(self.preprocessing.encode_text(texts))
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _image(self, row: int) -> NDArray[np.uint8]:
        assert self.images is not None
        try:
            return self.images.get(self.split.images[self._index["image"][row]])
        except DataError as error:
            raise DataError(f"{self.split.where(row)}: {error}") from error
