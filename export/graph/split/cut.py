"""A graph taken apart: what crosses from each part to the main file, and the models of the files.

What crosses is chosen small: where values are moved copies of one (expanded, sliced, joined with constants), that one
crosses and the main file moves it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir import DataType
from onnx_ir.passes.common import RemoveUnusedNodesPass

from export.graph.naming import renumber
from export.graph.probe import open_probe
from export.graph.split.rows import Crossing, added, declare, packed, unpack, width
from export.graph.split.sides import Sides, is_batch_size, values_of
from mope_deploy.errors import ExportError
from mope_deploy.manifest import conditions_name, y_name

__all__ = ["Cut", "Feeds"]

Feeds = Mapping[str, NDArray[Any]]

_TYPES = {"float32": DataType.FLOAT, "float16": DataType.FLOAT16}


class Cut:
    """The whole graph of a file, taken apart; ``inputs`` are by complementary modality the names of its own."""

    def __init__(self, source: Path, inputs: Mapping[str, Sequence[str]]) -> None:
        self.source, self.inputs = source, inputs
        self.model = ir.load(source)
        self.model.graph.sort()  # what ONNX Runtime's optimiser writes is in no order
        self.owners = {name: modality for modality, names in inputs.items() for name in names}
        self.sides = Sides(self.model.graph, self.owners)

    def crossing(self, modality: str, probes: Sequence[Feeds]) -> list[Crossing]:
        """What a part hands to the main file.

        Raises:
            ExportError: nothing, or something that is no row of floats for each sample.
        """
        frontier = self.sides.frontier(modality)
        if not frontier:
            raise ExportError(f"nothing in the main file depends on {modality}", todo="export without --split")
        sources = list(dict.fromkeys(source for value in frontier for source in self.sides.moved_from(value, modality)))
        known = self._measure(modality, [*frontier, *sources], probes)
        for value in frontier:
            if value not in known:
                raise ExportError(
                    f"{value.name!r} cannot cross from the part of {modality} to the main file",
                    received="an axis that varies beside the batch, or no floats",
                    expected="a row of floats for each sample",
                    todo="export without --split",
                )
        chosen = self._smallest(frontier, [value for value in sources if value in known], known)
        return [known[value] for value in chosen]

    def pooled(self, modality: str, probes: Sequence[Feeds]) -> Crossing:
        """The modality's y.

        Raises:
            ExportError: the graph does not show it, or it needs other modalities.
        """
        shown = [value for value in values_of(self.model.graph) if value.name == y_name(modality)]
        own = [value for value in shown if self.sides.of(value) == modality]
        for y in self._measure(modality, own, probes).values() if own else ():
            if len(y.shape) == 1:
                return y
        missing = f"{self.source.name} does not show the pooled feature of {modality}"
        raise ExportError(missing, todo="export without --split")

    def part(self, modality: str, y: Crossing, values: Sequence[Crossing]) -> ir.Model:
        """The file that computes ``y`` and ``values`` from the modality's inputs."""
        model, known = self._copy()
        conditions = packed(model.graph, [(known[value.name], value) for value in values], conditions_name(modality))
        pooled = known[y.name]
        if y.dtype != DataType.FLOAT:
            pooled.name = f"{y.name}_{y.dtype.name.lower()}"
            pooled = added(model.graph, "Cast", [pooled], y.name, to=DataType.FLOAT)
        declare(pooled, y.size)
        _keep(model, [pooled, conditions], self.inputs[modality])
        return model

    def main(self, crossing: Mapping[str, Sequence[Crossing]]) -> ir.Model:
        """The file that reads the main modality and what the parts hand over."""
        model, known = self._copy()
        own = [value.name or "" for value in model.graph.inputs if value.name not in self.owners]
        for modality, values in crossing.items():
            conditions = ir.Value(name=conditions_name(modality))
            declare(conditions, width(values))
            model.graph.inputs.append(conditions)
            own.append(conditions_name(modality))
            unpack(model.graph, conditions, [(known[value.name], value) for value in values])
        _keep(model, list(model.graph.outputs), own)
        return model

    def _copy(self) -> tuple[ir.Model, dict[str | None, ir.Value]]:
        """The whole graph again, with its values by name."""
        model = self.model.clone()
        return model, {value.name: value for value in values_of(model.graph)}

    def _smallest(
        self, frontier: Sequence[ir.Value], sources: Sequence[ir.Value], known: Mapping[ir.Value, Crossing]
    ) -> list[ir.Value]:
        """The frontier with moved copies replaced by what they were made of, where that is less."""
        order = {value: i for i, value in enumerate(values_of(self.model.graph))}

        def cost(values: Sequence[ir.Value]) -> tuple[int, int]:
            return width([known[value] for value in values]), len(values)

        chosen = list(frontier)
        while True:
            others = [
                [source, *(value for value in chosen if not self.sides.can_be_moved(value, source))]
                for source in sources
                if source not in chosen
            ]
            best = min(others, key=cost, default=chosen)
            if cost(best) >= cost(chosen):
                return sorted(chosen, key=order.__getitem__)
            chosen = best

    def _measure(self, modality: str, values: Sequence[ir.Value], probes: Sequence[Feeds]) -> dict[ir.Value, Crossing]:
        """Those of ``values`` that are a row of floats for each sample, by running what computes them."""
        made = [value for value in values if value.producer() is not None]
        model, known = self._copy()
        _keep(model, [known[value.name] for value in made], self.inputs[modality])
        runs = []
        file = self.source.with_name(f"{self.source.stem}.probe.onnx")  # beside the source, whose weights it reads
        try:
            ir.save(model, file)
            session = open_probe(file)
            for feeds in probes:
                given = {name: feeds[name] for name in self.inputs[modality]}
                runs.append((len(next(iter(given.values()))), session.run([value.name for value in made], given)))
        finally:
            file.unlink(missing_ok=True)
        found = {}
        for i, value in enumerate(made):
            shape, dtype = runs[0][1][i].shape[1:], runs[0][1][i].dtype.name
            if dtype in _TYPES and all(arrays[i].shape == (batch, *shape) for batch, arrays in runs):
                found[value] = Crossing(value.name or "", shape, _TYPES[dtype])
        return found


def _keep(model: ir.Model, outputs: Sequence[ir.Value], inputs: Sequence[str]) -> None:
    """Keep what computes ``outputs`` from ``inputs`` alone; the size of the batch is that of the first of them."""
    graph = model.graph
    own = [value for value in graph.inputs if value.name in inputs]
    for node in graph:
        if is_batch_size(node):
            node.replace_input_with(0, own[0])
    graph.outputs.clear()
    graph.outputs.extend(outputs)
    RemoveUnusedNodesPass()(model)
    graph.inputs.clear()
    graph.inputs.extend(own)
    renumber(model)
