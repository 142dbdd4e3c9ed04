"""Pieces of a graph that read the weights which the pieces of another one hold: a fused variant stores none twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from export.graph.files import external_weights

__all__ = ["places_in_pieces", "write_sharing"]

Place = tuple[str, int]  # the name of a file of weights and an offset in it


def places_in_pieces(whole: Path, pieces: Sequence[Path]) -> dict[Place, Place]:
    """Where a weight lies in the external data of a whole graph → where it lies in that of its pieces."""
    places = {name: _place(tensor) for name, tensor in external_weights(whole).items()}
    return {places[name]: _place(tensor) for file in pieces for name, tensor in external_weights(file).items()}


def write_sharing(model: ir.Model, path: Path, places: Mapping[Place, Place]) -> tuple[Path, ...]:
    """Write a graph that reads its weights where ``places`` say they lie now; the graph first, then those files."""
    used = {}
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            location, offset = places[_place(tensor)]
            value.const_value = ir.ExternalTensor(
                location,
                offset,
                tensor.length,
                tensor.dtype,
                shape=tensor.shape,
                name=tensor.name,
                base_dir=path.parent,
            )
            used[location] = path.with_name(location)
    ir.save(model, path)
    return (path, *used.values())


def _place(tensor: ir.ExternalTensor) -> Place:
    return str(tensor.location), tensor.offset or 0
