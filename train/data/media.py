"""Decoded pictures and clips in memory, up to a stated bound: with frozen encoders they never change."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from numpy.typing import NDArray

from mope_deploy.errors import DataError
from mope_deploy.preprocess import Preprocessing
from mope_deploy.progress import track

__all__ = ["MediaCache"]


class MediaCache:
    """Files as :meth:`Preprocessing.load` returns them, by modality and path.

    Args:
        preprocessing: of the model that will read them.
        limit_mb: memory for what was decoded in MiB; what does not fit is decoded again each time.
    """

    def __init__(self, preprocessing: Preprocessing, *, limit_mb: int) -> None:
        self.preprocessing = preprocessing
        self.room = limit_mb * 2**20  # bytes left
        self.notices: list[str] = []  # what should be known of the files checked so far
        self._kept: dict[tuple[str, str], NDArray[Any]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, path: str, modality: str = "image") -> NDArray[Any]:
        """One picture or clip.

        Raises:
            MediaError: it cannot be decoded or is outside the stated limits.
        """
        found = self._kept.get((modality, path))
        if found is None:
            found = self.preprocessing.load(modality, path)
            self._keep(modality, path, found)
        return found

    def check(self, paths: Iterable[str], *, what: str, threads: int, modality: str = "image") -> dict[str, DataError]:
        """Decode every file once, keeping as many as there is room for.

        Returns:
            The error of each file that cannot be used, by path.
        """
        wanted = [path for path in dict.fromkeys(paths) if (modality, path) not in self._kept]
        bad: dict[str, DataError] = {}

        def one(path: str) -> tuple[NDArray[Any] | DataError, list[str]]:
            heard: list[str] = []
            try:
                return self.preprocessing.load(modality, path, on_notice=heard.append), heard
            except DataError as error:
                return error, heard

        with ThreadPoolExecutor(threads) as pool:
            found = zip(wanted, pool.map(one, wanted), strict=True)
            for path, (result, heard) in track(found, what=what, total=len(wanted)):
                self.notices += [notice if path in notice else f"{path}: {notice}" for notice in heard]
                if isinstance(result, DataError):
                    bad[path] = result
                else:
                    self._keep(modality, path, result)
        return bad

    def _keep(self, modality: str, path: str, found: NDArray[Any]) -> None:
        if found.nbytes <= self.room:
            self.room -= found.nbytes
            self._kept[modality, path] = found
