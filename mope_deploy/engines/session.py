"""What every inference engine looks like from outside, and the check of what is fed to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mope_deploy.errors import EngineError, UsageError
from mope_deploy.manifest import TensorSpec

__all__ = ["TF32_TOLERANCE", "Arrays", "Session", "check_feeds", "check_interface", "check_outputs"]

TF32_TOLERANCE = 5e-3  # of float32 products rounded to ten bits of mantissa, which the manifest's tolerance is not for

Arrays = dict[str, NDArray[Any]]


class Session(Protocol):
    """One graph, loaded and ready.

    Attributes:
        name: of the engine: ``"onnxruntime"``, ``"tensorrt"``, ``"tensorrt_rtx"``.
        device: what executes it, in the engine's own words.
        why: why this engine was chosen, where the choice was left to us; else empty.
        least_tolerance: of golden samples, where arithmetic is coarser on purpose (TF32); else 0.
        inputs, outputs: as the manifest has them; checked against the loaded file.
    """

    name: str
    device: str
    why: str
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
    """Names, dtypes, shapes, named axes that must agree, and the range of integers.

    Raises:
        UsageError: saying which input, what it is and what it should be.
    """
    names = [spec.name for spec in inputs]
    if set(feeds) != set(names):
        raise UsageError("inputs of the graph", received=", ".join(sorted(feeds)) or "none", expected=", ".join(names))
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


def check_outputs(names: Sequence[str] | None, outputs: Sequence[TensorSpec]) -> list[str]:
    """The names to compute, all by default.

    Raises:
        UsageError: the graph has no output of that name.
    """
    known = [spec.name for spec in outputs]
    if names is None:
        return known
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
    if dtype != wanted or len(sizes) != len(axes):
        return False
    return all(size is None or size == axis for size, axis in zip(sizes, axes, strict=True))
