"""What each product loses by itself, against arithmetic written out in numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from export.precision import lowering
from export.precision.int8 import Int8Lowering
from mope_deploy.errors import ExportError
from tests.export.precision.conftest import B0, LOWERED, AllLowered, one_layer
from tests.export.runtime import feeds

PRODUCT = f"{B0}.fc"


def batches(random: np.random.Generator) -> list[dict[str, NDArray[np.generic]]]:
    return [
        {
            "x": random.standard_normal((n, 4)).astype(np.float32) * np.float32([1, 2, 3, 9]),
            "flags": np.ones((n, 4), np.int64),
        }
        for n in (40, 7)
    ]


def error(found: NDArray[np.float64], exact: NDArray[np.float64]) -> float:
    return float(np.sqrt(((found - exact) ** 2).sum() / (exact**2).sum()))


@pytest.mark.parametrize("gemm", [False, True])
@pytest.mark.parametrize("precision", LOWERED)
def test_it_is_what_numpy_makes_of_it(precision: str, gemm: bool, tmp_path: Path) -> None:
    if precision == "int8-dynamic" and gemm:
        pytest.skip("ONNX Runtime's dynamic quantiser knows MatMul alone")
    random = np.random.default_rng(1)
    weight, bias = random.standard_normal((4, 3)).astype(np.float32), random.standard_normal(3).astype(np.float32)
    file = one_layer(tmp_path, weight=weight.T.copy() if gemm else weight, bias=bias, gemm=gemm)
    samples = batches(random)
    low = lowering(file, precision, calibration=samples)
    x = np.concatenate([feed["x"] for feed in samples]).astype(np.float64)
    added = bias.astype(np.float64) if gemm else 0.0  # a Gemm's output has its bias
    exact = x @ weight.astype(np.float64) + added
    steps = np.abs(weight).max(axis=0) / 127
    coded = np.rint(weight / steps) * steps
    if precision == "int8":
        assert isinstance(low, Int8Lowering)
        step = low.limits["x"] / 127
        found = (np.clip(np.rint(x / step), -128, 127) * step) @ coded + added
    elif precision == "int8-dynamic":  # a scale of its own for every sample
        low_end, high_end = np.minimum(x.min(axis=1), 0)[:, None], np.maximum(x.max(axis=1), 0)[:, None]
        step = (high_end - low_end) / 255
        zero = np.rint(-low_end / step)
        found = ((np.clip(np.rint(x / step) + zero, 0, 255) - zero) * step) @ coded
    else:
        rounded = [_half(array, precision) for array in (x, weight, bias if gemm else np.zeros(3))]
        found = _half(rounded[0] @ rounded[1] + rounded[2], precision)
    errors = low.own_errors(samples, on_step=lambda _: None)
    assert errors[PRODUCT] == pytest.approx(error(found, exact), rel=0.05)
    assert 1e-5 < errors[PRODUCT] < 0.05


def _half(array: NDArray[np.generic], precision: str) -> NDArray[np.float64]:
    import ml_dtypes

    return array.astype(np.float32).astype(np.float16 if precision == "fp16" else ml_dtypes.bfloat16).astype(np.float64)


def test_no_sample_is_no_ranking(tmp_path: Path) -> None:
    low = lowering(one_layer(tmp_path, weight=np.ones((4, 3), np.float32), bias=np.zeros(3, np.float32)), "fp16")
    with pytest.raises(ExportError, match="there is no sample to rank layers on"):
        low.own_errors([], on_step=lambda _: None)


def test_an_overflow_is_infinitely_bad_and_another_layer_is_not_blamed(tmp_path: Path) -> None:
    weight = np.full((4, 3), 3e4, np.float32)
    low = lowering(one_layer(tmp_path, weight=weight, bias=np.zeros(3, np.float32)), "fp16")
    assert low.own_errors(batches(np.random.default_rng(0)), on_step=lambda _: None)[PRODUCT] == np.inf


@pytest.mark.parametrize("precision", LOWERED)
def test_every_product_that_can_be_kept_is_measured(precision: str, lowered: AllLowered) -> None:
    low = lowered["dense", precision].lowering
    errors = low.own_errors([feeds(3, 5)], on_step=lambda _: None)
    wanted = {name for layer in low.layers for name in low.products(layer)}
    assert wanted - set(errors) <= {"main.encoder.patch_embed.proj"}  # which stays fp32 in bf16
    assert all(0 < errors[name] < 0.1 for name in wanted & set(errors))
