"""fp16 and bf16: what is half, what stays fp32, and that the copy which the gate runs rounds as half does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator

from export.precision import lowering
from export.precision.half import HalfLowering
from mope_deploy.errors import ExportError
from tests.export.precision.conftest import (
    B0,
    ROUTED,
    AllLowered,
    hand_made,
    one_layer,
    product_types,
    relative,
    types,
)
from tests.export.runtime import feeds, run

HALF = {"fp16": "FLOAT16", "bf16": "BFLOAT16"}
TEXT = "complementary.text.backbone.encoder.encoder.layer"
BOUND = {"fp16": 0.015, "bf16": 0.05}


def inside_encoder(name: str) -> bool:
    return name.startswith(("main.encoder.", "complementary.text.backbone."))


@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize("kind", ROUTED)
def test_products_are_half_and_the_rest_is_not(kind: str, precision: str, lowered: AllLowered) -> None:
    file = lowered[kind, precision].file
    products, kinds = product_types(file), types(file)
    encoders = {type for name, type in products.items() if inside_encoder(name) and "patch_embed" not in name}
    assert encoders == {HALF[precision]}
    # Conv knows no bf16 before opset 22.
    assert products["main.encoder.patch_embed.proj/Conv"] == ("FLOAT16" if precision == "fp16" else "FLOAT")
    assert {type for name, type in products.items() if not inside_encoder(name)} == {"FLOAT"}
    graph = onnx.load(file).graph
    assert {v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)} == {
        TensorProto.FLOAT,
        TensorProto.INT64,
    }
    for node in graph.node:
        floats = {kinds[name] for name in (*node.input, *node.output) if "FLOAT" in kinds[name]}
        if node.op_type in ("Softmax", "LayerNormalization") or node.name.startswith(("layers.", "mappers.", "head.")):
            assert floats <= {"FLOAT"} or node.op_type == "Cast", node.name
        if node.op_type == "Add" and f"{TEXT}.0.attention.self/" in node.name and "FLOAT" in floats:
            assert floats == {"FLOAT"}  # the additive mask, whose float32.min no half holds
    undone = {
        o for node in graph.node if node.op_type == "Cast" and "FLOAT" in kinds[node.input[0]] for o in node.output
    }
    assert not any(node.op_type == "Cast" and node.input[0] in undone for node in graph.node)


@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize("kind", ROUTED)
def test_weights_are_stored_once_at_their_final_type(kind: str, precision: str, lowered: AllLowered) -> None:
    case = lowered[kind, precision]
    before = {tensor.name: tensor for tensor in case.export.proto().graph.initializer}
    after = {tensor.name: tensor for tensor in onnx.load(case.file).graph.initializer}
    large = {name for name, tensor in before.items() if np.prod(tensor.dims) > 1}
    assert large == {name for name, tensor in after.items() if np.prod(tensor.dims) > 1}
    weight = "main.encoder.blocks.0.attn.k_proj.weight.T"
    assert len(after[weight].raw_data) * 2 == len(before[weight].raw_data)
    halves = {name for name, tensor in after.items() if tensor.data_type != before.get(name, tensor).data_type}
    assert "complementary.text.backbone.encoder.embeddings.word_embeddings.weight" in halves
    assert all(inside_encoder(name) for name in halves & large)
    matrices = sum(len(before[name].raw_data) for name in large if inside_encoder(name) and len(before[name].dims) == 2)
    saved = sum(len(t.raw_data) for t in before.values()) - sum(len(t.raw_data) for t in after.values())
    assert saved >= matrices / 2


@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize("kind", ROUTED)
def test_computes_nearly_what_fp32_does(kind: str, precision: str, lowered: AllLowered) -> None:
    case = lowered[kind, precision]
    for batch, length in ((1, 3), (7, 11)):
        wanted, found = (run(file, feeds(batch, length, seed=5)) for file in (case.export.file, case.runnable))
        if kind == "top1":  # one expert chosen otherwise changes a sample as a whole: by rows, and most are near
            same = (found[1].argmax(-1) == wanted[1].argmax(-1)).all(-1)
            assert same.mean() > 0.5
            found, wanted = [a[same] for a in found], [a[same] for a in wanted]
        assert 1e-5 < relative(found[0], wanted[0]) < BOUND[precision]
        assert relative(found[1], wanted[1]) < 4 * BOUND[precision]


@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize("kind", ROUTED)
def test_padding_and_batch_mates_change_nothing(kind: str, precision: str, lowered: AllLowered) -> None:
    case = lowered[kind, precision]
    inputs = feeds(5, 6, seed=3)
    longer = {name: np.pad(a, ((0, 0), (0, 9))) if a.ndim == 2 else a for name, a in inputs.items()}
    (logits, _), (padded, _) = run(case.runnable, inputs), run(case.runnable, longer)
    alone = np.concatenate([run(case.runnable, {n: a[i : i + 1] for n, a in longer.items()})[0] for i in range(5)])
    assert np.isfinite(logits).all()
    assert relative(padded, logits) < BOUND[precision] / 2
    assert relative(alone, padded) < BOUND[precision] / 2


def test_the_copy_rounds_as_half_arithmetic_does(lowered: AllLowered) -> None:
    """The oracle is onnx's own evaluator: numpy in float16, operator by operator."""
    case = lowered["dense", "fp16"]
    inputs = feeds(13, 7, seed=2)
    truth = run(case.export.file, inputs)[0]
    (oracle, _), copy = ReferenceEvaluator(str(case.file)).run(None, inputs), run(case.runnable, inputs)[0]
    file = run(case.file, inputs)[0]

    def rms(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.sqrt(np.mean((a - b) ** 2)))

    assert rms(copy, oracle) < rms(oracle, truth) / 2
    # Why there is a copy: ONNX Runtime runs the file itself with fewer roundings than half arithmetic has.
    assert rms(file, truth) < rms(oracle, truth)


def test_the_copy_overflows_where_half_does(tmp_path: Path) -> None:
    weight, bias = np.full((4, 3), 3e4, np.float32), np.array([0, 1, -9e4 / 2], np.float32)
    low = lowering(one_layer(tmp_path, weight=weight, bias=bias), "fp16")
    inputs = {"x": np.full((2, 4), 10, np.float32), "flags": np.ones((2, 4), np.int64)}
    (file,), (copy,) = low.write(tmp_path / "a.onnx"), low.write_runnable(tmp_path / "b.onnx")
    assert np.isnan(run(copy, inputs)[0]).all()
    assert np.isfinite(run(file, inputs)[0]).all()  # on a CPU the file would have passed
    (kept,) = (
        low.write_runnable(tmp_path / "c.onnx", keep=[f"{B0}.attn"]) if f"{B0}.attn" in low.products(B0) else (copy,)
    )
    assert np.isnan(run(kept, inputs)[0]).all()


@pytest.mark.parametrize("precision", HALF)
def test_keeps_layers_and_products_in_fp32(precision: str, lowered: AllLowered, tmp_path: Path) -> None:
    case = lowered["dense", precision]
    keep = {"main.encoder.blocks.1", f"{TEXT}.0.intermediate.dense", "main.encoder.blocks.0.attn"}
    (file,) = case.lowering.write(tmp_path / "kept.onnx", keep=keep)
    for name, type in product_types(file).items():
        if inside_encoder(name) and "patch_embed" not in name:
            module = name.rpartition("/")[0]
            kept = module in keep or module.startswith("main.encoder.blocks.1.")
            assert type == ("FLOAT" if kept else HALF[precision]), name
    stored = {tensor.name: tensor.data_type for tensor in onnx.load(file).graph.initializer}
    assert stored["main.encoder.blocks.1.attn.k_proj.weight.T"] == TensorProto.FLOAT
    assert stored["main.encoder.blocks.0.attn.k_proj.weight.T"] != TensorProto.FLOAT
    inputs = feeds(4, 7)
    truth = run(case.export.file, inputs)[0]
    (copy,) = case.lowering.write_runnable(tmp_path / "copy.onnx", keep=keep)
    assert 0 < relative(run(copy, inputs)[0], truth) < BOUND[precision]


@pytest.mark.parametrize("precision", HALF)
def test_everything_kept_is_an_error(precision: str, lowered: AllLowered, tmp_path: Path) -> None:
    low = lowered["dense", precision].lowering
    with pytest.raises(ExportError, match="nothing would be"):
        low.write(tmp_path / "a.onnx", keep=low.layers)
    assert not list(tmp_path.iterdir())


LAYER = f"{B0}.attn"
STEM = B0.replace(".", "__")


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_a_product_whose_weight_half_cannot_hold_stays_fp32_and_is_named(tmp_path: Path, scale: float) -> None:
    body = "p = MatMul(x, B0__fc__weight__T) s = Softmax(p) y = MatMul(s, B0__out__weight__T)".replace("B0", STEM)
    eye = np.eye(4, dtype=np.float32)
    weights = {f"{STEM}__fc__weight__T": eye, f"{STEM}__out__weight__T": eye * np.float32(scale)}
    names = {"p": f"{B0}.fc/MatMul", "s": f"{LAYER}/Softmax", "y": f"{B0}.out/MatMul"}
    low = lowering(hand_made(tmp_path, body, weights, names=names), "fp16")
    assert low.unfit == (f"{B0}.out",)
    (file,) = low.write(tmp_path / "a.onnx")
    stored = {t.name: t.data_type for t in onnx.load(file).graph.initializer}
    assert set(stored.values()) == {TensorProto.FLOAT, TensorProto.FLOAT16}


def test_constants_that_half_cannot_hold_keep_their_operator_in_fp32(tmp_path: Path) -> None:
    body = """p = MatMul(x, B0__fc__weight__T) z = Equal(flags, zero) m = Where(z, low, p) s = Softmax(m)
        q = MatMul(s, B0__out__weight__T) e = Add(q, epsilon) d = Div(q, e) h = Mul(q, two) y = Add(d, h)"""
    weights = {
        f"{STEM}__fc__weight__T": np.eye(4, dtype=np.float32),
        f"{STEM}__out__weight__T": np.arange(16, dtype=np.float32).reshape(4, 4) / 8,
        "low": np.float32(np.finfo(np.float32).min),
        "epsilon": np.float32(1e-9),
        "two": np.float32(2),
        "zero": np.int64(0),
    }
    names = {"p": f"{B0}.fc/MatMul", "q": f"{B0}.out/MatMul"} | {n: f"{LAYER}/{n}" for n in "zmsedhy"}
    made = hand_made(tmp_path, body.replace("B0", STEM), weights, names=names)
    for precision in HALF:
        low = lowering(made, precision)
        (file,), (copy,) = low.write(tmp_path / "a.onnx"), low.write_runnable(tmp_path / "b.onnx")
        kinds = types(file)
        assert kinds["h"] == HALF[precision]
        assert (kinds["m"], kinds["s"]) == ("FLOAT", "FLOAT")
        # bf16 has the exponents of fp32: an epsilon fits, float32.min rounds to infinity.
        assert kinds["e"] == kinds["d"] == ("FLOAT" if precision == "fp16" else "BFLOAT16")
        inputs = {"x": np.ones((2, 4), np.float32), "flags": np.array([[1, 0, 0, 1], [1, 0, 0, 0]], np.int64)}
        assert np.isfinite(run(copy, inputs)[0]).all()
        values = [numpy_helper.to_array(t) for t in onnx.load(file).graph.initializer]
        assert all(np.isfinite(a.astype(np.float32)).all() for a in values)


def test_a_weight_that_both_sides_use_is_stored_once(tmp_path: Path) -> None:
    body = """p = MatMul(x, B0__fc__weight__T) s = Softmax(p) b = Add(p, shared) f = Cast<to=1>(b)
        g = Add(s, shared) y = Add(f, g)"""
    weights = {f"{STEM}__fc__weight__T": np.eye(4, dtype=np.float32), "shared": np.arange(4, dtype=np.float32) / 3}
    names = {"p": f"{B0}.fc/MatMul", "s": f"{LAYER}/Softmax", "b": f"{B0}.fc/Add"}
    low = lowering(hand_made(tmp_path, body.replace("B0", STEM), weights, names=names), "fp16")
    (file,) = low.write(tmp_path / "a.onnx")
    stored = {t.name: (t.data_type, tuple(t.dims)) for t in onnx.load(file).graph.initializer}
    assert stored["shared"] == (TensorProto.FLOAT, (4,))
    assert [name for name, (_, dims) in stored.items() if dims == (4,)] == ["shared"]
    assert types(file)["b"] == "FLOAT16"


def test_outputs_stay_fp32_where_the_encoder_makes_them(tmp_path: Path) -> None:
    body = "a = Softmax(x) y = MatMul(a, B0__fc__weight__T)"
    weights = {f"{STEM}__fc__weight__T": np.eye(4, dtype=np.float32) / 3}
    names = {"a": f"{LAYER}/Softmax", "y": f"{B0}.fc/MatMul"}
    made = hand_made(tmp_path, body.replace("B0", STEM), weights, names=names)
    low = lowering(made, "fp16")
    inputs = {"x": np.ones((2, 4), np.float32), "flags": np.ones((2, 4), np.int64)}
    for file in (*low.write(tmp_path / "a.onnx"), *low.write_runnable(tmp_path / "b.onnx")):
        assert types(file)["y"] == "FLOAT"
        (found,) = run(file, inputs)
        assert found.dtype == np.float32
        assert np.array_equal(found, np.float16(found))
        assert 0 < np.abs(found - run(made, inputs)[0]).max() < 1e-4


def test_refuses_what_is_no_fp32_graph_of_encoders(lowered: AllLowered, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"not an fp32 graph; received FLOAT16"):
        HalfLowering(lowered["dense", "fp16"].file, "fp16")
    weights = {"w": np.eye(4, dtype=np.float32)}
    with pytest.raises(ExportError, match="no encoder layer"):
        HalfLowering(hand_made(tmp_path, "y = MatMul(x, w)", weights, names={}), "fp16")
    model = onnx.load(hand_made(tmp_path, "p = Custom(x) y = MatMul(p, w)", weights, names={}))
    model.graph.node[0].domain = "elsewhere"
    model.opset_import.append(onnx.helper.make_opsetid("elsewhere", 1))
    onnx.save(model, tmp_path / "unknown.onnx")
    with pytest.raises(ExportError, match="type"):
        HalfLowering(tmp_path / "unknown.onnx", "fp16")
