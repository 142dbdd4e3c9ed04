"""A finished graph in several files: a part for each complementary modality, and the main file that takes them.

A part computes its modality's y and all that depends on that modality alone: mapped tokens, the routers' share of y,
prompts that y alone chooses. What the main file needs of that leaves as one row for each sample. So a device that is
asked one question about many pictures runs the question's part once.

The cut is made in the graph as it was judged, of any precision: every node stays what it is. Where it goes follows from
what depends on what:

- The size of the batch is anybody's: each file reads it from its own inputs.
- What depends on several modalities, or on the main one, is the main file's. So is what reads a weight that the main
  file reads too: no weight is stored twice.
- What crosses is chosen small: where values are moved copies of one (expanded, sliced, joined with constants), that
  one crosses and the main file moves it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from export.graph.files import add_weight
from export.graph.naming import renumber
from export.graph.probe import open_probe
from export.graph.to_onnx import save
from export.precision.check import MOVING_OPS
from mope_deploy.errors import ExportError
from mope_deploy.manifest import conditions_name, y_name
from mope_deploy.model import MoPE
from mope_deploy.preprocess import present_name

__all__ = ["SHARED_BYTES", "PartFile", "SplitGraph", "part_inputs", "split"]

Feeds = Mapping[str, NDArray[Any]]

SHARED_BYTES = 16 * 2**10  # a constant up to this size may stand in two files: a norm's weight, an epsilon
_MOVING = MOVING_OPS | {"Cast"}
_TYPES = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16}
_MAIN, _ANYBODY = "", "*"  # sides that are no modality


@dataclass(frozen=True)
class PartFile:
    """The file of one complementary modality.

    Attributes:
        modality: what it encodes.
        files: the ONNX file and, where they are apart, its weights.
        inputs: names of what it reads.
        y_width: D_y.
        width: F, how many values it hands to the main file for each sample.
    """

    modality: str
    files: tuple[Path, ...]
    inputs: tuple[str, ...]
    y_width: int
    width: int


@dataclass(frozen=True)
class SplitGraph:
    """A graph in several files.

    Attributes:
        main: the main ONNX file and, where they are apart, its weights.
        parts: in the order of the modalities.
    """

    main: tuple[Path, ...]
    parts: tuple[PartFile, ...]

    @property
    def part_files(self) -> tuple[Path, ...]:
        """The ONNX file of each part."""
        return tuple(part.files[0] for part in self.parts)


@dataclass(frozen=True)
class _Value:
    """A tensor with the batch as its first axis: its name, its other axes, its element type."""

    name: str
    shape: tuple[int, ...]
    dtype: ir.DataType

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def split(
    source: Path,
    folder: Path,
    inputs: Mapping[str, Sequence[str]],
    probes: Sequence[Feeds],
    *,
    external: bool = False,
    extra_ops: Collection[str] = (),
    weights_of: tuple[Path, SplitGraph] | None = None,
) -> SplitGraph:
    """Cut a graph.

    Args:
        source: the whole graph; the pooled features in it are called ``y_<modality>`` (:func:`export.graph.to_onnx.trace`).
        folder: where the files go, ``model.onnx`` and ``model.<modality>.onnx`` where the source is ``model.onnx``; not
            the source's own.
        inputs: by complementary modality the names of its inputs; all others are the main one's.
        probes: at least two batches of all inputs, of different sizes in every axis that varies: what crosses must have
            the batch as its first axis and no other one that varies.
        external: put the weights beside each file, whatever their size.
        extra_ops: operators that a file for ONNX Runtime alone may hold as well.
        weights_of: a graph whose external weights the source reads, and what it was cut into, in the same folder: the
            files read the weights of that. They are for ONNX Runtime alone and not linted.

    Raises:
        ExportError: the graph cannot be cut so that float32 rows, one for each sample, are all that crosses.
    """
    cut = _Cut(source, inputs)
    crossing = {modality: cut.crossing(modality, probes) for modality in inputs}
    places = _places(*weights_of) if weights_of is not None else None

    def write(model: ir.Model, name: str) -> tuple[Path, ...]:
        if places is not None:
            return _write_sharing(model, folder / name, places)
        if not external:
            ir.external_data.load_to_model(model)  # no file may lean on the weights of the whole one
        return tuple(save(model, folder / name, external=external, extra_ops=extra_ops))

    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for modality, values in crossing.items():
        y = cut.pooled(modality, probes)
        files = write(cut.part(modality, y, values), f"{source.stem}.{modality}.onnx")
        parts.append(PartFile(modality, files, tuple(inputs[modality]), y.size, sum(value.size for value in values)))
    return SplitGraph(write(cut.main(crossing), source.name), tuple(parts))


def part_inputs(model: MoPE) -> dict[str, tuple[str, ...]]:
    """By complementary modality the names of the inputs that its part reads."""
    return {
        name: (*encoder.backbone.input_names, *((present_name(name),) if name in model.stand_ins else ()))
        for name, encoder in model.complementary_encoders().items()
    }


class _Cut:
    """A graph, and whose each of its nodes is.

    Args:
        source: the whole graph.
        inputs: by complementary modality the names of its inputs.
    """

    def __init__(self, source: Path, inputs: Mapping[str, Sequence[str]]) -> None:
        self.source, self.inputs = source, inputs
        self.model = ir.load(source)
        self.model.graph.sort()  # what ONNX Runtime's optimiser writes is in no order
        self.values = {value.name: value for value in _values(self.model.graph)}
        self.owners = {name: modality for modality, names in inputs.items() for name in names}
        self.sides = _sides(self.model.graph, self.owners)
        self.weights = _weights(self.model.graph, self.sides)
        self._keep_weights_together()

    def crossing(self, modality: str, probes: Sequence[Feeds]) -> list[_Value]:
        """What a part hands to the main file.

        Raises:
            ExportError: nothing, or something that is no row of floats for each sample.
        """
        frontier = [value for value in _values(self.model.graph) if self._leaves(value, modality)]
        if not frontier:
            raise ExportError(f"nothing in the main file depends on {modality}", todo="export without --split")
        sources = list(dict.fromkeys(source for value in frontier for source in self._moved_from(value, modality)))
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

    def pooled(self, modality: str, probes: Sequence[Feeds]) -> _Value:
        """The modality's y.

        Raises:
            ExportError: the graph does not show it, or it needs other modalities.
        """
        y = self.values.get(y_name(modality))
        found = self._measure(modality, [y], probes).get(y) if y is not None and self._side(y) == modality else None
        if found is None or len(found.shape) != 1:
            raise ExportError(
                f"{self.source.name} does not show the pooled feature of {modality}", todo="export without --split"
            )
        return found

    def part(self, modality: str, y: _Value, values: Sequence[_Value]) -> ir.Model:
        """The file that computes ``y`` and ``values`` from the modality's inputs."""
        model = self.model.clone()
        known = {value.name: value for value in _values(model.graph)}
        pooled, rows = known[y.name], [_row(known[value.name], value) for value in values]
        if y.dtype != ir.DataType.FLOAT:
            pooled.name = f"{y.name}_{y.dtype.name.lower()}"
            pooled = _added(model.graph, "Cast", [pooled], y.name, to=ir.DataType.FLOAT)
        conditions = _added(model.graph, "Concat", rows, conditions_name(modality), axis=1)
        sizes = {pooled: y.size, conditions: sum(value.size for value in values)}
        for value, size in sizes.items():
            _declare(value, size)
        _keep(model, list(sizes), self.inputs[modality])
        return model

    def main(self, crossing: Mapping[str, Sequence[_Value]]) -> ir.Model:
        """The file that reads the main modality and what the parts hand over."""
        model = self.model.clone()
        known = {value.name: value for value in _values(model.graph)}
        own = [value.name or "" for value in model.graph.inputs if value.name not in self.owners]
        for modality, values in crossing.items():
            conditions = ir.Value(name=conditions_name(modality))
            _declare(conditions, sum(value.size for value in values))
            model.graph.inputs.append(conditions)
            own.append(conditions_name(modality))
            _unpack(model.graph, conditions, [(known[value.name], value) for value in values])
        _keep(model, list(model.graph.outputs), own)
        return model

    def _side(self, value: ir.Value) -> str:
        """Whose a value is: a modality, the main file's, or anybody's."""
        node = value.producer()
        return self.sides[node] if node is not None else self._input_side(value)

    def _input_side(self, value: ir.Value) -> str:
        return self.owners.get(value.name or "", _MAIN) if value.is_graph_input() else _ANYBODY

    def _leaves(self, value: ir.Value, modality: str) -> bool:
        if self._side(value) != modality:
            return False
        return value.is_graph_output() or any(self.sides[node] == _MAIN for node in value.consumers())

    def _keep_weights_together(self) -> None:
        """Give the main file every node that reads a weight which another file would have to hold as well."""
        while True:
            readers: dict[str, set[str]] = {}
            for node, names in self.weights.items():
                for name in names:
                    readers.setdefault(name, set()).add(self.sides[node])
            shared = {name for name, sides in readers.items() if len(sides) > 1}
            moved = [node for node, names in self.weights.items() if names & shared and self.sides[node] != _MAIN]
            if not moved:
                return
            while moved:
                node = moved.pop()
                self.sides[node] = _MAIN
                moved += [user for user in node.successors() if self.sides[user] not in (_MAIN, _ANYBODY)]

    def _moved_from(self, value: ir.Value, modality: str) -> Iterator[ir.Value]:
        """What a value was made of by moving alone."""
        node = value.producer()
        if node is None or node.op_type not in _MOVING or self.sides[node] != modality:
            return
        for source in node.inputs:
            if source is not None and self._side(source) == modality:
                yield source
                yield from self._moved_from(source, modality)

    def _can_be_moved(self, value: ir.Value, given: ir.Value) -> bool:
        """Whether moving alone makes ``value`` of ``given`` and of small constants."""
        if value is given:
            return True
        node = value.producer()
        if self._side(value) == _ANYBODY:
            return True
        if node is None or node.op_type not in _MOVING or node in self.weights:
            return False
        return all(self._can_be_moved(source, given) for source in node.inputs if source is not None)

    def _smallest(
        self, frontier: Sequence[ir.Value], sources: Sequence[ir.Value], known: Mapping[ir.Value, _Value]
    ) -> list[ir.Value]:
        """The frontier with moved copies replaced by what they were made of, where that is less."""
        order = {value: i for i, value in enumerate(_values(self.model.graph))}

        def cost(values: Sequence[ir.Value]) -> tuple[int, int]:
            return sum(known[value].size for value in values), len(values)

        chosen = list(frontier)
        while True:
            others = [
                [source, *(value for value in chosen if not self._can_be_moved(value, source))]
                for source in sources
                if source not in chosen
            ]
            best = min(others, key=cost, default=chosen)
            if cost(best) >= cost(chosen):
                return sorted(chosen, key=order.__getitem__)
            chosen = best

    def _measure(self, modality: str, values: Sequence[ir.Value], probes: Sequence[Feeds]) -> dict[ir.Value, _Value]:
        """Those of ``values`` that are a row of floats for each sample, by running what computes them."""
        made = [value for value in values if value.producer() is not None]
        model = self.model.clone()
        known = {value.name: value for value in _values(model.graph)}
        _keep(model, [known[value.name] for value in made], self.inputs[modality])
        file = self.source.with_name(f"{self.source.stem}.probe.onnx")  # beside the source, whose weights it reads
        ir.save(model, file)
        session = open_probe(file)
        names = [value.name or "" for value in made]
        runs = []
        for feeds in probes:
            given = {name: feeds[name] for name in self.inputs[modality]}
            runs.append((len(next(iter(given.values()))), session.run(names, given)))
        file.unlink()
        found = {}
        for i, value in enumerate(made):
            arrays = [(batch, arrays[i]) for batch, arrays in runs]
            shape, dtype = arrays[0][1].shape[1:], arrays[0][1].dtype.name
            if dtype in _TYPES and all(array.shape == (batch, *shape) for batch, array in arrays):
                found[value] = _Value(names[i], shape, _TYPES[dtype])
        return found


def _sides(graph: ir.Graph, owners: Mapping[str, str]) -> dict[ir.Node, str]:
    """Whose each node is: the only modality's that it depends on, anybody's without one, else the main file's."""
    needs: dict[ir.Value, frozenset[str]] = {
        value: frozenset((owners.get(value.name or "", _MAIN),)) for value in graph.inputs
    }
    sides = {}
    for node in graph:
        found: frozenset[str] = frozenset()
        if not _is_batch_size(node):
            found = found.union(*(needs.get(value, frozenset()) for value in node.inputs if value is not None))
        needs |= dict.fromkeys(node.outputs, found)
        sides[node] = _ANYBODY if not found else next(iter(found)) if len(found) == 1 else _MAIN
    return sides


def _is_batch_size(node: ir.Node) -> bool:
    """Whether a node reads the first axis of one of the graph's inputs: they all have the batch there."""
    value = node.inputs[0] if node.op_type == "Shape" else None
    if value is None or not value.is_graph_input():
        return False
    ends = [node.attributes[name].as_int() if name in node.attributes else None for name in ("start", "end")]
    return ends in ([0, 1], [None, 1])


def _weights(graph: ir.Graph, sides: Mapping[ir.Node, str]) -> dict[ir.Node, frozenset[str]]:
    """The large constants that each node reads, itself or through what is anybody's (a weight is dequantised first)."""
    behind: dict[ir.Value, frozenset[str]] = {
        value: frozenset((name,)) for name, value in graph.initializers.items() if _heavy(value)
    }
    found = {}
    for node in graph:
        read: frozenset[str] = frozenset().union(*(behind.get(v, frozenset()) for v in node.inputs if v is not None))
        if sides[node] == _ANYBODY:
            behind |= dict.fromkeys(node.outputs, read)
        found[node] = read
    return {node: read for node, read in found.items() if read and sides[node] != _ANYBODY}


def _heavy(value: ir.Value) -> bool:
    return value.const_value is not None and value.const_value.nbytes > SHARED_BYTES


def _values(graph: ir.Graph) -> list[ir.Value]:
    """Everything that depends on inputs or is one, in the order of the graph."""
    return [*graph.inputs, *(value for node in graph for value in node.outputs)]


def _declare(value: ir.Value, size: int) -> None:
    """A row of ``size`` floats for each sample."""
    value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", size])


def _row(value: ir.Value, known: _Value) -> ir.Value:
    """``value`` as one row of float32 for each sample."""
    graph = value.graph
    assert isinstance(graph, ir.Graph)
    if known.dtype != ir.DataType.FLOAT:  # exact
        value = _added(graph, "Cast", [value], f"{known.name}_float32", to=ir.DataType.FLOAT)
    return value if len(known.shape) == 1 else _added(graph, "Flatten", [value], f"{known.name}_row", axis=1)


def _unpack(graph: ir.Graph, conditions: ir.Value, wanted: Sequence[tuple[ir.Value, _Value]]) -> None:
    """Put the pieces of a row in the place of the values that it was packed from."""
    first, name = graph.node(0), conditions.name or ""
    rows = [conditions]
    if len(wanted) > 1:
        sizes = add_weight(graph, f"{name}_sizes", _int64([known.size for _, known in wanted]))
        made = [f"{known.name}_row" for _, known in wanted]
        node = ir.node("Split", [conditions, sizes], {"axis": 1}, num_outputs=len(wanted), name=f"split/{name}/Split")
        for value, its_name in zip(node.outputs, made, strict=True):
            value.name = its_name
        graph.insert_before(first, node)
        rows = list(node.outputs)
    for row, (old, known) in zip(rows, wanted, strict=True):
        new = row
        if len(known.shape) > 1:
            shape = add_weight(graph, f"{known.name}_shape", _int64([-1, *known.shape]))
            new = _added(graph, "Reshape", [new, shape], f"{known.name}_given", before=first)
        if known.dtype != ir.DataType.FLOAT:
            new = _added(graph, "Cast", [new], f"{known.name}_half", before=first, to=known.dtype)
        if old.is_graph_output():  # a routing that y alone decides
            new = _added(graph, "Identity", [new], f"{known.name}_", before=first)
            old.name, new.name = f"{known.name}_computed", known.name
            new.type, new.shape = old.type, old.shape
            graph.outputs[graph.outputs.index(old)] = new
        ir.convenience.replace_all_uses_with(old, new)


def _added(
    graph: ir.Graph,
    op: str,
    inputs: Sequence[ir.Value],
    name: str,
    *,
    before: ir.Node | None = None,
    **attributes: int,
) -> ir.Value:
    """The output, called ``name``, of a new node at the end of the graph or before another one."""
    node = ir.node(op, inputs, attributes, name=f"split/{name}/{op}")
    node.outputs[0].name = name
    if before is None:
        graph.append(node)
    else:
        graph.insert_before(before, node)
    return node.outputs[0]


def _int64(numbers: Sequence[int]) -> NDArray[np.int64]:
    return np.array(numbers, np.int64)


def _keep(model: ir.Model, outputs: Sequence[ir.Value], inputs: Sequence[str]) -> None:
    """Keep what computes ``outputs`` from ``inputs`` alone; the size of the batch is that of the first of them."""
    graph = model.graph
    own = [value for value in graph.inputs if value.name in inputs]
    for node in graph:
        if _is_batch_size(node):
            node.replace_input_with(0, own[0])
    graph.outputs.clear()
    graph.outputs.extend(outputs)
    RemoveUnusedNodesPass()(model)
    graph.inputs.clear()
    graph.inputs.extend(own)
    renumber(model)


def _places(whole: Path, cut: SplitGraph) -> dict[tuple[str, int], tuple[str, int]]:
    """Where a weight lies in the external data of a whole graph → where it lies in that of its pieces."""
    places, found = _external(whole), {}
    for file in (cut.main[0], *cut.part_files):
        for name, place in _external(file).items():
            found[places[name]] = place
    return found


def _external(file: Path) -> dict[str, tuple[str, int]]:
    """File and offset of each weight that lies outside a graph's own file."""
    tensors = {name: value.const_value for name, value in ir.load(file).graph.initializers.items()}
    return {name: _place(tensor) for name, tensor in tensors.items() if isinstance(tensor, ir.ExternalTensor)}


def _place(tensor: ir.ExternalTensor) -> tuple[str, int]:
    return str(tensor.location), tensor.offset or 0


def _write_sharing(model: ir.Model, path: Path, places: Mapping[tuple[str, int], tuple[str, int]]) -> tuple[Path, ...]:
    """Write a graph that reads its weights where ``places`` say they lie now."""
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
