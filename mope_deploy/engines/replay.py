"""The golden samples at several sizes: an engine may be right at one batch size or text length and wrong at another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mope_deploy.engines.session import alone, take
from mope_deploy.engines.tensorrt.profiles import Sizes, chunks
from mope_deploy.errors import EngineError
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

    Samples that are longer than an engine was built for are left out.

    Raises:
        EngineError: all of them are.
    """
    stored = {spec.name: inputs[spec.name] for spec in specs}
    shapes = {spec.name: spec.shape for spec in specs}
    each = [one for one in enumerate(alone(stored, shapes)) if _fits(one[1], shapes, greatest)]
    if not each:
        sizes = ", ".join(f"{axis} {size:,}" for axis, size in greatest.items() if axis != "batch")
        raise EngineError(
            "every golden sample is longer than this engine takes",
            expected=f"at most {sizes}",
            todo="build it for longer ones: mope build BUNDLE --text-len min:opt:max",
        )
    known = np.array([row for row, _ in each])
    yield Replay("as stored", take(stored, shapes, known.tolist()), known)
    for row, one in each:
        yield Replay(f"sample {row} alone", one, np.array([row]))
    axes = {axis for spec in specs for axis in spec.shape if isinstance(axis, str)}
    longest = {axis: Sizes(size, size, size) for axis, size in greatest.items() if axis in axes - {"batch"}}
    padded = [next(chunks(one, specs, longest, pad_id=pad_id)).feeds for _, one in each]
    fits = MAX_REPLAY_BYTES // sum(array.nbytes for array in padded[0].values())
    rows = np.arange(max(1, min(greatest["batch"], fits))) % len(padded)
    feeds = {name: np.concatenate([padded[row][name] for row in rows]) for name in stored}
    sizes = ", ".join(f"{axis} {size.max:,}" for axis, size in longest.items())
    yield Replay(f"a batch of {len(rows)}" + (f" at {sizes}" if sizes else ""), feeds, known[rows])


def _fits(
    one: Mapping[str, NDArray[Any]], shapes: Mapping[str, Sequence[int | str]], greatest: Mapping[str, int]
) -> bool:
    sizes = ((size, axis) for name, array in one.items() for size, axis in zip(array.shape, shapes[name], strict=True))
    return all(size <= greatest.get(axis, size) for size, axis in sizes if isinstance(axis, str) and axis != "batch")


def greatest_sizes(
    text: TextSpec | None,
    audio: AudioSpec | None,
    samples: int,
    *,
    engine: Mapping[str, int],
    bundle: Mapping[str, int],
) -> dict[str, int]:
    """Greatest size of every axis that may vary.

    Args:
        text, audio: how they are prepared, which bounds their lengths; None where the model reads none.
        samples: golden ones, the greatest batch where nothing says more.
        engine: what the engine was built for; else empty.
        bundle: what it was exported for, which may be less than what is prepared.
    """
    found = {"batch": max(samples, bundle.get("batch", 1))}
    if text is not None:
        found["text_length"] = text.max_length
    if audio is not None:
        found["audio_length"] = audio.max_samples
    return found | dict(engine)
