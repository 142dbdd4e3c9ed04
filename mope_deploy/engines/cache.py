"""Rows that a part of a split graph made, kept by what they were made from: an input seen again is not run again."""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["CacheUse", "RowCache"]

_OVERHEAD = 256  # bytes of a key, its place in the dictionary and the array's own header, about


@dataclass(frozen=True)
class CacheUse:
    """What a cache did and holds."""

    hits: int  # rows that needed no run: kept from before, or the same as another row of their batch
    misses: int  # rows that were run
    entries: int  # rows it holds
    bytes: int  # that they take
    limit: int  # bytes that they may take

    def to_dict(self) -> dict[str, int]:
        """JSON-ready."""
        return dataclasses.asdict(self)


class RowCache:
    """A bounded store of rows by key, least recently used out first. Any number of threads may use it at once.

    It belongs to one session: keys say what went in, not which graph. A row that is larger alone than the ``limit`` in
    bytes is not kept.
    """

    def __init__(self, *, limit: int) -> None:
        self._limit = limit
        self._rows: OrderedDict[bytes, NDArray[Any]] = OrderedDict()  # the least recently used first
        self._bytes = self._hits = self._misses = 0
        self._lock = threading.Lock()  # never held while anything is computed

    @property
    def use(self) -> CacheUse:
        """Figures of this moment."""
        with self._lock:
            return CacheUse(self._hits, self._misses, len(self._rows), self._bytes, self._limit)

    def rows(self, keys: Sequence[bytes], compute: Callable[[list[int]], NDArray[Any]]) -> NDArray[Any]:
        """The rows of ``keys`` (B,) as one new array (B, F).

        Two threads that miss the same key at the same time both compute it.

        Args:
            keys: equal ones stand for equal rows.
            compute: called with the positions of rows that must be computed, n distinct ones in order, if there are
                any; gives (n, F).
        """
        with self._lock:
            known = {key: self._rows[key] for key in keys if key in self._rows}
            for key in known:
                self._rows.move_to_end(key)
        first = {key: i for i, key in reversed([*enumerate(keys)])}
        positions = sorted(i for key, i in first.items() if key not in known)
        if positions:
            made = compute(positions)
            # Copied: a view would keep all of its batch alive.
            known |= {keys[i]: row.copy() for i, row in zip(positions, made, strict=True)}
        with self._lock:
            self._misses += len(positions)
            self._hits += len(keys) - len(positions)
            for i in positions:
                self._keep(keys[i], known[keys[i]])
        return np.stack([known[key] for key in keys])

    def _keep(self, key: bytes, row: NDArray[Any]) -> None:
        if (size := row.nbytes + _OVERHEAD) > self._limit:
            return
        if key not in self._rows:  # else another thread was faster
            self._bytes += size
        self._rows[key] = row
        self._rows.move_to_end(key)
        while self._bytes > self._limit:
            _, oldest = self._rows.popitem(last=False)
            self._bytes -= oldest.nbytes + _OVERHEAD
