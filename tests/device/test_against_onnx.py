"""Bundles whose graphs need the onnx package to be made: weights in a file of their own, other IR versions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mope_deploy.bundle import Bundle, write_bundle
from mope_deploy.errors import BundleError
from mope_deploy.predictor import load
from tests.device import tiny
from tests.device.graph import write_graph


def test_weights_in_a_data_file(tmp_path: Path) -> None:
    graph = write_graph(tmp_path / "model.onnx", external=True)
    data = tmp_path / "model.onnx.data"
    assert data.stat().st_size > 1000
    manifest = tiny.manifest()
    manifest["graphs"][0]["data"] = ["model.onnx.data"]
    files = {**tiny.files(graph), "model.onnx.data": data}
    predictor = load(write_bundle(tmp_path / "b", files=files, manifest=manifest).path)
    assert predictor.verify().logits_error < 1e-6
    inputs = predictor.bundle.golden()[0]
    np.testing.assert_allclose(predictor.session.run(inputs)["logits"], tiny.oracle(inputs)["logits"], atol=1e-5)
    (tmp_path / "b" / "model.onnx.data").unlink()
    with pytest.raises(BundleError, match=r"model\.onnx\.data is missing"):
        Bundle.open(tmp_path / "b", verify=False)


@pytest.mark.parametrize(("ir_version", "opset"), [(8, 18), (9, 19), (10, 20)])
def test_other_versions_run(tmp_path: Path, ir_version: int, opset: int) -> None:
    graph = write_graph(tmp_path / "model.onnx", ir_version=ir_version, opset=opset)
    bundle = write_bundle(tmp_path / "b", files=tiny.files(graph), manifest=tiny.manifest())
    assert load(bundle.path).verify().samples == len(tiny.SAMPLES)
