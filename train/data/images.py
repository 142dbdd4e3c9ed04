"""Decoded pictures in memory, up to a stated bound: with frozen encoders nothing else about a picture ever changes."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from mope_deploy.errors import DataError
from mope_deploy.preprocess import Preprocessing
from mope_deploy.progress import track

__all__ = ["ImageCache"]


class ImageCache:
    """Pictures as :meth:`Preprocessing.load_image` returns them, uint8 (H, W, 3), by path.

    Args:
        preprocessing: of the model that will read them.
        limit_mb: memory for decoded pictures in MiB; those beyond it are decoded again each time.
    """

    def __init__(self, preprocessing: Preprocessing, *, limit_mb: int) -> None:
        assert preprocessing.image is not None
        self.preprocessing = preprocessing
        self.capacity = (limit_mb * 2**20) // (preprocessing.image.height * preprocessing.image.width * 3)
        self._kept: dict[str, NDArray[np.uint8]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, path: str) -> NDArray[np.uint8]:
        """One picture.

        Raises:
            MediaError: it cannot be decoded or is outside the stated limits.
        """
        found = self._kept.get(path)
        if found is None:
            found = self.preprocessing.load_image(path)
            if len(self._kept) < self.capacity:
                self._kept[path] = found
        return found

    def check(self, paths: Iterable[str], *, what: str, threads: int) -> dict[str, DataError]:
        """Decode every picture once, keeping as many as there is room for.

        Returns:
            The error of each picture that cannot be used, by path.
        """
        wanted = [path for path in dict.fromkeys(paths) if path not in self._kept]
        bad: dict[str, DataError] = {}

        def one(path: str) -> None:
            try:
                self.get(path)
            except DataError as error:
                bad[path] = error

        # load_image sets warning filters, which belong to the whole process: put back what was there before.
        with warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
            for _ in track(pool.map(one, wanted), what=what, total=len(wanted)):
                pass
        return bad
