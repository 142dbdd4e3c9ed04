"""The engine inspector's JSON, in the forms that NVIDIA's documents and users' reports of TensorRT 8 to 10 show.

The inspector itself needs a deserialised engine, and so a GPU; these documents are written by hand after those.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from mope_deploy.engines.tensorrt.inspect import check_precision, read_precisions
from mope_deploy.errors import EngineError


def tensor(dtype: str) -> dict[str, Any]:
    return {"Name": "t", "Dimensions": [4, 17, 32], "Format/Datatype": dtype}


def layer(kind: str, *inputs: str, name: str = "l", kernel: str | None = None, **more: Any) -> dict[str, Any]:
    made = {"Name": name, "LayerType": kind, "Inputs": [tensor(t) for t in inputs], "Outputs": [tensor("Float")]}
    return made | ({} if kernel is None else {"TacticName": kernel}) | more


def document(*layers: Any) -> str:
    return json.dumps({"Layers": list(layers), "Bindings": ["pixel_values", "logits"]})


QKV = "main.encoder.blocks.0.attn.qkv/MatMul"
INT8 = "Thirty-two wide channel vectorized row major Int8 format."
CONVOLUTION = {"ParameterType": "Convolution", "Weights": {"Type": "Int8", "Count": 131072}, "Activation": "RELU"}

LAYERS = [
    # TensorRT's own layers
    (layer("MatrixMultiply", "Row major linear FP16 format", "Row major linear FP16 format"), "float16"),
    (layer("MatrixMultiply", "Row major linear FP32", "Row major linear FP32"), "float32"),
    (layer("CaskConvolution", INT8, **CONVOLUTION), "int8"),
    (layer("CaskConvolution", "N/A due to dynamic shapes", Weights={"Type": "Half", "Count": 9}), "float16"),
    (layer("FullyConnected", "Row major linear BFloat16 format"), "bfloat16"),
    # its compiler's
    (layer("gemm", "Half", "Half", name=f"{QKV}_myl0_2", kernel="sm80_xmma_gemm_f16f16_f16f16_f16_tn_n"), "float16"),
    (layer("gemm", "BFloat16", "BFloat16"), "bfloat16"),
    (layer("gemm", "BF16", "Float", name="x_myl0_1"), "bfloat16"),  # the residual is float
    (layer("kgen", "Half", "Half", "Half", name="_gemm_mha_v2_myl0_5"), "float16"),
    (layer("kgen", "Float", name=f"{QKV}+main.encoder.blocks.0.attn.qkv/Add"), "float32"),
    # the kernel knows better than the tensors: quantised inside, or multiplied as TF32
    (layer("fusion", "Half", "Half", kernel="sm80_xmma_gemm_i8i8_i8i32_f32_tn_n_tilesize128x128"), "int8"),
    (layer("gemm", "Float", "Float", kernel="sm80_xmma_gemm_f32f32_tf32f32_f32_tn_n"), "float32"),
    (layer("fusion", "Float", kernel="sm89_xmma_gemm_e4m3e4m3_e4m3f32_f32_tn"), "float8"),
]


@pytest.mark.parametrize(("one", "dtype"), LAYERS, ids=[f"{i}-{dtype}" for i, (_, dtype) in enumerate(LAYERS)])
def test_types_of_matrix_layers(one: dict[str, Any], dtype: str) -> None:
    assert read_precisions(document(one)) == {dtype: 1}


@pytest.mark.parametrize(
    "one",
    [
        layer("kgen", "Half", name="__myl_CastMulAddMean_myl0_1"),
        layer("Reformat", "Half", name=f"Reformatting CopyNode for Input Tensor 0 to {QKV}"),
        layer("NoOp", "Half", name=f"Reformatting CopyNode for Output Tensor 0 to {QKV}"),
        layer("Shuffle", "Half", name="gemm_transpose"),
        layer(
            "kgen", "Half", name="complementary.text.backbone.encoder.encoder.layer.0.attention.output.LayerNorm/Add"
        ),
        layer("Convert", "Half", name="to_half"),
        layer("gemm", "Int64", "Bool"),
        layer("gemm", name="no inputs told"),
    ],
)
def test_layers_that_say_nothing_of_a_product(one: dict[str, Any]) -> None:
    assert read_precisions(document(one)) == {}


def test_a_whole_engine() -> None:
    assert read_precisions(document(*(one for one, _ in LAYERS), "a name alone")) == {
        "float16": 4,
        "float32": 3,
        "int8": 2,
        "bfloat16": 3,
        "float8": 1,
    }


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"Layers": [QKV, "softmax"], "Bindings": ["logits"]}),  # LAYER_NAMES_ONLY
        json.dumps({"Layers": "none", "Bindings": []}),
        json.dumps([layer("gemm", "Half")]),
        json.dumps({"Layers": [{"Name": None, "LayerType": 3, "Inputs": "gemm"}]}),
        "",
        "{",
        "null",
        "[" * 100_000,
    ],
)
def test_what_tells_no_types_is_no_finding(text: str) -> None:
    assert read_precisions(text) == {}


def test_control_characters_in_metadata() -> None:
    text = document(layer("gemm", "Half", Metadata="[ONNX Layer: a]SEPARATOR[ONNX Layer: b]"))
    assert read_precisions(text.replace("SEPARATOR", "\x1e")) == {"float16": 1}


@pytest.mark.parametrize(
    ("found", "declared", "words"),
    [
        ({"float32": 7}, "fp16", "called fp16 and computes in something else; received matrix layers: 7 of float32"),
        (
            {"float32": 2, "float16": 1},
            "bf16",
            "received matrix layers: 1 of float16, 2 of float32; expected some of bf",
        ),
        ({"float16": 3}, "int8", "received matrix layers: 3 of float16; expected some of int8"),
        ({"float16": 3}, "fp32", "expected some of float32"),
    ],
)
def test_an_engine_that_is_something_else(found: dict[str, int], declared: str, words: str) -> None:
    with pytest.raises(EngineError) as caught:
        check_precision(found, declared, "m.engine")
    assert str(caught.value).startswith("m.engine is called")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("found", "declared"),
    [
        ({"float16": 1, "float32": 90}, "fp16"),  # layers may be kept higher on purpose
        ({"int8": 8, "float16": 20}, "int8"),
        ({"float32": 9}, "fp32"),
        ({}, "fp16"),  # names alone prove nothing, and refute nothing
    ],
)
def test_an_engine_that_is_what_it_says(found: dict[str, int], declared: str) -> None:
    check_precision(found, declared, "m.engine")
