"""An ONNX file, looked through before any engine opens it: what no export writes is refused here.

Engines would run it: a loop that never ends, a function of the file's own, weights from whatever file it names. Read
are names and places alone, never weights, and nothing nests: graphs inside graphs are what is refused. The device has
no onnx package, and what this needs of the format is small.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from mope_deploy.engines.operators import ALLOWED_OPS, CONTRIB, DYNAMIC_OPS, FUSED_OPS
from mope_deploy.engines.wire import LENGTH, Damaged, Wire
from mope_deploy.errors import EngineError
from mope_deploy.fields import shown
from mope_deploy.files import reason
from mope_deploy.limits import MAX_GRAPH_FIELDS, MAX_NAME_BYTES
from mope_deploy.manifest import Graph, Part

__all__ = ["check_graph_file"]

_OPERATORS = {
    "": ALLOWED_OPS | DYNAMIC_OPS,
    "ai.onnx": ALLOWED_OPS | DYNAMIC_OPS,
    CONTRIB: FUSED_OPS,
}
_AGAIN = "export the model again; where it is of a newer release, upgrade mope-deploy"


class _Message(NamedTuple):
    """What may stand in a message of onnx.proto: fields that are looked into, and those that are skipped."""

    opened: Mapping[int, str]
    skipped: Collection[int]
    refused: Mapping[int, str] = {}


_SUBGRAPH = "graphs inside its graph, which is control flow"
_SCHEMA = {
    "model": _Message(
        {7: "graph"}, (1, 2, 3, 4, 5, 6, 8, 14), {20: "a training graph", 25: "functions of its own, not inlined"}
    ),
    "graph": _Message(
        {1: "node", 5: "tensor", 11: "value", 12: "value", 13: "value"}, (2, 10, 14, 16), {15: "sparse weights"}
    ),
    "node": _Message({4: "operator", 5: "attribute", 7: "domain"}, (1, 2, 3, 6, 8, 9)),
    "attribute": _Message(
        {5: "tensor", 10: "tensor"},
        (1, 2, 3, 4, 7, 8, 9, 13, 20, 21),
        {6: _SUBGRAPH, 11: _SUBGRAPH, 22: "sparse weights", 23: "sparse weights"},
    ),
    "tensor": _Message({13: "place"}, (*range(1, 13), 14, 16)),
    "place": _Message({1: "key", 2: "value"}, ()),
    "value": _Message({2: "type"}, (1, 3, 4)),
    "type": _Message({}, (1, 6), dict.fromkeys((4, 5, 7, 8, 9), "values that are no tensors")),
}


class _Refused(Exception):
    """Something that no export writes."""


def check_graph_file(path: Path, graph: Graph | Part) -> None:
    """Raise unless ``path`` holds what an export writes, and takes weights from the listed files alone.

    Args:
        path: an ONNX file.
        graph: what the manifest says, or will say, about it.

    Raises:
        EngineError: it is no ONNX file, or holds an operator, an operator's domain, control flow or a function that no
            export writes; or names a file for its weights that is not among ``graph.data``.
    """
    home = os.path.dirname(graph.file)
    listed = {os.path.basename(name) for name in graph.data if os.path.dirname(name) == home}
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            _Look(Wire(file, size, most_fields=MAX_GRAPH_FIELDS), listed).through(size)
    except _Refused as error:
        what = f"{path} is not opened: no export writes such a file"
        raise EngineError(what, received=str(error), expected=_expected(listed), todo=_AGAIN) from None
    except Damaged as error:
        raise EngineError(f"{path} is no ONNX file, or damaged", received=str(error), todo=_AGAIN) from None
    except OSError as error:
        raise EngineError(f"{path} cannot be read", received=reason(error)) from error


def _expected(listed: Collection[str]) -> str:
    weights = f"weights in itself or in {', '.join(sorted(listed))}" if listed else "all weights in itself"
    return f"a graph of tensors and the exporter's operators, {weights}"


class _Look:
    """One look through a file."""

    def __init__(self, wire: Wire, listed: Collection[str]) -> None:
        self._wire, self._listed = wire, listed

    def through(self, size: int) -> None:
        graphs = 0
        for _, end in self._inside("model", size):
            graphs += 1
            for kind, stop in self._inside("graph", end):
                if kind == "node":
                    self._node(stop)
                elif kind == "tensor":
                    self._tensor(stop)
                else:
                    self._value(stop)
        if not graphs:
            raise Damaged("there is no graph in it")

    def _inside(self, message: str, end: int) -> Iterator[tuple[str, int]]:
        """What is looked into, and where it ends; all else is known and skipped, or refused."""
        opened, skipped, refused = _SCHEMA[message]
        for number, kind, stop in self._wire.fields(end):
            if number in opened and kind == LENGTH:
                yield opened[number], stop
            elif number in refused:
                raise _Refused(refused[number])
            elif number not in skipped:
                raise _Refused(f"field {number} of a {message}, which is unknown here")

    def _node(self, end: int) -> None:
        operator = domain = ""
        for kind, stop in self._inside("node", end):
            if kind == "operator":
                operator = self._text(stop)
            elif kind == "domain":
                domain = self._text(stop)
            else:
                for _, tensor in self._inside("attribute", stop):
                    self._tensor(tensor)
        if operator not in _OPERATORS.get(domain, ()):
            raise _Refused(f"operator {shown(f'{domain}.{operator}' if domain else operator)}")

    def _tensor(self, end: int) -> None:
        for _, place in self._inside("tensor", end):
            found = {"key": "", "value": ""}
            for kind, stop in self._inside("place", place):
                found[kind] = self._text(stop)
            if found["key"] == "location" and found["value"] not in self._listed:
                raise _Refused(f"weights in {shown(found['value'])}, which the manifest does not list for it")

    def _value(self, end: int) -> None:
        for _, stop in self._inside("value", end):
            for _ in self._inside("type", stop):
                pass

    def _text(self, end: int) -> str:
        """Compared with names in ASCII, so how anything else is read does not matter."""
        return self._wire.read(end, most=MAX_NAME_BYTES).decode("ascii", "replace")
