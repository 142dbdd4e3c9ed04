"""A split graph as one session: each part on its modality, then the main file; rows of parts are kept for next time."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mope_deploy.engines.cache import RowCache
from mope_deploy.engines.session import Arrays, Session, alone, check_feeds, check_outputs, take
from mope_deploy.errors import EngineError
from mope_deploy.manifest import Graph, Part, conditions_name
from mope_deploy.preprocess import present_name

__all__ = ["SplitSession", "content_keys"]


class SplitSession:
    """The sessions of a split graph's files; the :class:`~mope_deploy.engines.session.Session` protocol.

    Its inputs are the raw ones of the whole graph. With a cache, a sample whose input was seen before is not run again,
    and equal ones of a batch run once. Those that do run form one batch. So a result differs from the one without a
    cache by rounding at most, and not at all where the same samples run together.

    Args:
        graph: what the manifest says about it.
        main, parts: of its main file, and of each part by modality.
        cache: for rows of all parts; None to run every row.
    """

    def __init__(
        self, graph: Graph, main: Session, parts: Mapping[str, Session], *, cache: RowCache | None = None
    ) -> None:
        self.main, self.parts, self.cache = main, parts, cache
        self.name, self.device, self.why = main.name, main.device, main.why
        self.settings = main.settings
        self.least_tolerance = max(session.least_tolerance for session in (main, *parts.values()))
        self.inputs, self.outputs = graph.raw_inputs, graph.outputs
        self._graph = graph

    @property
    def uncached(self) -> SplitSession:
        """The same sessions, which run every row anew."""
        return SplitSession(self._graph, self.main, self.parts)

    def run(self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str] | None = None) -> Arrays:
        names = check_outputs(outputs, self.outputs)
        check_feeds(feeds, self.inputs)
        return self.main.run(self.main_feeds(feeds), names)

    def main_feeds(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        """What the main file takes for these raw inputs: its own share of them, and every part's row, run or kept."""
        own = {spec.name: feeds[spec.name] for spec in self._graph.inputs if spec.name in feeds}
        return own | {conditions_name(part.modality): self._conditions(part, feeds) for part in self._graph.parts}

    def _conditions(self, part: Part, feeds: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        """(B, F)."""
        mine = {spec.name: feeds[spec.name] for spec in part.inputs}
        shapes = {spec.name: spec.shape for spec in part.inputs}
        name, session = conditions_name(part.modality), self.parts[part.modality]

        def compute(rows: Sequence[int]) -> NDArray[Any]:
            whole = len(rows) == len(next(iter(mine.values())))
            made = session.run(mine if whole else take(mine, shapes, rows), [name])[name]
            if not np.isfinite(made).all():  # said here: the main file would blame what it was fed
                raise EngineError(f"{session.name} on {session.device} made NaN or infinity of the {part.modality}")
            return made

        if self.cache is None:
            return compute(range(len(next(iter(mine.values())))))
        return self.cache.rows(content_keys(part.modality, mine, shapes), compute)


def content_keys(
    modality: str, feeds: Mapping[str, NDArray[Any]], shapes: Mapping[str, Sequence[int | str]]
) -> list[bytes]:
    """One digest for each sample of a batch: of its own arrays, without the padding that the batch gave them.

    Samples that lack the modality share one: whatever stands in their other arrays is not used. Arguments as of
    :func:`mope_deploy.engines.session.alone`.
    """
    keys = []
    for one in alone(feeds, shapes):
        digest = hashlib.blake2b(modality.encode(), digest_size=32)
        present = one.get(present_name(modality))
        for name in [present_name(modality)] if present is not None and not present.any() else sorted(one):
            array = np.ascontiguousarray(one[name])
            digest.update(f" {name} {array.dtype.str} {array.shape} ".encode())
            digest.update(array.data)
        keys.append(digest.digest())
    return keys
