"""NVIDIA's own parser and compiler take every lowered file, at the precision it was asked for."""

from __future__ import annotations

import pytest
import tensorrt_rtx as trt

from mope_deploy.engines.tensorrt.backends import open_backend
from mope_deploy.engines.tensorrt.log import shared_log
from mope_deploy.engines.tensorrt.worker import _precision
from tests.export.precision.conftest import AllLowered
from tests.export.rtx import parse_and_build

# 24 linear layers, 8 products of attention and a patch embedding; bf16 leaves that one in fp32
CASES = [("dense", "fp16", 33), ("top2", "bf16", 32), ("top1", "fp16", 33), ("top1", "int8", 0), ("dense", "int8", 0)]
NAMES = {"fp16": "float16", "bf16": "bfloat16"}


@pytest.mark.parametrize(("kind", "precision", "halves"), CASES)
def test_builds_at_the_precision_of_the_file(kind: str, precision: str, halves: int, lowered: AllLowered) -> None:
    case = lowered[kind, precision]
    assert parse_and_build(case.file, longest=40) == []
    log = shared_log(open_backend("tensorrt_rtx"))
    network = trt.Builder(log.logger).create_network(0)
    assert trt.OnnxParser(network, log.logger).parse_from_file(str(case.file))
    found = _precision(trt, network, precision)
    if precision == "int8":
        # In 2 layers each a Q and a DQ for every activation: 5 of the ViT, whose keys and values share one, and 4 of
        # the BERT, where queries share it as well. A DQ for every weight.
        assert found["quantised"] == 2 * 2 * (5 + 4) + 24
    else:
        assert found["products"][NAMES[precision]] == halves
        assert set(found["products"]) == {NAMES[precision], "float32"}
        assert found["quantised"] == 0


def test_a_graph_of_another_precision_is_told_apart(lowered: AllLowered) -> None:
    from mope_deploy.errors import EngineError

    log = shared_log(open_backend("tensorrt_rtx"))
    network = trt.Builder(log.logger).create_network(0)
    assert trt.OnnxParser(network, log.logger).parse_from_file(str(lowered["dense", "fp16"].export.file))
    with pytest.raises(EngineError, match="is called fp16"):
        _precision(trt, network, "fp16")
