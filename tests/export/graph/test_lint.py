"""The lint refuses each thing that a target cannot take, by node, and nothing else."""

from __future__ import annotations

import onnx
import onnx_ir
import pytest
from onnx import TensorProto, helper, parser

from export.graph.lint import ALLOWED_OPS, Refusal
from export.graph.lint import check as check_ir
from export.graph.lint import lint as lint_ir
from mope_deploy.errors import ExportError


def check(model: onnx.ModelProto) -> None:
    check_ir(onnx_ir.from_proto(model))


def lint(model: onnx.ModelProto) -> list[Refusal]:
    return lint_ir(onnx_ir.from_proto(model))


def graph(body: str, *, opset: int = 18, ir: int = 10, imports: str = "") -> onnx.ModelProto:
    """A model of one graph: x (batch, 4) float and i (batch, n) int64 in, whatever ``body`` computes out."""
    return parser.parse_model(
        f'<ir_version: {ir}, opset_import: ["" : {opset}{imports}]>\n'
        "g (float[batch, 4] x, int64[batch, n] i) => (float[batch, m] y)\n"
        "<float[4, 4] w = {1,0,0,0, 0,1,0,0, 0,0,1,0, 0,0,0,1}, int64[1] two = {2}, int64[1] zero = {0},"
        " int64[1] four = {4}, int64 start = {0}, int64 one = {1}, int64[1] many = {3841}>\n"
        "{" + body + "}"
    )


ACCEPTED = {
    "a layer": "h = MatMul(x, w) s = Softmax<axis=-1>(h) y = Mul(s, x)",
    "top-k with a constant k": "v, k = TopK<axis=-1>(x, two) y = Identity(v)",
    "k from a Constant node": "c = Constant<value_ints=[2]>() v, k = TopK<axis=-1>(x, c) y = Identity(v)",
    "reshape to a computed shape": "b = Shape<start=0, end=1>(x) t = Concat<axis=0>(b, four) y = Reshape(x, t)",
    "a range over the text length": """s = Shape<start=1, end=2>(i) z = Constant<value_ints=[0]>() n = Squeeze(s, z)
        r = Range(start, n, one) f = Cast<to=1>(r) b = Unsqueeze(f, z) e = Shape<start=0, end=1>(x)
        t = Concat<axis=0>(e, s) y = Expand(b, t)""",
    "a scatter without reduction": "y = ScatterElements<axis=1>(x, i, x)",
    "a row chosen by data": "r = Gather<axis=0>(w, i) z = Constant<value_ints=[1]>() y = ReduceSum<keepdims=0>(r, z)",
}


@pytest.mark.parametrize("body", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_accepts_what_all_targets_take(body: str) -> None:
    model = graph(body)
    onnx.checker.check_model(model)
    assert lint(model) == []
    check(model)


REFUSED = {
    "NonZero": ("h = NonZero(x) y = Cast<to=1>(h)", "NonZero", "depends on data"),
    "Unique": ("y = Unique<sorted=1>(x)", "Unique", "depends on data"),
    "Compress": ("b = Cast<to=9>(x) c = Flatten(b) y = Compress(x, c)", "Compress", "depends on data"),
    "reshape by values": ("y = Reshape(x, i)", "Reshape", "depends on data"),
    "expand by values": ("t = Gather<axis=0>(i, start) y = Expand(x, t)", "Expand", "depends on data"),
    "range to a value": (
        "n = ReduceMax<keepdims=0>(i) r = Range(start, n, one) y = Cast<to=1>(r)",
        "Range",
        "depends on data",
    ),
    "slice to a value": ("e = Gather<axis=0>(i, start) y = Slice(x, zero, e, zero)", "Slice", "depends on data"),
    "k from a shape": ("k = Shape<start=1, end=2>(i) y, j = TopK<axis=-1>(x, k)", "TopK", "non-constant operand 'k'"),
    "k from data": ("k = ReduceMax<keepdims=0>(i) y, j = TopK<axis=-1>(x, k)", "TopK", "depends on data"),
    "k above TensorRT's limit": ("y, j = TopK<axis=-1>(x, many)", "TopK", "k = 3,841"),
    "axes from a shape": ("a = Shape<start=1, end=2>(i) y = ReduceSum(x, a)", "ReduceSum", "non-constant operand 'a'"),
    "Einsum": ('y = Einsum<equation="bi,ij->bj">(x, w)', "Einsum", "older TensorRT parsers"),
    "scatter with a sum": (
        'y = ScatterElements<axis=1, reduction="add">(x, i, x)',
        "ScatterElements",
        "reduction 'add'",
    ),
    "scatter with a product": ('y = ScatterND<reduction="mul">(x, i, x)', "ScatterND", "reduction 'mul'"),
    "If": (
        """c = ReduceMin<keepdims=0>(x) b = Cast<to=9>(c)
        y = If(b) <then_branch = t () => (float[b, 4] p) { p = Neg(x) },
                   else_branch = e () => (float[b, 4] q) { q = Abs(x) }>""",
        "If",
        "control flow",
    ),
    "noise": ("n = RandomNormalLike(x) y = Add(x, n)", "RandomNormalLike", "not deterministic"),
    "an operator of ONNX Runtime": ("y = com.microsoft.Gelu(x)", "com.microsoft.Gelu", "no standard operator"),
    "a float64 detour": ("d = Cast<to=11>(x) y = Cast<to=1>(d)", "Cast", "casts to DOUBLE"),
    "an operator nobody listed": ("y = Det(x)", "Det", "outside the allowlist"),
    "antialiased resize": (
        's = Constant<value_floats=[1.0, 2.0]>() y = Resize<antialias=1, mode="linear">(x, , s)',
        "Resize",
        "antialias",
    ),
}


@pytest.mark.parametrize(("body", "op", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_refuses_by_node_and_reason(body: str, op: str, reason: str) -> None:
    model = graph(body)
    for node in model.graph.node:
        node.name = f"node_{node.op_type}"
    found = lint(model)
    assert len(found) == 1, found
    assert found[0].op == op
    assert reason in str(found[0])
    assert found[0].node == f"node_{op.split('.')[-1]}"
    assert found[0].todo
    with pytest.raises(ExportError, match=r"1 thing that a target cannot take") as error:
        check(model)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("opset", "ir", "op"), [(16, 8, "opset 16"), (23, 10, "opset 23"), (18, 11, "IR version 11")])
def test_refuses_versions_that_a_target_cannot_read(opset: int, ir: int, op: str) -> None:
    found = lint(graph("y = Relu(x)", opset=opset, ir=ir))
    assert [refusal.op for refusal in found] == [op]


def test_refuses_a_function_left_uninlined() -> None:
    model = graph("y = local.twice(x)", imports=', "local" : 1')
    body = [helper.make_node("Add", ["a", "a"], ["b"])]
    opsets = [helper.make_opsetid("", 18)]
    model.functions.append(helper.make_function("local", "twice", ["a"], ["b"], body, opsets))
    assert {refusal.op for refusal in lint(model)} == {"function local.twice", "local.twice"}


def test_refuses_doubles_among_the_weights() -> None:
    model = graph("y = Relu(x)")
    model.graph.initializer.append(helper.make_tensor("wide", TensorProto.DOUBLE, [2], [0.0, 1.0]))
    assert [refusal.node for refusal in lint(model)] == ["wide"]
    assert "DOUBLE" in str(lint(model)[0])


def test_counts_what_it_does_not_show() -> None:
    with pytest.raises(ExportError, match=r"5 things .* and 2 more"):
        check(graph("a = NonZero(x) b = NonZero(x) c = NonZero(x) d = NonZero(x) e = NonZero(x) y = Cast<to=1>(a)"))


def test_nvidias_parser_knows_every_allowed_operator() -> None:
    import tensorrt_rtx as trt

    from mope_deploy.engines.tensorrt.backends import open_backend
    from mope_deploy.engines.tensorrt.log import shared_log

    logger = shared_log(open_backend("tensorrt_rtx")).logger
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    onnx_parser = trt.OnnxParser(network, logger)
    assert not onnx_parser.supports_operator("NoSuchOperator")
    assert [op for op in sorted(ALLOWED_OPS) if not onnx_parser.supports_operator(op)] == []
