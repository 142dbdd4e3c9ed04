"""Whether a folder's files are the ones that were there before, without reading them again.

What is loaded after its hash was taken may be another file by then: a bundle is updated in place, or another one is
renamed to its name, and even back again. No file and no folder is changed, replaced or renamed without that its number
or one of its times changes. Systems count times in ticks of up to 10 ms, so a folder that was changed just now is
looked at again a little later: what changes from then on has another time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Seen"]

_TICK = 0.02  # seconds
_TRIES = 5  # of looking again; a folder that is written to all the time is found out by what is read


@dataclass(frozen=True)
class Seen:
    """What tells a folder's files, and the folders that they are in, from any that replace them.

    Args:
        folder: its own numbers and times.
        inner: those of everything in it that was asked for.
        grown: whether the one thing is there that may appear in it: the folder for engines that are built here.
    """

    folder: tuple[int, ...]
    inner: tuple[tuple[int, ...], ...]
    grown: bool

    @classmethod
    def of(cls, folder: Path, names: Iterable[str], *, may_appear: str) -> Seen:
        """Raises :class:`OSError` where one of ``names`` is not there."""
        inside = [folder / name for name in names]
        paths = sorted({*inside, *(path.parent for path in inside)} - {folder})
        for _ in range(_TRIES):
            found = cls(_identity(folder), tuple(map(_identity, paths)), (folder / may_appear).exists())
            if time.time() - max(newest for *_, newest in (found.folder, *found.inner)) / 1e9 > _TICK:
                break
            time.sleep(_TICK)
        return found

    def is_still(self, later: Seen) -> bool:
        """Whether ``later`` is the same; the folder's times change as its one new folder appears."""
        if later.grown and not self.grown:
            return self.folder[:2] == later.folder[:2] and self.inner == later.inner
        return (self.folder, self.inner) == (later.folder, later.inner)


def _identity(path: Path) -> tuple[int, ...]:
    it = os.stat(path, follow_symlinks=False)
    return it.st_dev, it.st_ino, it.st_size, it.st_mtime_ns, it.st_ctime_ns
