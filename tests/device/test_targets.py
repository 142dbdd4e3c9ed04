"""Presets of devices: each takes what we emit, and refuses what its library or its GPU lacks, by name."""

from __future__ import annotations

import pytest

from mope_deploy.engines.tensorrt.profiles import Sizes
from mope_deploy.errors import ExportError, UsageError
from mope_deploy.manifest import PRECISIONS
from mope_deploy.targets import TARGETS, get_target

pytestmark = pytest.mark.device

EMITTED = ("MatMul", "LayerNormalization", "TopK", "Gather", "Softmax", "QuantizeLinear", "DequantizeLinear")

# target → an operator, an opset and a precision that it lacks, each with what the message must say about it
LACKS: dict[str, tuple[tuple[str, str], int, tuple[str, str]]] = {
    "cpu": (("Attention", "ONNX Runtime 1.18 does not have"), 22, ("bf16", "no bfloat16 MatMul")),
    "rtx": (("DynamicQuantizeLinear", "--precision int8"), 24, ("int8-dynamic", "use int8, which calibrates")),
    "server": (("Attention", "from 10.14 on"), 21, ("int8-dynamic", "use int8, which calibrates")),
    "orin-nano": (("RMSNormalization", "from 10.15 on"), 21, ("fp8", "compute capability 8.7 and FP8 needs 8.9")),
    "orin-nx": (("Attention", "from 10.14 on"), 22, ("fp8", "compute capability 8.7 and FP8 needs 8.9")),
    "orin-agx": (("Einsum", "MatMul and Transpose"), 23, ("fp4", "compute capability 8.7 and FP4 needs 10.0")),
    "thor": (("RMSNormalization", "from 10.15 on"), 23, ("int8-dynamic", "use int8, which calibrates")),
}


def test_the_presets_are_those_promised() -> None:
    assert list(TARGETS) == ["cpu", "rtx", "server", "orin-nano", "orin-nx", "orin-agx", "thor"] == list(LACKS)


@pytest.mark.parametrize("name", TARGETS)
def test_takes_what_it_is_for(name: str) -> None:
    target = TARGETS[name]
    for opset in (target.opset, target.opsets.start, target.opsets.stop - 1):
        target.check(opset=opset, precisions=target.precisions, ops=EMITTED)
    assert set(target.default_precisions) <= set(target.precisions) <= set(PRECISIONS)
    assert target.opset in target.opsets
    Sizes.parse(target.batch, axis="batch")
    assert target.text_length is None or Sizes.parse(target.text_length, axis="text_length")
    assert not target.ops or not target.ops & set(target.refused)
    assert not set(target.lacks) & set(target.precisions)


@pytest.mark.parametrize("name", TARGETS)
def test_refuses_an_operator_that_it_lacks(name: str) -> None:
    target, (op, words) = TARGETS[name], LACKS[name][0]
    with pytest.raises(ExportError) as caught:
        target.check(opset=18, precisions=["fp32"], ops=[*EMITTED, op])
    assert f"--target {name} ({target.runs}) does not take {op}: " in str(caught.value)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", TARGETS)
def test_refuses_an_opset_that_it_lacks(name: str) -> None:
    target, opset = TARGETS[name], LACKS[name][1]
    for wrong in (opset, 16):
        with pytest.raises(UsageError) as caught:
            target.check(opset=wrong, precisions=["fp32"], ops=EMITTED)
        assert f"received {wrong}; expected 17 to {target.opsets.stop - 1}" in str(caught.value)
        assert target.runs in str(caught.value)
    target.check(opset=min(opset - 1, 20), precisions=["fp32"], ops=EMITTED)


@pytest.mark.parametrize("name", TARGETS)
def test_refuses_a_precision_that_it_lacks(name: str) -> None:
    target, (precision, words) = TARGETS[name], LACKS[name][2]
    with pytest.raises(UsageError) as caught:
        target.check(opset=18, precisions=["fp32", precision], ops=EMITTED)
    assert f"for --target {name}; received {precision}; expected one of fp32" in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize("name", [name for name in TARGETS if name.startswith("orin")])
@pytest.mark.parametrize("precision", ["fp8", "fp4"])
def test_no_orin_has_fp8_or_fp4(name: str, precision: str) -> None:
    with pytest.raises(UsageError, match=f"compute capability 8.7 and {precision.upper()} needs"):
        TARGETS[name].check(opset=18, precisions=[precision])


def test_a_device_that_has_fp8_is_not_said_to_lack_it() -> None:
    with pytest.raises(UsageError, match="mope-export writes no fp8"):
        TARGETS["thor"].check(opset=18, precisions=["fp8"])


def test_operators_of_onnx_runtime_s_own_are_for_it_alone() -> None:
    TARGETS["cpu"].check(opset=18, precisions=["fp32"], ops=["com.microsoft.Attention"])
    for name in [name for name in TARGETS if name != "cpu"]:
        with pytest.raises(ExportError, match=r"com\.microsoft\.Attention: no standard operator"):
            TARGETS[name].check(opset=18, precisions=["fp32"], ops=["com.microsoft.Attention"])
    with pytest.raises(ExportError, match="no standard operator"):
        TARGETS["cpu"].check(opset=18, precisions=["fp32"], ops=["somebody.Attention"])


def test_names_the_first_three_and_counts_the_rest() -> None:
    with pytest.raises(ExportError) as caught:
        TARGETS["server"].check(opset=18, precisions=["fp32"], ops=["NonZero", "Det", "Loop", "Unique", "Add", "Det"])
    assert "Det: not among" in str(caught.value)
    assert "Unique" not in str(caught.value)
    assert str(caught.value).endswith("; and 1 more")


def test_unknown_names() -> None:
    assert get_target("thor") is TARGETS["thor"]
    with pytest.raises(UsageError, match="did you mean 'orin-nano'") as caught:
        get_target("orin_nano")
    assert caught.value.exit_code == 2
    with pytest.raises(UsageError, match="did you mean 'fp16'"):
        TARGETS["cpu"].check(opset=18, precisions=["fp61"])
