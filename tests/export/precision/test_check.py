"""The check of a lowered file bites: each file here was altered after it was written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

from export.graph.files import read, write
from export.precision.check import check_types
from export.precision.layout import layout
from mope_deploy.errors import ExportError
from tests.export.precision.conftest import LOWERED, AllLowered

KEY = "main.encoder.blocks.0.attn.k_proj"
Graph = onnx.GraphProto


def node(graph: Graph, name: str) -> NodeProto:
    (found,) = [n for n in graph.node if n.name == name]
    return found


def replace(graph: Graph, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    (tensor,) = [t for t in graph.initializer if t.name == name]
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)), name))


def maker(graph: Graph, value: str) -> NodeProto:
    (found,) = [n for n in graph.node if value in n.output]
    return found


def cast_around(graph: Graph, at: NodeProto, to: int, back: int) -> None:
    """Compute ``at`` in type ``to``, its result cast back."""
    place = list(graph.node).index(at)
    inside = []
    for i, name in enumerate(list(at.input)):
        inside.append(helper.make_node("Cast", [name], [f"{name}.{i}.tampered"], name=f"tampered/{i}", to=to))
        at.input[i] = f"{name}.{i}.tampered"
    result = at.output[0]
    at.output[0] = f"{result}.tampered"
    graph.node.insert(place + 1, helper.make_node("Cast", [at.output[0]], [result], name="tampered/back", to=back))
    for cast in reversed(inside):
        graph.node.insert(place, cast)


def product_in_fp32(graph: Graph) -> None:
    cast_around(graph, node(graph, f"{KEY}/MatMul"), TensorProto.FLOAT, TensorProto.FLOAT16)


def attention_in_fp32(graph: Graph) -> None:
    cast_around(graph, node(graph, "main.encoder.blocks.0.attn/MatMul_2"), TensorProto.FLOAT, TensorProto.FLOAT16)


def softmax_in_half(graph: Graph) -> None:
    cast_around(graph, node(graph, "main.encoder.blocks.0.attn/Softmax"), TensorProto.FLOAT16, TensorProto.FLOAT)


def norm_in_half(graph: Graph) -> None:
    at = node(graph, "main.encoder.blocks.0.norm1/LayerNormalization")
    cast_around(graph, at, TensorProto.FLOAT16, TensorProto.FLOAT)


def router_in_half(graph: Graph) -> None:
    cast_around(graph, node(graph, "layers.0.router/MatMul"), TensorProto.FLOAT16, TensorProto.FLOAT)


def head_in_half(graph: Graph) -> None:
    cast_around(graph, node(graph, "head.classifier/Gemm"), TensorProto.FLOAT16, TensorProto.FLOAT)


def needless_casts(graph: Graph) -> None:
    at = node(graph, f"{KEY}/MatMul")
    place = list(graph.node).index(at)
    there = helper.make_node("Cast", [at.input[0]], ["there"], name="tampered/there", to=TensorProto.FLOAT)
    back = helper.make_node("Cast", ["there"], ["back"], name="tampered/back", to=TensorProto.FLOAT16)
    at.input[0] = "back"
    graph.node.insert(place, back)
    graph.node.insert(place, there)


def weight_twice(graph: Graph) -> None:
    (tensor,) = [t for t in graph.initializer if t.name == f"{KEY}.weight.T"]
    copy = numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), "copy")
    graph.initializer.append(copy)


def half_output(graph: Graph) -> None:
    at = node(graph, "head.classifier/Gemm")
    at.output[0] = "logits.wide"
    graph.node.append(
        helper.make_node("Cast", ["logits.wide"], ["logits"], name="tampered/out", to=TensorProto.FLOAT16)
    )
    graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16


def another_type(graph: Graph) -> None:
    place = list(graph.node).index(node(graph, "head.classifier/Gemm"))
    value = graph.node[place].input[0]
    graph.node.insert(place, helper.make_node("Cast", [value], ["spare"], name="tampered/bf", to=TensorProto.BFLOAT16))


FP16 = {
    product_in_fp32: rf"MatMul at '{KEY}/MatMul' multiplies .*received FLOAT; expected FLOAT16",
    attention_in_fp32: r"MatMul at 'main.encoder.blocks.0.attn/MatMul_2' .*received FLOAT; expected FLOAT16",
    softmax_in_half: r"Softmax at 'main.encoder.blocks.0.attn/Softmax' should have stayed fp32",
    norm_in_half: r"LayerNormalization at 'main.encoder.blocks.0.norm1/LayerNormalization' should have stayed fp32",
    router_in_half: r"MatMul at 'layers.0.router/MatMul' should have stayed fp32",
    head_in_half: r"Gemm at 'head.classifier/Gemm' should have stayed fp32",
    needless_casts: r"Cast at 'tampered/\w+' casts what was cast",
    weight_twice: rf"the weight '{KEY}.weight.T' is stored twice; received the same numbers in 'copy'",
    half_output: r"'logits', an input or output",
    another_type: r"'spare' in a file called FLOAT16; received BFLOAT16",
}


def weight_dequantised_along_rows(graph: Graph) -> None:
    at = maker(graph, node(graph, f"{KEY}/MatMul").input[1])
    del at.attribute[:]
    at.attribute.append(helper.make_attribute("axis", 0))
    for name in at.input[1:]:
        replace(graph, name, lambda a: a[:32])  # as many scales as that axis has: a valid graph


def weight_per_tensor(graph: Graph) -> None:
    at = maker(graph, node(graph, f"{KEY}/MatMul").input[1])
    del at.attribute[:]
    for name in at.input[1:]:
        replace(graph, name, lambda a: a[0])


def zero_point(graph: Graph) -> None:
    replace(graph, maker(graph, node(graph, f"{KEY}/MatMul").input[0]).input[2], lambda a: a + np.int8(3))


def asymmetric_codes(graph: Graph) -> None:
    replace(
        graph,
        maker(graph, node(graph, f"{KEY}/MatMul").input[1]).input[0],
        lambda a: np.where(a == -127, -128, a).astype(np.int8),
    )


def no_step(graph: Graph) -> None:
    replace(graph, maker(graph, node(graph, f"{KEY}/MatMul").input[1]).input[1], lambda a: a * 0)


def activation_in_fp32(graph: Graph) -> None:
    at = node(graph, f"{KEY}/MatMul")
    at.input[0] = maker(graph, maker(graph, at.input[0]).input[0]).input[0]


def attention_quantised(graph: Graph) -> None:
    at = node(graph, "main.encoder.blocks.0.attn/MatMul_2")
    pair = maker(graph, node(graph, f"{KEY}/MatMul").input[0])
    place = list(graph.node).index(at)
    coded = helper.make_node("QuantizeLinear", [at.input[0], *pair.input[1:]], ["coded"], name="tampered/Quantize")
    back = helper.make_node("DequantizeLinear", ["coded", *pair.input[1:]], ["back"], name="tampered/Dequantize")
    at.input[0] = "back"
    graph.node.insert(place, back)
    graph.node.insert(place, coded)


def int8_weight_twice(graph: Graph) -> None:
    graph.initializer.append(numpy_helper.from_array(np.ones((32, 32), np.float32), f"{KEY}.weight.T"))


def scale_of_another(graph: Graph) -> None:
    at = maker(graph, node(graph, f"{KEY}/MatMul").input[0])
    graph.initializer.append(numpy_helper.from_array(np.float32(0.5), "other"))
    at.input[1] = "other"


def half_tensor(graph: Graph) -> None:
    cast_around(graph, node(graph, "main.encoder.blocks.0.attn/MatMul_2"), TensorProto.FLOAT16, TensorProto.FLOAT)


INT8 = {
    weight_dequantised_along_rows: r"DequantizeWeight' is not per output channel; received axis 0.*expected axis 1",
    weight_per_tensor: r"DequantizeWeight' is not per output channel",
    zero_point: r"is not symmetric: its zero-point; received INT8 \[3\]; expected INT8 0",
    asymmetric_codes: r"has codes that are not symmetric; received -128",
    no_step: r"has a scale that is no step",
    activation_in_fp32: rf"MatMul at '{KEY}/MatMul' multiplies an activation that is not quantised",
    attention_quantised: r"at 'tampered/\w+' quantises something that was to stay fp32",
    int8_weight_twice: rf"the weight '{KEY}.weight.T' is stored twice",
    scale_of_another: r"undoes another quantisation",
    half_tensor: r"in a file called int8; received FLOAT16",
}


def tampered(file: Path, folder: Path, change: Callable[[Graph], None]) -> Path:
    model = onnx.load(file)
    del model.graph.value_info[:]
    change(model.graph)
    onnx.save(model, folder / "tampered.onnx")
    return folder / "tampered.onnx"


@pytest.mark.parametrize("precision", LOWERED)
def test_a_file_as_written_passes_and_is_counted(precision: str, lowered: AllLowered) -> None:
    found = check_types(lowered["dense", precision].file, precision)
    # 24 linear layers, 8 products of attention, a patch embedding
    assert (
        found
        == {
            "fp16": {"FLOAT16": 33},
            "bf16": {"BFLOAT16": 32, "FLOAT": 1},
            "int8": {"INT8": 24, "FLOAT": 9},
            "int8-dynamic": {"INT8": 24, "FLOAT": 9},
        }[precision]
    )


@pytest.mark.parametrize("change", FP16, ids=lambda change: change.__name__)
def test_fp16_that_is_something_else(change: Callable[[Graph], None], lowered: AllLowered, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=FP16[change]) as error:
        check_types(tampered(lowered["dense", "fp16"].file, tmp_path, change), "fp16")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", INT8, ids=lambda change: change.__name__)
def test_int8_that_is_something_else(change: Callable[[Graph], None], lowered: AllLowered, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=INT8[change]) as error:
        check_types(tampered(lowered["dense", "int8"].file, tmp_path, change), "int8")
    assert "\n" not in str(error.value)


def test_a_file_under_another_name_is_refused(lowered: AllLowered) -> None:
    canonical = lowered["dense", "fp16"].export.file
    assert check_types(canonical, "fp32") == {"FLOAT": 33}
    for precision in LOWERED:
        with pytest.raises(ExportError):  # fp32 throughout, sold as something smaller
            check_types(canonical, precision)
        for other in ("fp32", *LOWERED):
            if other != precision:
                with pytest.raises(ExportError):
                    check_types(lowered["dense", precision].file, other)


def test_what_was_to_be_kept_must_be_kept(lowered: AllLowered, tmp_path: Path) -> None:
    for precision in LOWERED:
        with pytest.raises(ExportError, match=rf"{KEY}"):
            check_types(lowered["dense", precision].file, precision, keep=[KEY])
        file = tmp_path / f"{precision}.onnx"
        lowered["dense", precision].lowering.write(file, keep=[KEY])
        check_types(file, precision, keep=[KEY])
        with pytest.raises(ExportError, match=rf"{KEY}"):
            check_types(file, precision)


def test_a_linear_layer_gone_from_the_file_is_noticed(lowered: AllLowered, tmp_path: Path) -> None:
    case = lowered["dense", "fp16"]
    source = layout(read(case.export.file).graph)
    model = read(case.file)
    for n in model.graph:
        if n.name == f"{KEY}/MatMul":
            n.name = "elsewhere/MatMul"
    write(model, tmp_path / "renamed.onnx")
    check_types(case.file, "fp16", source=source)
    with pytest.raises(ExportError, match=rf"the linear layer '{KEY}' is gone"):
        check_types(tmp_path / "renamed.onnx", "fp16", source=source)


def test_large_weights_go_beside_the_graph(lowered: AllLowered, tmp_path: Path) -> None:
    case = lowered["dense", "fp16"]
    files = write(read(case.file), tmp_path / "apart.onnx", embed_limit=10_000)
    assert [file.name for file in files] == ["apart.onnx", "apart.onnx.data"]
    assert check_types(files[0], "fp16") == check_types(case.file, "fp16")
