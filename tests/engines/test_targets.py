"""The presets of devices against what the exporter may emit, and against NVIDIA's own parser."""

from __future__ import annotations

import onnx
import pytest

from export.graph.lint import ALLOWED_OPS
from export.limits import OPSETS
from mope_deploy.engines.tensorrt.backends import open_backend
from mope_deploy.engines.tensorrt.log import shared_log
from mope_deploy.errors import ExportError
from mope_deploy.targets import TARGETS


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_takes_all_that_the_lint_lets_through(name: str) -> None:
    for opset in OPSETS:
        TARGETS[name].check(opset=opset, precisions=["fp32"], ops=ALLOWED_OPS)


def parses(body: str, opset: int) -> bool:
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]> g {body}')
    backend = open_backend("tensorrt_rtx")
    trt, logger = backend.module, shared_log(backend).logger
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    return bool(trt.OnnxParser(network, logger).parse(model.SerializeToString()))


@pytest.mark.parametrize(
    ("op", "body", "opset"),
    [
        ("RMSNormalization", "(float[2, 8] x, float[8] s) => (float[2, 8] y) { y = RMSNormalization(x, s) }", 23),
        ("LayerNormalization", "(float[2, 8] x, float[8] s) => (float[2, 8] y) { y = LayerNormalization(x, s) }", 17),
        (
            "DynamicQuantizeLinear",
            "(float[2] x) => (uint8[2] y, float s, uint8 z) { y, s, z = DynamicQuantizeLinear(x) }",
            18,
        ),
        ("MatMulInteger", "(int8[2, 8] a, int8[8, 2] b) => (int32[2, 2] y) { y = MatMulInteger(a, b) }", 18),
        ("NonZero", "(float[2, 8] x) => (int64[2, n] y) { y = NonZero(x) }", 18),
        (
            "Einsum",
            '(float[2, 8] a, float[8, 2] b) => (float[2, 2] y) { y = Einsum <equation = "ij,jk->ik"> (a, b) }',
            18,
        ),
    ],
)
def test_the_rtx_preset_agrees_with_the_parser(op: str, body: str, opset: int) -> None:
    target = TARGETS["rtx"]
    if parses(body, opset):
        target.check(opset=opset, precisions=["fp32"], ops=[op])
    else:
        with pytest.raises(ExportError, match=op):
            target.check(opset=opset, precisions=["fp32"], ops=[op])
