"""Which sizes an engine is built for: ``--batch 1:4:16 --text-len 8:32:128``, and batches made to fit them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mope_deploy.errors import EngineError, UsageError
from mope_deploy.manifest import Manifest, TensorSpec

__all__ = ["Chunk", "Profile", "Sizes", "TopK", "check_topk", "chunks", "make_profile", "profile_shapes"]

DEFAULT_BATCH = "1:4:16"
OPTIONS = {"batch": "--batch", "text_length": "--text-len", "audio_length": "--audio-len"}
LARGEST = {"batch": 4096, "text_length": 1_000_000, "audio_length": 10**9}


@dataclass(frozen=True)
class Sizes:
    """Least, best and greatest size of one axis; an engine is tuned for the second and takes all between the others."""

    min: int
    opt: int
    max: int

    @classmethod
    def parse(cls, text: str, *, axis: str) -> Sizes:
        """``"1:4:16"``, or one number for an axis that never varies; :class:`UsageError` else, or if not in order."""
        option, most = OPTIONS.get(axis, axis), LARGEST.get(axis, 2**31 - 1)
        if not re.fullmatch(r"\d{1,10}(:\d{1,10}:\d{1,10})?", text, re.ASCII):
            raise UsageError(option, received=repr(text[:60]), expected="min:opt:max, like 1:4:16, or one number")
        numbers = [int(part) for part in text.split(":")]
        least, best, greatest = numbers * 3 if len(numbers) == 1 else numbers
        if not 1 <= least <= best <= greatest <= most:
            raise UsageError(option, received=text, expected=f"1 <= min <= opt <= max <= {most:,}")
        return cls(least, best, greatest)

    def __str__(self) -> str:
        return f"{self.min}:{self.opt}:{self.max}"


Profile = Mapping[str, Sizes]  # name of an axis → its sizes


def make_profile(
    manifest: Manifest,
    inputs: Sequence[TensorSpec],
    *,
    batch: str | None = None,
    text_length: str | None = None,
    audio_length: str | None = None,
) -> dict[str, Sizes]:
    """Sizes for every axis of ``inputs`` that varies, checked against what the bundle's preprocessing makes.

    Args:
        manifest: of the bundle.
        inputs: of the graph.
        batch, text_length, audio_length: ``"min:opt:max"``, samples, tokens with special ones, and samples at the
            encoder's rate; by default what the bundle was exported for, else ``1:4:16`` and all lengths that occur.

    Raises:
        UsageError: malformed sizes, a text or clip longer than the bundle ever makes or shorter than its encoder reads,
            sizes for an axis that is not there.
    """
    axes = {axis for spec in inputs for axis in spec.shape if isinstance(axis, str)}
    given = {"batch": batch, "text_length": text_length, "audio_length": audio_length}
    for axis, text in given.items():
        if text is not None and axis not in axes:
            raise UsageError(OPTIONS[axis], received=text, expected=f"no sizes: this graph has no axis {axis}")
    if unknown := sorted(axes - set(given)):
        raise EngineError("the graph has an axis of unknown meaning", received=unknown[0], expected=", ".join(given))
    profile = {}
    for axis in (axis for axis in given if axis in axes):
        exported_for, (default, expected) = manifest.build.profile.get(axis), _default(manifest, axis)
        text = given[axis] or (":".join(map(str, exported_for)) if exported_for else str(default))
        sizes = profile[axis] = Sizes.parse(text, axis=axis)
        if expected and not default.min <= sizes.min <= sizes.max <= default.max:
            raise UsageError(OPTIONS[axis], received=str(sizes), expected=expected)
    return profile


def _default(manifest: Manifest, axis: str) -> tuple[Sizes, str]:
    """Sizes for every length that the bundle makes, and what messages say of others; batches may be of any size.

    The manifest's reader holds that a part is there with its axis.
    """
    if axis == "text_length":
        assert manifest.text is not None
        most = manifest.text.max_length
        expected = f"at most {most:,}: this bundle cuts longer texts to {most:,} tokens"
        return Sizes(1, min(32, most), most), expected
    if axis == "audio_length":
        assert manifest.audio is not None
        least, most = manifest.audio.min_samples, manifest.audio.max_samples
        best = min(max(least, 3 * manifest.audio.sample_rate), most)
        return Sizes(least, best, most), f"{least:,} to {most:,} samples: what this bundle makes of a clip"
    return Sizes.parse(DEFAULT_BATCH, axis=axis), ""


def profile_shapes(
    spec: TensorSpec, profile: Profile
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None:
    """Least, best and greatest shape of one input; None if none of its axes varies."""
    if not any(isinstance(axis, str) for axis in spec.shape):
        return None
    sizes = [Sizes(axis, axis, axis) if isinstance(axis, int) else profile[axis] for axis in spec.shape]
    return tuple(s.min for s in sizes), tuple(s.opt for s in sizes), tuple(s.max for s in sizes)


@dataclass(frozen=True)
class TopK:
    """A TopK of the parsed network."""

    name: str  # of the layer
    k: int  # how many it takes
    size: int | str | None  # of the axis it takes them from, or that axis's name; None if it varies and has none


def check_topk(layers: Sequence[TopK], profile: Profile) -> None:
    """Every TopK finds as many values as it takes at every size; TensorRT only warns, and its engine cannot run.

    Raises:
        UsageError: the profile's least size is below a K.
        EngineError: a K that is not constant, or above an axis of fixed size.
    """
    for layer in layers:
        if layer.k < 1:
            raise EngineError(f"TopK {layer.name}", received="a K that is computed", expected="a constant K")
        if isinstance(layer.size, int):
            if layer.k > layer.size:
                raise EngineError(f"TopK {layer.name}", received=f"K = {layer.k} of {layer.size} values")
            continue
        # An axis without a name may be any of them: the least of all must do.
        axes = [layer.size] if layer.size is not None and layer.size in profile else sorted(profile)
        for axis in axes:
            if profile[axis].min < layer.k:
                raise UsageError(
                    OPTIONS.get(axis, axis),
                    received=f"{profile[axis]} with a least size of {profile[axis].min}",
                    expected=f"a least size of {layer.k}, as TopK {layer.name} takes {layer.k} values",
                )


@dataclass(frozen=True)
class Chunk:
    """A part of a batch, padded to the least sizes of a profile; only the first ``rows`` rows count."""

    feeds: dict[str, NDArray[Any]]
    rows: int


def chunks(
    feeds: Mapping[str, NDArray[Any]], inputs: Sequence[TensorSpec], profile: Profile, *, pad_id: int = 0
) -> Iterator[Chunk]:
    """Cut and pad a batch so that each part fits the profile.

    More rows than the greatest batch make several chunks; fewer than the least are filled up with the last row. Texts
    and clips shorter than the least length are padded as preprocessing pads them: ``pad_id`` or silence where the mask
    is 0.

    Args:
        feeds: arrays by name, checked against ``inputs`` before.
        inputs, profile: the graph's, and sizes of every axis that varies.
        pad_id: of the tokenizer.

    Raises:
        UsageError: a text or clip longer than the profile's greatest length.
    """
    axes = {spec.name: spec.shape for spec in inputs}
    made = dict(feeds)
    for axis in ("text_length", "audio_length"):
        if axis in profile:
            made = {name: _pad(name, array, axes[name], axis, profile[axis], pad_id) for name, array in made.items()}
    batch = profile.get("batch")
    total = next(array.shape[axes[name].index("batch")] for name, array in made.items() if "batch" in axes[name])
    step = batch.max if batch else total
    for start in range(0, total, step):
        part = {name: array[start : start + step] for name, array in made.items()}
        rows = min(step, total - start)
        if batch and rows < batch.min:
            part = {name: np.concatenate([a, np.repeat(a[-1:], batch.min - rows, axis=0)]) for name, a in part.items()}
        yield Chunk({name: np.ascontiguousarray(array) for name, array in part.items()}, rows)


def _pad(
    name: str, array: NDArray[Any], shape: tuple[int | str, ...], varying: str, sizes: Sizes, pad_id: int
) -> NDArray[Any]:
    if varying not in shape:
        return array
    axis = shape.index(varying)
    length = array.shape[axis]
    if length > sizes.max:
        what = "texts of {:,} tokens" if varying == "text_length" else "clips of {:,} samples"
        raise UsageError(
            f"input {name}",
            received=what.format(length),
            expected=f"at most {sizes.max:,}, which the engine was built for",
            todo=f"build it for longer ones: mope build BUNDLE {OPTIONS[varying]} min:opt:max",
        )
    if length >= sizes.min:
        return array
    widths = [(0, sizes.min - length if i == axis else 0) for i in range(array.ndim)]
    return np.pad(array, widths, constant_values=pad_id if name == "input_ids" else 0)
