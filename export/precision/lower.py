"""What every lowering is (:class:`Lowering`), and the one for each precision (:func:`lowering`)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from export.limits import METHODS
from mope_deploy.errors import UsageError
from mope_deploy.manifest import PRECISIONS

__all__ = ["Lowering", "lowering"]


class Lowering(Protocol):
    """One graph at one lower precision, with any choice of layers left in fp32.

    Attributes:
        precision: one of :data:`mope_deploy.manifest.PRECISIONS`.
        layers: what can be kept in fp32, in graph order: ``main.encoder.blocks.3``.
        runtime_mark: what to add to the runtime's name where a gate's figures are shown: ``emulated`` if
            :meth:`write_runnable` does not write the file itself, empty if it does.
        unfit: products that stay fp32 whatever is asked for: the precision cannot hold their weights.
        runs_on: ``any``; ``onnxruntime`` or ``tensorrt`` where only one of them runs the file.
    """

    precision: str
    layers: tuple[str, ...]
    runtime_mark: str
    unfit: tuple[str, ...]
    runs_on: str

    def products(self, layer: str) -> tuple[str, ...]:
        """What can be kept of one layer: ``main.encoder.blocks.3.attn.qkv``, …, in graph order."""
        ...

    def own_errors(
        self, feeds: Iterable[Mapping[str, NDArray[Any]]], *, on_step: Callable[[str], None]
    ) -> dict[str, float]:
        """By product, how far its own output is off on real samples; see :mod:`export.precision.ranking`."""
        ...

    def write(self, path: Path, *, keep: Collection[str] = ()) -> list[Path]:
        """Write the file, checked, and return it with its ``.data`` file if it has one.

        Args:
            path: ``….onnx`` in a folder that nobody reads yet.
            keep: layers and products to leave in fp32.

        Raises:
            ExportError: ``keep`` names something unknown or leaves nothing to lower, or the file is not what was
                asked for.
        """
        ...

    def write_runnable(self, path: Path, *, keep: Collection[str] = ()) -> list[Path]:
        """Write what ONNX Runtime's CPU provider runs to judge :meth:`write` by; arguments and errors are the same."""
        ...


def lowering(
    graph: Path,
    precision: str,
    *,
    calibration: Iterable[Mapping[str, NDArray[Any]]] | None = None,
    method: str = "percentile",
    on_step: Callable[[str], None] = lambda _: None,
) -> Lowering:
    """Prepare a graph for one precision; calibration, where there is any, happens here and once.

    Args:
        graph: the canonical graph, as :func:`export.graph.files.save` wrote it.
        precision: one of :data:`mope_deploy.manifest.PRECISIONS` other than ``fp32``.
        calibration: arrays by input name, batch by batch, of real samples; needed for ``int8`` and read only there.
        method: how ``int8`` chooses the range of an activation, one of :data:`export.limits.METHODS`.
        on_step: called with a few words as calibration advances.

    Raises:
        UsageError: no such precision or method, or ``int8`` without calibration.
        ExportError: the graph is not one that can be lowered.
    """
    if precision in ("fp16", "bf16"):
        from export.precision.half import HalfLowering

        return HalfLowering(graph, precision)
    if precision == "int8-dynamic":
        from export.precision.dynamic import DynamicLowering

        return DynamicLowering(graph)
    if precision != "int8":
        raise UsageError("the precision to lower to", received=precision, expected=", ".join(PRECISIONS[1:]))
    if method not in METHODS:
        raise UsageError("the calibration method", received=method, expected=" or ".join(METHODS))
    if calibration is None:
        raise UsageError("int8 needs samples to calibrate on", todo="pass calibration=")
    from export.precision.int8 import Int8Lowering

    return Int8Lowering(graph, calibration, method=method, on_step=on_step)
