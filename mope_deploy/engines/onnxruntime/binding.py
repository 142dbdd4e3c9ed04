"""ONNX Runtime's inputs and outputs kept in GPU memory: allocated once for each shape that comes again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mope_deploy.engines.session import Arrays
from mope_deploy.manifest import TensorSpec

__all__ = ["Bindings"]

KEPT = 4  # shapes; a camera has one, a batched file two, and every text length more costs GPU memory


class Bindings:
    """Buffers of one session. Not for two threads at once.

    A shape that is met for the first time gets none: of a stream of ever new lengths nothing would be used again.

    Args:
        ort, session: the library and its InferenceSession.
        inputs, outputs: of the graph; an output's axes are those of the inputs.
        device: where the buffers are, in ONNX Runtime's words.
    """

    def __init__(
        self,
        ort: ModuleType,
        session: Any,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        *,
        device: str = "cuda",
    ) -> None:
        self._ort, self._session, self._device = ort, session, device
        self._inputs = inputs
        self._outputs = {spec.name: spec for spec in outputs}
        self._made: OrderedDict[tuple[Any, ...], Any] = OrderedDict()  # shapes and outputs → binding; None: met once

    def run(self, feeds: Mapping[str, NDArray[Any]], names: Sequence[str]) -> Arrays | None:
        """The outputs called ``names``; None if these shapes are new, and the caller has to run them itself."""
        key = (*((spec.name, feeds[spec.name].shape) for spec in self._inputs), *names)
        known = key in self._made
        bound = self._made.pop(key, None)
        if known and bound is None:
            bound = self._bind(feeds, names)
        self._made[key] = bound  # last in order: the one used most recently
        while len(self._made) > KEPT:
            self._made.popitem(last=False)
        if bound is None:
            return None
        binding, held = bound
        for name, value in held.items():
            value.update_inplace(_plain(feeds[name]))
        binding.synchronize_inputs()
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return dict(zip(names, binding.copy_outputs_to_cpu(), strict=True))

    def _bind(self, feeds: Mapping[str, NDArray[Any]], names: Sequence[str]) -> tuple[Any, dict[str, Any]]:
        value, binding = self._ort.OrtValue, self._session.io_binding()
        held = {
            spec.name: value.ortvalue_from_numpy(_plain(feeds[spec.name]), self._device, 0) for spec in self._inputs
        }
        for name, one in held.items():
            binding.bind_ortvalue_input(name, one)
        axes = {
            axis: size
            for spec in self._inputs
            for axis, size in zip(spec.shape, feeds[spec.name].shape, strict=True)
            if isinstance(axis, str)
        }
        for name in names:
            spec = self._outputs[name]
            shape = [axes[axis] if isinstance(axis, str) else axis for axis in spec.shape]
            room = value.ortvalue_from_shape_and_type(shape, np.dtype(spec.dtype).type, self._device, 0)
            binding.bind_ortvalue_output(name, room)
        return binding, held


def _plain(array: NDArray[Any]) -> NDArray[Any]:
    """As it is copied to a GPU: contiguous, in this machine's byte order."""
    return np.ascontiguousarray(array, array.dtype.newbyteorder("="))
