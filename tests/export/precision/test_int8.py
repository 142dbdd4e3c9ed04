"""int8 and int8-dynamic against arithmetic written out in numpy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, numpy_helper

from export.graph.lint import check
from export.precision import lowering
from export.precision.calibrate import activation_limits
from export.precision.int8 import Int8Lowering, quantise_weight, scale_of
from mope_deploy.errors import ExportError, UsageError
from tests.export.precision.conftest import (
    ROUTED,
    AllLowered,
    one_layer,
    product_types,
    relative,
)
from tests.export.runtime import Arrays, feeds, run

INT8 = ("int8", "int8-dynamic")
TEXT = "complementary.text.backbone.encoder.encoder.layer"


def samples(*, batches: int = 4, seed: int = 0) -> Iterator[Arrays]:
    random = np.random.default_rng(seed)
    for i in range(batches):
        x = random.standard_normal((50 + i, 4), dtype=np.float32)
        yield {"x": x * np.float32([1, 2, 3, 4]), "flags": np.ones((50 + i, 4), np.int64)}


@pytest.mark.parametrize("gemm", [False, True])
def test_a_quantised_product_is_what_numpy_makes_of_it(gemm: bool, tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    weight = (random.standard_normal((4, 3)) * [0.01, 1, 30]).astype(np.float32)
    bias = random.standard_normal(3).astype(np.float32)
    made = one_layer(tmp_path, weight=weight.T.copy() if gemm else weight, bias=bias, gemm=gemm)
    low = lowering(made, "int8", calibration=samples())
    assert isinstance(low, Int8Lowering)
    (file,) = low.write(tmp_path / "int8.onnx")
    graph = onnx.load(file).graph
    stored = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    largest = max(float(np.abs(feed["x"]).max()) for feed in samples())
    step = float(stored["x.scale"])
    assert step == pytest.approx(low.limits["x"] / 127)
    assert largest * 0.97 < low.limits["x"] <= largest * 1.001
    (dequantise,) = [n for n in graph.node if n.name.endswith("DequantizeWeight")]
    assert onnx.helper.get_attribute_value(dequantise.attribute[0]) == (0 if gemm else 1)

    x = next(iter(samples(seed=9)))["x"]
    codes = np.clip(np.rint(x.astype(np.float64) / step), -128, 127)
    steps = np.abs(weight).max(axis=0) / 127  # one for each output channel, the small one too
    coded = np.rint(weight / steps)
    z = (codes @ coded) * step * steps + bias
    wanted = np.exp(z - z.max(-1, keepdims=True))
    wanted /= wanted.sum(-1, keepdims=True)
    (found,) = run(file, {"x": x, "flags": np.ones(x.shape, np.int64)})
    assert np.abs(found - wanted).max() < 1e-4
    (exact,) = run(made, {"x": x, "flags": np.ones(x.shape, np.int64)})
    assert np.abs(found - exact).max() > 1e-3  # it was quantised


def test_weights_round_to_the_nearest_code_of_their_channel() -> None:
    weight = np.array([[1.0, 0.0, -0.02], [-0.5, 0.0, 0.0101], [0.0039, 0.0, 0.0051]], np.float32)
    codes, scales = quantise_weight(weight, axis=1)
    assert codes.tolist() == [[127, 0, -127], [-64, 0, 64], [0, 0, 32]]
    assert scales == pytest.approx([1 / 127, 1.0, 0.02 / 127])
    assert np.array_equal(quantise_weight(weight.T, axis=0)[0], codes.T)
    assert scale_of(np.float32(0)) == 1


@pytest.mark.parametrize("kind", ROUTED)
def test_only_linear_layers_of_encoder_layers_are_quantised(kind: str, lowered: AllLowered) -> None:
    case = lowered[kind, "int8"]
    graph = onnx.load(case.file).graph
    made = {output: node for node in graph.node for output in node.output}
    quantised = set()
    for node in graph.node:
        if node.op_type in ("MatMul", "Gemm", "Conv"):
            operators = [made[name].op_type if name in made else "" for name in node.input[:2]]
            assert operators.count("DequantizeLinear") in (0, 2), node.name
            if operators == ["DequantizeLinear"] * 2:
                quantised.add(node.name.rpartition("/")[0])
    assert quantised == {name for layer in case.lowering.layers for name in case.lowering.products(layer)}
    assert len(quantised) == 24
    assert "main.encoder.blocks.0.attn" not in quantised
    check(ir.load(case.file))
    stored = {t.name: t for t in graph.initializer}
    original = {t.name: t for t in case.export.proto().graph.initializer}
    for name in quantised:
        codes = stored[f"{name}.weight.T.int8"]
        assert codes.data_type == TensorProto.INT8
        assert list(codes.dims) == list(original[f"{name}.weight.T"].dims)
        assert f"{name}.weight.T" not in stored
    saved = sum(3 * len(original[f"{name}.weight.T"].raw_data) // 4 for name in quantised)
    extra = sum(len(t.raw_data) for n, t in stored.items() if n.endswith((".scale", ".zero")))
    assert sum(len(t.raw_data) for t in original.values()) - saved + extra == sum(
        len(t.raw_data) for t in stored.values()
    )


@pytest.mark.parametrize("kind", ROUTED)
def test_dynamic_quantises_the_same_layers(kind: str, lowered: AllLowered) -> None:
    case = lowered[kind, "int8-dynamic"]
    graph = onnx.load(case.file).graph
    found = {node.name.rpartition("/")[0] for node in graph.node if node.op_type == "MatMulInteger"}
    assert found == {name for layer in case.lowering.layers for name in case.lowering.products(layer)}
    with pytest.raises(ExportError, match="outside the allowlist"):
        check(ir.load(case.file))
    assert case.file.stat().st_size < 0.75 * case.export.file.stat().st_size
    assert case.lowering.runs_on == "onnxruntime"


@pytest.mark.parametrize("precision", INT8)
@pytest.mark.parametrize("kind", ["dense", "top2"])
def test_computes_nearly_what_fp32_does(kind: str, precision: str, lowered: AllLowered) -> None:
    case = lowered[kind, precision]
    for batch, length in ((1, 3), (7, 11)):
        wanted, found = (run(file, feeds(batch, length, seed=5))[0] for file in (case.export.file, case.runnable))
        assert 1e-4 < relative(found, wanted) < 0.3


def test_static_ranges_know_no_batch_mates(lowered: AllLowered) -> None:
    file = lowered["dense", "int8"].runnable
    inputs = feeds(5, 6, seed=3)
    together = run(file, inputs)[0]
    alone = np.concatenate([run(file, {n: a[i : i + 1] for n, a in inputs.items()})[0] for i in range(5)])
    longer = {name: np.pad(a, ((0, 0), (0, 9))) if a.ndim == 2 else a for name, a in inputs.items()}
    assert np.isfinite(together).all()
    # A value on the edge of two codes may fall to either side when the order of a sum changes.
    assert relative(alone, together) < 0.02
    assert relative(run(file, longer)[0], together) < 0.02


@pytest.mark.parametrize("precision", INT8)
def test_keeps_layers_and_products_in_fp32(precision: str, lowered: AllLowered, tmp_path: Path) -> None:
    case = lowered["dense", precision]
    keep = {"main.encoder.blocks.1", f"{TEXT}.0.attention.self.key"}
    (file,) = case.lowering.write(tmp_path / "kept.onnx", keep=keep)
    stored = {t.name: t.data_type for t in onnx.load(file).graph.initializer}
    suffix = ".int8" if precision == "int8" else "_quantized"
    for layer in case.lowering.layers:
        for name in case.lowering.products(layer):
            kept = layer in keep or name in keep
            assert (f"{name}.weight.T{suffix}" in stored) != kept, name
            assert (f"{name}.weight.T" in stored) == kept, name
    assert set(product_types(file)) >= {f"{TEXT}.0.attention.self.key/MatMul"}
    truth, inputs = run(case.export.file, feeds(4, 7))[0], feeds(4, 7)
    assert relative(run(file, inputs)[0], truth) < 0.3
    (rest,) = case.lowering.write(tmp_path / "one.onnx", keep=case.lowering.layers[1:])
    assert relative(run(rest, inputs)[0], truth) > 0
    with pytest.raises(ExportError, match="nothing would be"):
        case.lowering.write(tmp_path / "none.onnx", keep=case.lowering.layers)
    with pytest.raises(ExportError, match="can be kept"):
        case.lowering.write(tmp_path / "none.onnx", keep=["head.classifier"])
    assert not (tmp_path / "none.onnx").exists()


# --- calibration ---


@pytest.mark.parametrize(("method", "most"), [("percentile", 1.1), ("entropy", 12)])  # entropy has coarser bins
def test_ranges_cover_the_bulk_and_cut_outliers(method: str, most: float, tmp_path: Path) -> None:
    made = one_layer(tmp_path, weight=np.eye(4, dtype=np.float32), bias=np.zeros(4, np.float32))
    random = np.random.default_rng(0)
    rows = random.uniform(-1, 1, (60_000, 4)).astype(np.float32)
    rows[7, 2] = -50  # one in 240,000 values
    batches = (
        {"x": rows[i : i + 999], "flags": np.ones((len(rows[i : i + 999]), 4), np.int64)} for i in range(0, 60_000, 999)
    )
    found = activation_limits(made, ["x"], batches, method=method)
    assert 0.9 < found["x"] < most


def test_batches_are_taken_one_at_a_time_and_cut_to_fit_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = one_layer(tmp_path, weight=np.eye(4, dtype=np.float32), bias=np.zeros(4, np.float32))
    monkeypatch.setattr("export.precision.calibrate._MEMORY", 20 * 4 * 4)  # bytes of 20 rows
    alive, told, seen = [], [], []

    def batches() -> Iterator[Arrays]:
        for feed in samples(batches=3):
            alive.append(len(told))
            yield feed

    class Spy:
        def __init__(self, session: object) -> None:
            self.session = session

        def run(self, names: object, inputs: Arrays) -> object:
            seen.append(len(inputs["x"]))
            return self.session.run(names, inputs)  # type: ignore[attr-defined]

    from export.precision import calibrate

    open_session = calibrate._session
    monkeypatch.setattr(calibrate, "_session", lambda *a: Spy(open_session(*a)))
    found = activation_limits(made, ["x"], batches(), method="percentile", on_step=told.append)
    assert alive == [0, 1, 2]  # each batch was dealt with before the next was asked for
    assert seen[0] == 1
    assert max(seen) == 20
    assert sum(seen) == 50 + 51 + 52
    assert told[:3] == [f"calibrating: {n} samples" for n in (50, 101, 153)]
    assert found["x"] == pytest.approx(max(np.abs(feed["x"]).max() for feed in samples(batches=3)), rel=0.02)


def test_calibration_that_cannot_be_used_is_an_error(tmp_path: Path) -> None:
    made = one_layer(tmp_path, weight=np.eye(4, dtype=np.float32), bias=np.zeros(4, np.float32))
    with pytest.raises(ExportError, match="no sample to calibrate on"):
        lowering(made, "int8", calibration=iter(()))
    bad = {"x": np.full((1, 4), np.nan, np.float32), "flags": np.ones((1, 4), np.int64)}
    with pytest.raises(ExportError, match="x is not finite"):
        lowering(made, "int8", calibration=[bad])
    with pytest.raises(UsageError, match="needs samples"):
        lowering(made, "int8")
    with pytest.raises(UsageError, match="received minmax; expected percentile or entropy"):
        lowering(made, "int8", calibration=[bad], method="minmax")
    with pytest.raises(UsageError, match="received fp8"):
        lowering(made, "fp8")
    with pytest.raises(UsageError, match="received fp32"):
        lowering(made, "fp32")
