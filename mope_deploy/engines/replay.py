"""The golden samples at several sizes: an engine may be right at one batch size or text length and wrong at another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mope_deploy.engines.session import alone
from mope_deploy.engines.tensorrt.profiles import Sizes, chunks
from mope_deploy.limits import MAX_REPLAY_BYTES
from mope_deploy.manifest import TensorSpec
from mope_deploy.preprocess import AudioSpec, TextSpec

__all__ = ["Replay", "greatest_sizes", "replays"]


@dataclass(frozen=True)
class Replay:
    """One batch of golden samples.

    Attributes:
        name: of it, for messages.
        feeds: what a session takes.
        rows: (B,) which golden sample each row is.
    """

    name: str
    feeds: dict[str, NDArray[Any]]
    rows: NDArray[np.intp]


def replays(
    inputs: Mapping[str, NDArray[Any]], specs: Sequence[TensorSpec], *, greatest: Mapping[str, int], pad_id: int = 0
) -> Iterator[Replay]:
    """As stored; each sample alone, without padding; then a batch of the greatest sizes.

    Sizes below an engine's least are filled up by its session: a sample alone is its least batch.

    Args:
        inputs: the golden arrays.
        specs: of the session.
        greatest: size of each axis that varies, see :func:`greatest_sizes`; fewer rows where their arrays would take
            more than :data:`MAX_REPLAY_BYTES`.
        pad_id: of the tokenizer.
    """
    stored = {spec.name: inputs[spec.name] for spec in specs}
    shapes = {spec.name: spec.shape for spec in specs}
    yield Replay("as stored", stored, np.arange(len(next(iter(stored.values())))))
    each = list(alone(stored, shapes))
    for row, one in enumerate(each):
        yield Replay(f"sample {row} alone", one, np.array([row]))
    axes = {axis for spec in specs for axis in spec.shape if isinstance(axis, str)}
    longest = {axis: Sizes(size, size, size) for axis, size in greatest.items() if axis in axes - {"batch"}}
    padded = [next(chunks(one, specs, longest, pad_id=pad_id)).feeds for one in each]
    fits = MAX_REPLAY_BYTES // sum(array.nbytes for array in padded[0].values())
    rows = np.arange(max(1, min(greatest["batch"], fits))) % len(padded)
    feeds = {name: np.concatenate([padded[row][name] for row in rows]) for name in stored}
    sizes = ", ".join(f"{axis} {size.max:,}" for axis, size in longest.items())
    yield Replay(f"a batch of {len(rows)}" + (f" at {sizes}" if sizes else ""), feeds, rows)


def greatest_sizes(
    text: TextSpec | None, audio: AudioSpec | None, samples: int, asked: Mapping[str, int]
) -> dict[str, int]:
    """Greatest size of every axis that may vary.

    Args:
        text, audio: how they are prepared, which bounds their lengths; None where the model reads none.
        samples: golden ones, the greatest batch where nothing says more.
        asked: what an engine, or a bundle, was made for.
    """
    found = {"batch": samples}
    if text is not None:
        found["text_length"] = text.max_length
    if audio is not None:
        found["audio_length"] = audio.max_samples
    return found | dict(asked)
