"""What a file's routers do inside: the scores of every expert, and which experts were selected.

No output shows it: under top-1 routing the weight of the one expert is 1 whatever its score, and a file may hide its
routing. So the scores are read off a copy of the file that puts them out, which is the file in all else.

Letters: B batch · K experts.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from export.graph.probe import open_probe
from export.limits import EMBED_LIMIT

__all__ = ["Inside", "router_softmaxes", "save_probe"]

_ROUTER = re.compile(r"layers\.(\d+)\.router/(Softmax|TopK)(_\d+)?")


def router_softmaxes(graph: onnx.GraphProto) -> dict[int, onnx.NodeProto]:
    """The softmax of each layer's router, by layer."""
    return _of_routers(graph, "Softmax")


def save_probe(model: onnx.ModelProto, path: Path) -> Path:
    """Write a graph for :func:`export.graph.probe.open_probe`, large weights beside it."""
    large = sum(len(tensor.raw_data) for tensor in model.graph.initializer) > EMBED_LIMIT
    onnx.save(model, path, save_as_external_data=large)
    return path


class Inside:
    """A saved graph, or one in parts, that tells what its routers do.

    Args:
        file: the graph, or the main file of one in parts.
        parts: of a graph in several files the others.

    Attributes:
        layers: whose routers were found.
    """

    def __init__(self, file: Path, parts: Sequence[Path] = ()) -> None:
        self._scores: dict[int, str] = {}
        self._chosen: dict[int, str] = {}
        with tempfile.TemporaryDirectory(prefix="mope-inside-") as folder:
            # What a part hands over is an input of the main file, under the same name.
            self._sessions = [self._open(path, Path(folder) / f"{i}.onnx") for i, path in enumerate((*parts, file))]
        self.layers = tuple(sorted(self._scores))

    def _open(self, path: Path, probe: Path) -> Any:
        model = onnx.load(path)
        self._scores |= (scores := {i: node.input[0] for i, node in _of_routers(model.graph, "Softmax").items()})
        self._chosen |= (chosen := {i: node.output[1] for i, node in _of_routers(model.graph, "TopK").items()})
        shown = {value.name for value in (*model.graph.output, *model.graph.input)}
        for name in {*scores.values(), *chosen.values()} - shown:
            model.graph.output.append(onnx.ValueInfoProto(name=name))
        return open_probe(save_probe(model, probe))

    def __call__(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """``scores`` (B, layers, K) before the softmax, and ``selected`` (B, layers, K), which experts take part."""
        known: dict[str, NDArray[Any]] = dict(feeds)
        for session in self._sessions:
            names = [value.name for value in session.get_outputs()]
            given = {value.name: known[value.name] for value in session.get_inputs()}
            known |= dict(zip(names, session.run(names, given), strict=True))
        scores = np.stack([known[self._scores[layer]] for layer in self.layers], axis=1)
        selected = np.ones(scores.shape, bool)
        for place, layer in enumerate(self.layers):
            if layer in self._chosen:
                selected[:, place] = False
                np.put_along_axis(selected[:, place], known[self._chosen[layer]], True, axis=-1)
        return {"scores": scores, "selected": selected}


def _of_routers(graph: onnx.GraphProto, op: str) -> dict[int, onnx.NodeProto]:
    named = ((node, _ROUTER.fullmatch(node.name)) for node in graph.node if node.op_type == op)
    return {int(found[1]): node for node, found in named if found is not None}
