"""int8-dynamic: weights in int8, activations quantised by ONNX Runtime as it runs; for CPUs, without calibration.

ONNX Runtime's own quantiser does it, per output channel, on the same linear layers as :mod:`export.precision.int8`.
TensorRT has no such operators.

The range of an activation is taken from the whole tensor as it comes, so a sample's result depends on its batch-mates
and its padding: on a trained digits-ve model by 0.05 of the largest logit between batches of 1 and 32, as much as
quantisation itself costs. Static int8 does not do that.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from export.graph.files import check_file, read
from export.limits import EMBED_LIMIT, MAX_IR_VERSION
from export.precision.check import DYNAMIC_OPS, check_types
from export.precision.int8 import quantise_weight_of
from export.precision.layout import layout
from export.precision.ranking import own_errors, twin_of
from mope_deploy.engines.onnxruntime.library import import_onnxruntime
from mope_deploy.errors import ExportError
from mope_deploy.model.quiet import quiet

__all__ = ["DynamicLowering"]


class DynamicLowering:
    """Dynamic int8.

    Args:
        graph: the canonical fp32 graph.
    """

    precision, runtime_mark, runs_on = "int8-dynamic", "", "onnxruntime"
    unfit: tuple[str, ...] = ()

    def __init__(self, graph: Path) -> None:
        self._source = graph
        model = read(graph)
        self._layout = layout(model.graph)
        gemms = {node.name for node in model.graph if node.op_type == "Gemm"}  # it knows MatMul alone
        self._products = {p.name: p for p in self._layout.products.values() if not gemms & set(p.nodes)}
        if not self._products:
            raise ExportError(f"{graph.name} has no linear layer inside an encoder layer to quantise")
        self.layers = tuple(dict.fromkeys(product.layer for product in self._products.values()))

    def products(self, layer: str) -> tuple[str, ...]:
        """The linear layers of ``layer``."""
        return tuple(name for name, product in self._products.items() if product.layer == layer)

    def own_errors(
        self, feeds: Iterable[Mapping[str, NDArray[Any]]], *, on_step: Callable[[str], None] = lambda _: None
    ) -> dict[str, float]:
        """See :class:`export.precision.Lowering`. Sample by sample, as they will be run."""
        weights: dict[str, ir.Value] = {}

        def twin(graph: ir.Graph, node: ir.Node) -> ir.Value:
            made = twin_of(node, node.inputs)
            _quantise_input(node, made)
            quantise_weight_of(graph, made, weights)
            return made.outputs[0]

        nodes = {name: product.nodes for name, product in self._products.items()}
        alone = (
            {n: a[i : i + 1] for n, a in feed.items()} for feed in feeds for i in range(len(next(iter(feed.values()))))
        )
        return own_errors(self._source, nodes, twin, alone, on_step=on_step)

    def write(self, path: Path, *, keep: Collection[str] = ()) -> list[Path]:
        """Write the file. See :class:`export.precision.Lowering`."""
        kept = self._layout.check_known(keep, {*self.layers, *self._products})
        nodes = [name for p in self._products.values() if not kept & {p.name, p.layer} for name in p.nodes]
        if not nodes:  # an empty list would mean all nodes to the quantiser
            raise ExportError("every layer is kept in fp32, so nothing would be int8-dynamic")
        quantisation = import_onnxruntime("onnxruntime.quantization")
        model = onnx.load(self._source)
        del model.graph.value_info[:]  # it fails on declarations that dynamo's graphs have
        data = path.with_name(path.name + ".data")
        large = sum(tensor.ByteSize() for tensor in model.graph.initializer) > EMBED_LIMIT
        with quiet():  # it asks for a preprocessing that changes nothing here
            quantisation.quantize_dynamic(
                model,
                path,
                op_types_to_quantize=["MatMul"],
                nodes_to_quantize=nodes,
                per_channel=True,
                weight_type=quantisation.QuantType.QInt8,
                use_external_data_format=large,
                extra_options={"MatMulConstBOnly": True},
            )
        _tidy(path)
        check_file(path, extra_ops=DYNAMIC_OPS)
        check_types(path, self.precision, kept, source=self._layout, products=self._products)
        return [path, data] if data.is_file() else [path]

    def write_runnable(self, path: Path, *, keep: Collection[str] = ()) -> list[Path]:
        """The same file."""
        return self.write(path, keep=keep)


def _quantise_input(node: ir.Node, twin: ir.Node) -> None:
    """The range of an activation as it comes, and its codes undone."""
    assert isinstance(node.graph, ir.Graph)
    name = node.outputs[0].name
    codes = ir.Node("", "DynamicQuantizeLinear", [node.inputs[0]], num_outputs=3, name=f"{node.name}.codes")
    undone = ir.Node("", "DequantizeLinear", codes.outputs, num_outputs=1, name=f"{node.name}.undone")
    for i, value in enumerate((*codes.outputs, *undone.outputs)):
        value.name = f"{name}.dynamic{i}"
    node.graph.insert_before(twin, [codes, undone])
    twin.replace_input_with(0, undone.outputs[0])


def _tidy(path: Path) -> None:
    """Take the quantiser's own stamps back; its file is the project's."""
    model = onnx.load(path, load_external_data=False)
    model.ir_version = min(model.ir_version, MAX_IR_VERSION)
    del model.graph.value_info[:]
    for opset in [opset for opset in model.opset_import if opset.domain not in ("", "ai.onnx")]:
        model.opset_import.remove(opset)
    model.producer_name = "mope-deploy"
    onnx.save(model, path)
