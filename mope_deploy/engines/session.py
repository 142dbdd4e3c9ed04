"""What every inference engine looks like from outside, and the check of what is fed to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mope_deploy.errors import EngineError, UsageError
from mope_deploy.fields import shown
from mope_deploy.manifest import TensorSpec

__all__ = ["TF32_TOLERANCE", "Arrays", "Session", "alone", "check_feeds", "check_interface", "check_outputs", "take"]

TF32_TOLERANCE = 5e-3  # of float32 products rounded to ten bits of mantissa, which the manifest's tolerance is not for

Arrays = dict[str, NDArray[Any]]


class Session(Protocol):
    """One graph, loaded and ready.

    Attributes:
        name: of the engine: ``"onnxruntime"``, ``"tensorrt"``, ``"tensorrt_rtx"``.
        device: what executes it, in the engine's own words.
        why: why this engine was chosen, where the choice was left to us; else empty.
        settings: how it was set up, JSON-ready, where that is ours to choose: threads and arena on a CPU.
        least_tolerance: of golden samples, where arithmetic is coarser on purpose (TF32); else 0.
        inputs, outputs: as the manifest has them; checked against the loaded file. Of a split graph the raw inputs.
    """

    name: str
    device: str
    why: str
    settings: dict[str, Any]
    least_tolerance: float
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def run(self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str] | None = None) -> Arrays:
        """Compute ``outputs`` (all of them by default) of one batch.

        Raises:
            UsageError: ``feeds`` are not what :attr:`inputs` says, or an output is unknown.
            EngineError: the engine failed.
        """
        ...


def check_feeds(feeds: Mapping[str, NDArray[Any]], inputs: Sequence[TensorSpec]) -> None:
    """Names, dtypes, shapes, named axes that must agree, the range of integers, finite floats, and masks that pad.

    Raises:
        UsageError: saying which input, what it is and what it should be.
    """
    if not isinstance(feeds, Mapping):
        raise UsageError("inputs of the graph", received=type(feeds).__name__, expected="a dict of arrays by name")
    names = [spec.name for spec in inputs]
    if set(feeds) != set(names):
        received = ", ".join(sorted(map(str, feeds))) or "none"
        raise UsageError("inputs of the graph", received=received, expected=", ".join(names))
    axes: dict[str, tuple[int, str]] = {}  # name of an axis → (its size, the input that set it)
    for spec in inputs:
        array = feeds[spec.name]
        if not isinstance(array, np.ndarray):
            raise UsageError(f"input {spec.name}", received=type(array).__name__, expected="a numpy array")
        if array.dtype != np.dtype(spec.dtype) or array.ndim != len(spec.shape) or array.size == 0:
            raise UsageError(f"input {spec.name}", received=f"{array.dtype} {array.shape}", expected=spec.form)
        for size, axis in zip(array.shape, spec.shape, strict=True):
            known, by = axes.setdefault(axis, (size, spec.name)) if isinstance(axis, str) else (axis, "")
            if size != known:
                also = f", with {axis} = {known} as in {by}" if by else ""
                raise UsageError(f"input {spec.name}", received=f"shape {array.shape}", expected=spec.form + also)
        if spec.range is not None and array.dtype.kind in "iu":  # some engines read garbage for an id beyond its table
            low, high = spec.range
            least, greatest = int(array.min()), int(array.max())
            if least < low or greatest > high:
                raise UsageError(
                    f"input {spec.name}",
                    received=f"values from {least} to {greatest}",
                    expected=f"{low:.0f} to {high:.0f}",
                )
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise UsageError(f"input {spec.name}", received="NaN or infinity", expected="finite values")
    for name, mask in _masks(feeds, {spec.name: spec.shape for spec in inputs}).items():
        _check_mask(f"the mask along {name}", mask)


def _check_mask(name: str, mask: NDArray[Any]) -> None:
    """(B, T): real tokens first, at least one in each row. Graphs take that for granted and answer all the same."""
    left = (mask[:, 1:] > mask[:, :-1]).any(axis=1)
    for wrong, received in ((mask[:, 0] != 1, "starts with padding"), (left, "goes on after padding")):
        if wrong.any():
            row = int(wrong.argmax())
            expected = "1 for what is real, at least one, then 0 for the padding"
            raise UsageError(name, received=f"row {row} {received}", expected=expected)


def alone(
    feeds: Mapping[str, NDArray[Any]], shapes: Mapping[str, Sequence[int | str]]
) -> Iterator[dict[str, NDArray[Any]]]:
    """Each sample of a batch by itself, without the padding that the batch gave it.

    For graphs that read ranges off whole tensors (int8-dynamic): there, a sample's result would depend on the others.

    Args:
        feeds: arrays by name; a ``…_mask`` (B, T) says with 1 which elements along T are real, all others come last.
        shapes: sizes and names of axes by input name.
    """
    masks = _masks(feeds, shapes)
    for row in range(len(next(iter(feeds.values())))):
        real = {axis: int(mask[row].sum()) for axis, mask in masks.items()}
        one = {}
        for name, array in feeds.items():
            cut = tuple(slice(real.get(axis) if isinstance(axis, str) else None) for axis in shapes[name][1:])
            one[name] = array[(slice(row, row + 1), *cut)]
        yield one


def take(
    feeds: Mapping[str, NDArray[Any]], shapes: Mapping[str, Sequence[int | str]], rows: Sequence[int]
) -> dict[str, NDArray[Any]]:
    """Some samples of a batch, without the padding that none of them needs; see :func:`alone`."""
    longest = {axis: max(1, int(mask[rows].sum(axis=1).max())) for axis, mask in _masks(feeds, shapes).items()}
    return {
        name: array[(rows, *(slice(longest.get(axis) if isinstance(axis, str) else None) for axis in shapes[name][1:]))]
        for name, array in feeds.items()
    }


def _masks(feeds: Mapping[str, NDArray[Any]], shapes: Mapping[str, Sequence[int | str]]) -> dict[str, NDArray[Any]]:
    """Name of an axis → the mask (B, T) of it."""
    return {str(shapes[name][1]): mask for name, mask in feeds.items() if name.endswith("_mask") and mask.ndim == 2}


def check_outputs(names: Sequence[str] | None, outputs: Sequence[TensorSpec]) -> list[str]:
    """The names to compute, all by default.

    Raises:
        UsageError: the graph has no output of that name.
    """
    known = [spec.name for spec in outputs]
    if names is None:
        return known
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise UsageError("outputs", received=shown(names), expected=f"a list of some of {', '.join(known)}")
    for name in names:
        if name not in known:
            raise UsageError("output", received=repr(name), expected=f"one of {', '.join(known)}")
    return list(names)


def check_interface(
    kind: str,
    loaded: Mapping[str, tuple[str, tuple[int | None, ...]]],
    specs: Sequence[TensorSpec],
    where: str,
) -> None:
    """The loaded file has the tensors that the manifest promises.

    Args:
        kind: ``"inputs"`` or ``"outputs"``.
        loaded: name → (dtype, sizes), as the engine reports them; None where a size varies or is unknown.
        specs: the manifest's.
        where: the file.

    Raises:
        EngineError: another set of names, another dtype, another number of axes or another fixed size.
    """
    promised = {spec.name: (spec.dtype, spec.shape) for spec in specs}
    for name in sorted({*loaded, *promised}):
        if name not in loaded or name not in promised or not _fits(loaded[name], promised[name]):
            raise EngineError(
                f"{where}: {kind} differ from the manifest's at {name}",
                received=loaded.get(name, "no such name"),
                expected=promised.get(name, "no such name"),
                todo="export the model again",
            )


def _fits(loaded: tuple[str, tuple[int | None, ...]], promised: tuple[str, tuple[int | str, ...]]) -> bool:
    (dtype, sizes), (wanted, axes) = loaded, promised
    alike = dtype == wanted and len(sizes) == len(axes)
    return alike and all(size in (None, axis) for size, axis in zip(sizes, axes, strict=True))
