"""Every expert's table in a file against the trained expert, whichever of them the compared samples select.

Under top-k routing few samples reach few experts. So the part of the graph from a router's softmax to what its layer is
given is cut out and run by itself with forced scores: each expert alone or first, and each as the second; under dense
routing mixtures of all as well. Expected is what the trained experts give for the same scores, through the layer's own
projection where tables were folded. That part is fp32 in every precision, so one tolerance holds for all files.

In a graph in parts it may be cut in two. There the stored tables are compared with those that the trained experts fold
to. The routers' own tensors are copies everywhere and are compared as such.

Letters: R rows of forced scores · K experts · L prompt length · D width.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from rich.text import Text
from torch import Tensor, nn

from export.gate.found import verdict
from export.gate.inside import router_softmaxes, save_probe
from export.gate.reference import mixed
from export.graph.folding import AppendedExperts, FoldedExperts
from export.graph.probe import open_probe
from mope_deploy.files import reason
from mope_deploy.model import MoPE
from mope_deploy.model.backbones.prefix import Projection
from mope_deploy.model.experts import PromptExperts
from mope_deploy.model.prompts import LayerPrompts
from mope_deploy.model.router import Router

__all__ = ["TableCheck", "compare_tables", "table_cells"]

TOLERANCE = 1e-5  # relative to the largest value of the same expert or mixture
ROUNDING = 10.0  # or so many times what the trained experts' own float32 loses
CEILING = 1e-4  # but never more than this
_FALLING = 0.6  # each next score of forced top-k routing over the one before

Array = NDArray[Any]


@dataclass(frozen=True)
class TableCheck:
    """The tables of one layer.

    Attributes:
        what: ``"experts of layer 3"`` or ``"router of layer 3"``.
        how: ``"forced routing"``, ``"as stored"``, or why nothing could be compared.
        experts: how many were compared.
        error: max|a − b| / max|b| of the worst of them; infinite where one is missing.
        allowed: for that one.
        worst: which that is.
    """

    what: str
    how: str
    experts: int
    error: float
    allowed: float
    worst: str

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed

    def __str__(self) -> str:
        return f"the {self.what} differ by {self.error:.2g} of their size, allowed {self.allowed:.0e} ({self.worst})"


def table_cells(checks: Sequence[TableCheck], remark: str = "") -> tuple[str, str, str, Text]:
    """For a terminal: how many experts, the worst one's error, what is allowed for it, and the verdict."""
    worst = max(checks, key=lambda check: check.error / check.allowed)
    count = sum(check.experts for check in checks if check.what.startswith("experts"))
    passed = verdict(all(check.passed for check in checks))
    return f"{count}", f"{worst.error:.1e}{remark}", f"{worst.allowed:.0e}", passed


def compare_tables(model: MoPE, file: Path, parts: Sequence[Path] = ()) -> tuple[TableCheck, ...]:
    """Compare the experts and the router of every layer; nothing for a model without dynamic prompts.

    Args:
        model: the trained model; stays as it is.
        file: the graph, of any precision, or the main file of one in parts.
        parts: of a graph in several files the others.
    """
    graphs = [onnx.load(path) for path in (file, *parts)]
    found: list[TableCheck] = []
    for i, layer in enumerate(cast("list[LayerPrompts]", list(model.layers))):
        if layer.router is not None and layer.experts is not None:
            projection = model.main.projection(i) if model.main.has_prefix_form else None
            found.append(_experts(layer.experts, projection, layer.router.top_k, i, graphs))
            found.append(_router(layer.router, i, graphs))
    return tuple(found)


def _experts(
    experts: PromptExperts, projection: Projection | None, top_k: int, i: int, graphs: Sequence[onnx.ModelProto]
) -> TableCheck:
    what, K = f"experts of layer {i}", len(experts.prompts)
    if len(graphs) == 1 and (routed := _routed_part(graphs[0], i)) is not None:
        names, soft = _forced(K, top_k)
        sides = [_expected(experts, projection, top_k, each) for each in (soft, soft.float())]
        try:
            ran = _run(*routed, soft.numpy().astype(np.float32))
        except Exception as failed:  # ONNX Runtime raises many classes
            return TableCheck(what, "forced routing", 0, np.inf, TOLERANCE, f"they do not run: {reason(failed)}")
        pairs = _paired(ran, *sides)
        if pairs is not None:
            error, allowed, row = max(map(_worst, *zip(*pairs, strict=True)), key=lambda one: one[0] / one[1])
            return TableCheck(what, "forced routing", K, error, allowed, names[row])
    stored = _read_by(graphs, f"layers.{i}.dynamic")
    found = [_as_stored(form, stored) for form in _forms(experts.prompts.detach().cpu(), projection)]
    error, row = min(found)
    return TableCheck(what, "as stored", K, error, TOLERANCE, f"expert {row}")


def _forced(K: int, top_k: int) -> tuple[list[str], Tensor]:
    """Scores after the softmax (R, K) float64, and what each row shows."""
    if not top_k:
        mixtures = torch.from_numpy(np.random.default_rng(K).dirichlet(np.ones(K), size=max(8, K)))
        names = [*(f"expert {k}" for k in range(K)), *("a mixture",) * len(mixtures)]
        return names, torch.cat((torch.eye(K, dtype=torch.float64), mixtures))
    ahead = (torch.arange(K) - torch.arange(K)[:, None]) % K  # (K, K): how far behind the first one each expert stands
    rows = torch.cat([_FALLING ** each.double() for each in (ahead, (-ahead) % K)])
    rows = rows / rows.sum(dim=-1, keepdim=True)
    return [f"expert {k}, then {(k + step) % K}" for step in (1, -1) for k in range(K)], rows


def _expected(experts: PromptExperts, projection: Projection | None, top_k: int, soft: Tensor) -> dict[str, Array]:
    """What the trained experts give for scores (R, K): tokens, keys and values, (R, n) each, in the scores' dtype."""
    selected = torch.ones_like(soft, dtype=torch.bool)
    if top_k:
        selected = torch.zeros_like(selected).scatter(-1, soft.topk(top_k, dim=-1).indices, True)
    with torch.no_grad():
        tokens = copy.deepcopy(experts).to(soft.dtype).cpu()(mixed(soft, selected))  # (R, L, D)
        found = {"tokens": tokens.flatten(1).numpy()}
        if projection is not None:
            keys_values = _of_type(projection, soft.dtype)(tokens)  # (R, 2, L, inner)
            found |= {name: keys_values[:, j].flatten(1).numpy() for j, name in enumerate(("keys", "values"))}
    return found


def _of_type(projection: Projection, dtype: torch.dtype) -> Projection:
    norm = None if projection.norm is None else copy.deepcopy(projection.norm).to(dtype).cpu()
    weight, bias = (tensor.detach().to(dtype).cpu() for tensor in (projection.weight, projection.bias))
    return Projection(norm, weight, bias, projection.product)


def _routed_part(model: onnx.ModelProto, i: int) -> tuple[onnx.ModelProto, list[str]] | None:
    """What one layer computes of its router's softmax alone, as a graph, and what leaves it; None if it reads more."""
    graph = model.graph
    softmax = router_softmaxes(graph).get(i)
    if softmax is None:
        return None
    soft = softmax.output[0]
    constants = {tensor.name for tensor in graph.initializer}
    known = {soft}
    nodes: list[onnx.NodeProto] = []
    dynamic: list[str] = []
    for node in graph.node:
        module = node.name.rpartition("/")[0]
        if node.op_type == "Constant":
            constants.add(node.output[0])
            nodes.append(node)
        elif module in (f"layers.{i}.router", f"layers.{i}.dynamic") and not known.isdisjoint(node.input):
            if not known.union(constants, ("",)).issuperset(node.input):
                return None
            if _narrows(node):
                continue
            known.update(node.output)
            nodes.append(node)
            dynamic += node.output if module.endswith("dynamic") else ()
    inner = {id(node) for node in nodes}
    outside = {name for node in graph.node if id(node) not in inner for name in node.input}
    outside |= {value.name for value in graph.output}
    leaving = [name for name in dynamic if name in outside]
    read = {name for node in nodes for name in node.input}
    part = helper.make_graph(
        nodes,
        "routed",
        [helper.make_tensor_value_info(soft, TensorProto.FLOAT, ["rows", None])],
        [onnx.ValueInfoProto(name=name) for name in leaving],
        [tensor for tensor in graph.initializer if tensor.name in read],
    )
    return helper.make_model(part, ir_version=model.ir_version, opset_imports=model.opset_import), leaving


def _narrows(node: onnx.NodeProto) -> bool:
    """Whether a node rounds for a layer of lower precision: that is the layer's affair."""
    return node.op_type == "Cast" and any(
        attribute.name == "to" and attribute.i in (TensorProto.FLOAT16, TensorProto.BFLOAT16)
        for attribute in node.attribute
    )


def _run(part: onnx.ModelProto, leaving: list[str], soft: Array) -> list[Array]:
    """What leaves the part for scores (R, K), each (R, n)."""
    with tempfile.TemporaryDirectory(prefix="mope-tables-") as folder:
        session = open_probe(save_probe(part, Path(folder) / "part.onnx"))
        return [found.reshape(len(soft), -1) for found in session.run(leaving, {part.graph.input[0].name: soft})]


def _paired(
    found: Sequence[Array], exact: dict[str, Array], plain: dict[str, Array]
) -> list[tuple[Array, Array, Array]] | None:
    """What was found beside what was expected, in float64 and in float32; None if the two cannot be told to be one."""
    # Which of two is which is compared on every sample: here it only has to be found out.
    choices: list[tuple[str, ...]] = [("tokens",), ("keys", "values"), ("values", "keys")]
    pairs = [
        [(a, exact[name], plain[name]) for a, name in zip(found, names, strict=True)]
        for names in choices
        if exact.keys() >= {*names}
        and len(names) == len(found)
        and all(a.shape == exact[name].shape for a, name in zip(found, names, strict=True))
    ]
    return min(pairs, key=lambda one: max(_distance(a, b) for a, b, _ in one), default=None)


def _distance(a: Array, b: Array) -> float:
    """max|a − b|, infinite if anything is not finite."""
    return float(np.nan_to_num(np.abs(a - b), nan=np.inf).max(initial=0.0))


def _worst(found: Array, exact: Array, plain: Array) -> tuple[float, float, int]:
    """The error of the worst row, what is allowed for it, and which it is."""
    scale = _scale(exact)  # (R,)
    error = np.abs(found - exact).max(axis=1) / scale
    error = np.where(np.isfinite(error), error, np.inf)
    rounded = np.abs(plain - exact).max(axis=1) / scale
    allowed = np.clip(ROUNDING * rounded, TOLERANCE, CEILING)
    row = int((error / allowed).argmax())
    return float(error[row]), float(allowed[row]), row


def _scale(rows: Array) -> Array:
    """The size of each row (R, n), at least a millionth of the largest: what is nothing has nothing to compare with."""
    size = np.abs(rows).max(axis=1)
    return np.maximum(size, max(1e-6 * float(size.max(initial=0.0)), float(np.finfo(np.float32).tiny)))


def _forms(experts: Tensor, projection: Projection | None) -> Iterator[list[Array]]:
    """The tables (K, n) of each form in which experts can stand in a graph."""
    yield [AppendedExperts(experts).table.numpy()]
    if projection is None:
        return
    own = _of_type(projection, experts.dtype)
    held = {"table": ["table"]}
    if isinstance(projection.norm, nn.LayerNorm):
        held |= {"gram": ["table", "gram"], "mixed": ["table", "centred"]}
    for form, names in held.items():
        folded = FoldedExperts(own, experts, form)
        yield [folded.get_buffer(name).numpy() for name in names]


def _as_stored(form: Iterable[Array], stored: Sequence[Array]) -> tuple[float, int]:
    """How far what is stored is from one form, per expert: the largest error, and whose."""
    worst = (0.0, 0)
    for table in form:
        off = [np.abs(each - table).max(axis=1) for each in stored if each.shape == table.shape]
        errors = [np.nan_to_num(each / _scale(table), nan=np.inf) for each in off]
        best = min(errors, key=lambda one: float(one.max()), default=np.full(len(table), np.inf))
        worst = max(worst, (float(best.max()), int(best.argmax())))
    return worst


def _router(router: Router, i: int, graphs: Sequence[onnx.ModelProto]) -> TableCheck:
    """What a router is made of: copies in every form, precision and part of a graph."""
    U = router.embeddings.detach()
    trained = {"the routing embeddings": nn.functional.normalize(U, dim=-1) if router.cosine else U}
    if router.project_x is not None:
        trained["the projection of x"] = router.project_x.weight.detach()
    own = cast("dict[str, nn.Linear]", dict(router.project_y.items()))
    trained |= {f"the projection of {name}": each.weight.detach() for name, each in own.items()}
    stored = [*_read_by(graphs, f"layers.{i}.router"), *_behind(graphs, i)]
    stored += [array.T for array in stored]
    worst = (0.0, "")
    for name, tensor in trained.items():
        table = tensor.cpu().numpy()
        off = [_distance(each, table) for each in stored if each.shape == table.shape]
        worst = max(worst, (min(off, default=np.inf) / float(np.abs(table).max(initial=1e-30)), name))
    return TableCheck(f"router of layer {i}", "as stored", len(U), worst[0], TOLERANCE, worst[1])


def _behind(graphs: Sequence[onnx.ModelProto], i: int) -> list[Array]:
    """What a router's softmax is computed from by nodes that lost their names, as fused ones do."""
    found: list[Array] = []
    for model in graphs:
        if (softmax := router_softmaxes(model.graph).get(i)) is None:
            continue
        made_by = {name: node for node in model.graph.node for name in node.output}
        read, open_ = set(softmax.input), list(softmax.input)
        while open_:
            node = made_by.get(open_.pop())
            if node is not None and ("/" not in node.name or node.name.startswith(f"layers.{i}.router")):
                open_ += set(node.input) - read
                read.update(node.input)
        found += _matrices(model, read)
    return found


def _read_by(graphs: Sequence[onnx.ModelProto], module: str) -> list[Array]:
    """Matrices of floats that nodes of a module, or of one in it, read as they are stored."""
    found: list[Array] = []
    for model in graphs:
        nodes = (node for node in model.graph.node if f"{node.name.rpartition('/')[0]}.".startswith(f"{module}."))
        read = {name for node in nodes for name in node.input}
        found += _matrices(model, read)
    return found


def _matrices(model: onnx.ModelProto, names: Collection[str]) -> list[Array]:
    """Those of some tensors that are stored as matrices of float32."""
    stored = (tensor for tensor in model.graph.initializer if tensor.name in names)
    return [
        numpy_helper.to_array(tensor)
        for tensor in stored
        if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) == 2
    ]
