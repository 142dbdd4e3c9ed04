"""Where the layers of the encoders and their products stand in a graph, read from names (export.graph.naming).

Nodes are called ``<module>/<operator>`` and weights after their parameters, so no encoder family is known here. A
*layer* is the innermost numbered module that holds an attention (a Softmax): ``blocks.3`` of a ViT,
``layers.0.blocks.1`` of a Swin, ``encoder.layer.5`` of a BERT. Other modules among such layers (``layers.1.downsample``
of a Swin) are layers of their own; what stands outside (``patch_embed``, ``embeddings``, a pooling head) forms one
*part* for each child of the encoder. A *product* is a linear layer: a MatMul or Gemm by a matrix that bears its
module's name, which a product of two activations, or of one with a folded constant, does not.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from mope_deploy.errors import ExportError

__all__ = ["PRODUCTS", "Layout", "Product", "layout", "module_of", "source_weight"]

PRODUCTS = ("Conv", "Gemm", "MatMul", "MatMulInteger")
_LINEAR = ("Gemm", "MatMul", "MatMulInteger")
_ENCODER = re.compile(r"(?:main|complementary\.[^.]+\.backbone)\.encoder(?:\.|$)")
_THROUGH = ("Cast", "DequantizeLinear", "Identity", "Transpose")  # between a weight as stored and its product


@dataclass(frozen=True)
class Product:
    """One linear layer."""

    name: str  # its module
    layer: str  # the layer it belongs to
    nodes: tuple[str, ...]  # its MatMul or Gemm nodes; more than one where a module is applied more than once
    weight: str  # its matrix as stored


@dataclass(frozen=True)
class Layout:
    """The encoders of one graph, all in its order."""

    layers: tuple[str, ...]
    parts: tuple[str, ...]  # what else the encoders hold: embeddings, pooling heads
    products: Mapping[str, Product]  # linear layers of the layers, by name
    multiplying: Mapping[str, tuple[str, ...]]  # layer or part → modules with a product, of weights or of activations
    _homes: Mapping[str, str]  # module → layer or part

    def home(self, node: ir.Node) -> str | None:
        """The layer or part of the encoders that ``node`` belongs to, None outside them."""
        return self._homes.get(module_of(node))

    def check_known(self, keep: Iterable[str], known: Collection[str]) -> frozenset[str]:
        """``keep`` as a set.

        Raises:
            ExportError: a name in it is none of ``known``.
        """
        names = frozenset(keep)
        for name in sorted(names - set(known)):
            near = difflib.get_close_matches(name, list(known), n=1)
            raise ExportError(
                "nothing of that name can be kept in higher precision",
                received=name,
                expected=near[0] if near else f"one of {len(known)} layers and products, such as {min(known)}",
            )
        return names


def module_of(node: ir.Node) -> str:
    """The module that ``node`` is named after, empty if it has none."""
    return (node.name or "").rpartition("/")[0]


def source_weight(value: ir.Value | None) -> ir.Value | None:
    """The initializer that ``value`` is or was made from by casts, dequantisation and transposition alone."""
    while value is not None and not value.is_initializer():
        node = value.producer()
        if node is None or node.op_type not in _THROUGH:
            return None
        value = node.inputs[0]
    return value


def layout(graph: ir.Graph) -> Layout:
    """Find the encoders' layers and products in a graph, as exported or lowered."""
    modules = dict.fromkeys(module_of(node) for node in graph)
    attending = {_numbered(module_of(node)) for node in graph if node.op_type == "Softmax"} - {None}
    homes = {module: _home(module, {name for name in attending if name}) for module in modules}
    layers = dict.fromkeys(name for name, inside in homes.values() if inside)
    parts = dict.fromkeys(name for name, inside in homes.values() if name and not inside)
    nodes: dict[str, list[str]] = {}
    weights: dict[str, str] = {}
    multiplying: dict[str, dict[str, None]] = {name: {} for name in (*layers, *parts)}
    for node in graph:
        module = module_of(node)
        home, inside = homes[module]
        if not home or node.op_type not in PRODUCTS:
            continue
        multiplying[home][module] = None
        weight = source_weight(node.inputs[1]) if len(node.inputs) > 1 else None
        name = weight.name if weight is not None else None
        if inside and name and node.op_type in _LINEAR and name.startswith(f"{module}.") and _is_matrix(weight):
            nodes.setdefault(module, []).append(node.name or "")
            weights[module] = name
    products = {name: Product(name, homes[name][0], tuple(found), weights[name]) for name, found in nodes.items()}
    return Layout(
        layers=tuple(layers),
        parts=tuple(parts),
        products=products,
        multiplying={name: tuple(found) for name, found in multiplying.items()},
        _homes={module: name for module, (name, _) in homes.items() if name},
    )


def _is_matrix(weight: ir.Value | None) -> bool:
    return weight is not None and weight.const_value is not None and len(weight.const_value.shape) == 2


def _numbered(module: str) -> str | None:
    """``main.encoder.blocks.3.attn`` → ``main.encoder.blocks.3``: up to the last number behind the encoder's name."""
    encoder = _ENCODER.match(module)
    if encoder is None:
        return None
    parts = module[encoder.end() :].split(".")
    last = max((i for i, part in enumerate(parts) if part.isdigit()), default=None)
    return None if last is None else module[: encoder.end()] + ".".join(parts[: last + 1])


def _home(module: str, attending: Collection[str]) -> tuple[str, bool]:
    """The layer or part a module belongs to, empty for none, and whether it is a layer."""
    encoder = _ENCODER.match(module)
    if encoder is None or encoder.end() >= len(module):
        return "", False
    around = _numbered(module)
    while around is not None:
        if around in attending:
            return around, True
        if any(name.startswith(f"{around}.") for name in attending):  # beside the layers of one stage
            child = module[len(around) + 1 :].partition(".")[0]
            return f"{around}.{child}" if child else around, True
        around = _numbered(around.rpartition(".")[0])
    return module[: encoder.end()] + module[encoder.end() :].partition(".")[0], False
