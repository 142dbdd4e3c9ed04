"""Whose each node of a graph is: a modality's, the main file's, or anybody's.

- The size of the batch is anybody's: each file reads it from its own inputs.
- What depends on several modalities, or on the main one, is the main file's. So is what reads a weight that the main
  file reads too: no weight is stored twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx_ir as ir

from export.graph.operators import MOVING_OPS

__all__ = ["ANYBODY", "MAIN", "SHARED_BYTES", "Sides", "is_batch_size", "values_of"]

SHARED_BYTES = 16 * 2**10  # a constant up to this size may stand in two files: a norm's weight, an epsilon
MAIN, ANYBODY = "", "*"  # sides that are no modality
_MOVING = MOVING_OPS | {"Cast"}


class Sides:
    """The sides of one graph, sorted; ``owners`` name the modality of each input that is no main one's."""

    def __init__(self, graph: ir.Graph, owners: Mapping[str, str]) -> None:
        self.graph, self.owners = graph, owners
        self._sides = self._by_dependence()
        self._weights = self._weights_read()
        self._keep_weights_together()

    def of(self, value: ir.Value) -> str:
        """Whose a value is."""
        node = value.producer()
        if node is not None:
            return self._sides[node]
        return self.owners.get(value.name or "", MAIN) if value.is_graph_input() else ANYBODY

    def frontier(self, modality: str) -> list[ir.Value]:
        """What the main file, or who runs it, reads of a modality's."""
        return [
            value
            for value in values_of(self.graph)
            if self.of(value) == modality
            and (value.is_graph_output() or any(self._sides[node] == MAIN for node in value.consumers()))
        ]

    def moved_from(self, value: ir.Value, modality: str) -> Iterator[ir.Value]:
        """What a value was made of by moving alone."""
        node = value.producer()
        if node is None or node.op_type not in _MOVING or self._sides[node] != modality:
            return
        for source in node.inputs:
            if source is not None and self.of(source) == modality:
                yield source
                yield from self.moved_from(source, modality)

    def can_be_moved(self, value: ir.Value, given: ir.Value) -> bool:
        """Whether moving alone makes ``value`` of ``given`` and of small constants."""
        if value is given or self.of(value) == ANYBODY:
            return True
        node = value.producer()
        if node is None or node.op_type not in _MOVING or node in self._weights:
            return False
        return all(self.can_be_moved(source, given) for source in node.inputs if source is not None)

    def _by_dependence(self) -> dict[ir.Node, str]:
        """The only modality that a node depends on, anybody's without one, else the main file's."""
        needs = {value: frozenset((self.of(value),)) for value in self.graph.inputs}
        sides = {}
        for node in self.graph:
            found = frozenset() if is_batch_size(node) else _union(needs, node)
            needs |= dict.fromkeys(node.outputs, found)
            sides[node] = ANYBODY if not found else next(iter(found)) if len(found) == 1 else MAIN
        return sides

    def _weights_read(self) -> dict[ir.Node, frozenset[str]]:
        """Large constants that nodes read, themselves or through what is anybody's: a weight is dequantised first."""
        behind = {
            value: frozenset((name,))
            for name, value in self.graph.initializers.items()
            if value.const_value is not None and value.const_value.nbytes > SHARED_BYTES
        }
        found = {}
        for node in self.graph:
            read = _union(behind, node)
            if self._sides[node] == ANYBODY:
                behind |= dict.fromkeys(node.outputs, read)
            elif read:
                found[node] = read
        return found

    def _keep_weights_together(self) -> None:
        """Give the main file every node that reads a weight which another file would have to hold as well."""
        while True:
            readers: dict[str, set[str]] = {}
            for node, names in self._weights.items():
                for name in names:
                    readers.setdefault(name, set()).add(self._sides[node])
            shared = {name for name, sides in readers.items() if len(sides) > 1}
            moved = [node for node, names in self._weights.items() if names & shared and self._sides[node] != MAIN]
            if not moved:
                return
            while moved:
                node = moved.pop()
                self._sides[node] = MAIN
                moved += [user for user in node.successors() if self._sides[user] not in (MAIN, ANYBODY)]


def is_batch_size(node: ir.Node) -> bool:
    """Whether a node reads the first axis of one of the graph's inputs: they all have the batch there."""
    value = node.inputs[0] if node.op_type == "Shape" else None
    if value is None or not value.is_graph_input():
        return False
    return not node.attributes.get_int("start") and node.attributes.get_int("end") == 1


def values_of(graph: ir.Graph) -> list[ir.Value]:
    """Everything that depends on inputs or is one, in the order of the graph."""
    return [*graph.inputs, *(value for node in graph for value in node.outputs)]


def _union(sets: Mapping[ir.Value, frozenset[str]], node: ir.Node) -> frozenset[str]:
    """What is known of all operands of a node together."""
    return frozenset().union(*(sets.get(value, ()) for value in node.inputs if value is not None))
