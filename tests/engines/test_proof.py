"""Precision and golden samples before any prediction, once for an engine and a device; ONNX Runtime is the engine."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from mope_deploy.bundle import Bundle
from mope_deploy.engines import open_session
from mope_deploy.engines.tensorrt.backends import Backend
from mope_deploy.engines.tensorrt.build import build_engine
from mope_deploy.engines.tensorrt.device import Device
from mope_deploy.engines.tensorrt.session import prove
from mope_deploy.engines.tensorrt.sidecar import (
    Proof,
    Sidecar,
)
from mope_deploy.errors import EngineError, ParityError
from tests.device import tiny
from tests.device.graph import write_graph
from tests.engines.built import AMPERE, FP32, VERSION, files_of, rewrite
from tests.engines.conftest import make_bundle
from tests.engines.test_inspect import document, layer


def proved(
    bundle: Bundle, backend: Backend, device: Device = AMPERE, session: Any = None, information: str = FP32
) -> Any:
    files = files_of(bundle)
    session = session or open_session(bundle, engine="onnxruntime", threads=1)
    sidecar = Sidecar.read(files.sidecar)
    return prove(session, bundle, sidecar, files, backend, device, information=lambda: information)


def test_goldens_are_run_once_per_engine_and_device(built: Bundle, backend: Backend) -> None:
    before = {p: p.read_bytes() for p in built.path.rglob("*") if p.is_file()}
    measured = proved(built, backend)
    assert measured.samples == len(tiny.SAMPLES)
    assert 0 < measured.logits_error < 1e-6
    proof = Proof.read(files_of(built).proof)
    assert proof is not None
    assert (proof.device, proof.logits_error, proof.version) == (AMPERE, measured.logits_error, VERSION)
    assert proof.layers == {"float32": 1}
    assert proved(built, backend) is None
    for other in (
        dataclasses.replace(AMPERE, gpu="RTX A4000"),
        dataclasses.replace(AMPERE, driver="590.1"),
    ):
        assert proved(built, backend, other) is not None
    # Outside the hashed files: nothing that was there is touched.
    assert {p: p.read_bytes() for p in before} == before
    Bundle.open(built.path)


def test_an_engine_of_another_precision_is_refused_before_the_goldens(built: Bundle, backend: Backend) -> None:
    class Untouched:
        def run(self, *_: Any) -> None:
            pytest.fail("ran before its precision was known")

    half = document(layer("gemm", "Half", "Half"), layer("gemm", "Half", "Half"))
    words = r"model\.tensorrt_rtx\.engine is called fp32 and computes in something else; received matrix layers: 2 of "
    for _ in range(2):
        with pytest.raises(EngineError, match=words):
            proved(built, backend, session=Untouched(), information=half)
        assert not files_of(built).proof.exists()
    rewrite(files_of(built).sidecar, lambda d: d["precision"].update(declared="fp16"))
    assert proved(built, backend, information=half) is not None
    assert json.loads(files_of(built).proof.read_text())["layers"] == {"float16": 2}


def test_an_inspector_that_tells_nothing(built: Bundle, backend: Backend) -> None:
    assert proved(built, backend, information="") is not None
    assert json.loads(files_of(built).proof.read_text())["layers"] == {}


def test_a_proof_of_an_earlier_release_proves_nothing(built: Bundle, backend: Backend) -> None:
    """It says nothing of the precision."""
    proved(built, backend)
    rewrite(files_of(built).proof, lambda d: d.pop("layers"))
    assert proved(built, backend) is not None
    assert proved(built, backend) is None


def test_a_proof_of_another_engine_or_bundle_proves_nothing(built: Bundle, backend: Backend) -> None:
    for key in ("engine_sha256", "bundle_sha256", "version"):
        assert proved(built, backend) is not None
        rewrite(files_of(built).proof, lambda d, key=key: d.update({key: "0" * 64 if "sha" in key else "1.0"}))
    files_of(built).proof.write_text("{", encoding="utf-8")
    assert proved(built, backend) is not None
    assert proved(built, backend) is None


def test_wrong_goldens_are_refused_every_time(built: Bundle, backend: Backend, tmp_path: Path) -> None:
    graph = write_graph(tmp_path / "model.onnx")
    head = tiny.weights()["head"]
    assert graph.read_bytes().count(head.tobytes()) == 1
    graph.write_bytes(graph.read_bytes().replace(head.tobytes(), (head * 1.001).tobytes()))
    wrong = open_session(make_bundle(tmp_path / "wrong", graph), engine="onnxruntime", threads=1)
    for _ in range(2):
        with pytest.raises(ParityError, match=r"logits are not the golden ones; received an error of 0.001; expected"):
            proved(built, backend, session=wrong)
        assert not files_of(built).proof.exists()
    wrong.least_tolerance = 5e-3  # what a session of a TF32 engine says
    assert proved(built, backend, session=wrong).logits_error == pytest.approx(1e-3, rel=0.01)


def test_building_again_forgets_the_proof(built: Bundle, backend: Backend) -> None:
    proved(built, backend)
    build_engine(built, compute="8.6")
    assert not files_of(built).proof.exists()
