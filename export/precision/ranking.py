"""What lowering costs each product by itself: how far its own output is off on real samples, all in one pass.

Beside every product of the canonical graph stands its lowered twin, which reads the same exact inputs: no damage of one
layer hides behind that of another, and after a NaN the others still say what they are.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.graph.files import read
from export.graph.insert import add_node
from export.graph.naming import renumber
from export.graph.probe import open_probe
from mope_deploy.errors import ExportError

__all__ = ["own_errors", "twin_of"]

Arrays = Mapping[str, NDArray[Any]]
Twin = Callable[[ir.Graph, ir.Node], ir.Value]


def own_errors(
    graph: Path,
    products: Mapping[str, Sequence[str]],
    twin: Twin,
    feeds: Iterable[Arrays],
    *,
    on_step: Callable[[str], None] = lambda _: None,
) -> dict[str, float]:
    """The relative RMS error of each product's own output, as twins compute it; infinite where that is not finite.

    Args:
        graph: the canonical fp32 graph.
        products: names of nodes by product.
        twin: puts the lowered twin of a node behind it and returns its float32 output.
        feeds: arrays by input name, batch by batch; read once.
        on_step: called with a few words after each batch.

    Raises:
        ExportError: there is no sample, of which every error would be 0.
    """
    model = read(graph)
    owners = {node: product for product, nodes in products.items() for node in nodes}
    outputs: list[ir.Value] = []
    of: list[str] = []
    for node in list(model.graph):
        if (node.name or "") in owners:
            exact = node.outputs[0]
            error = add_node(model.graph, "Sub", [twin(model.graph, node), exact], f"{exact.name}.off", name="rank/Sub")
            outputs += [_energy(model.graph, error), _energy(model.graph, exact)]
            of.append(owners[node.name or ""])
    renumber(model)
    model.graph.outputs.clear()
    model.graph.outputs.extend(outputs)
    sums = np.zeros(len(outputs))
    with tempfile.TemporaryDirectory(prefix="mope-rank-") as folder:
        file = Path(folder, "rank.onnx")
        ir.save(model, file, external_data=f"{file.name}.data")
        session, samples = open_probe(file), 0
        wanted = [value.name for value in outputs]
        known = {value.name for value in session.get_inputs()}
        for feed in feeds:
            found = session.run(wanted, {name: array for name, array in feed.items() if name in known})
            sums += [float(value) for value in found]
            samples += len(next(iter(feed.values())))
            on_step(f"finding what each layer loses by itself ({samples:,} samples)")
    if not samples:
        raise ExportError("there is no sample to rank layers on")
    totals = {product: np.zeros(2) for product in products}
    for product, pair in zip(of, sums.reshape(-1, 2), strict=True):
        totals[product] += pair
    return {product: _relative(*pair) for product, pair in totals.items()}


def twin_of(node: ir.Node, inputs: Sequence[ir.Value | None]) -> ir.Node:
    """The same operator on other inputs, right behind ``node``."""
    assert isinstance(node.graph, ir.Graph)
    twin = ir.Node(
        node.domain, node.op_type, inputs, list(node.attributes.values()), num_outputs=1, name=f"{node.name}.twin"
    )
    twin.outputs[0].name = f"{node.outputs[0].name}.twin"
    node.graph.insert_after(node, twin)
    return twin


def _energy(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """The sum of its squares, a number."""
    made = add_node(
        graph, "ReduceSumSquare", [value], f"{value.name}.energy", name="rank/Energy", attributes={"keepdims": 0}
    )
    made.type, made.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([])
    return made


def _relative(error: float, size: float) -> float:
    if not (math.isfinite(error) and math.isfinite(size)):
        return math.inf
    return math.sqrt(error / size) if size > 0 else (math.inf if error > 0 else 0.0)
