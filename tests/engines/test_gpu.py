"""On a GPU: build, prove, run, against the float64 oracle. The one place where a session on a GPU really runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mope_deploy.bundle import Bundle, write_bundle
from mope_deploy.engines import Session, built_engines, open_session
from mope_deploy.engines.tensorrt.backends import Backend, installed
from mope_deploy.engines.tensorrt.build import build_engine
from mope_deploy.engines.tensorrt.device import this_device
from mope_deploy.engines.tensorrt.inspect import read_precisions
from mope_deploy.engines.tensorrt.sidecar import Proof, engine_files, exported_files, exported_names
from mope_deploy.errors import EngineError
from tests.device import tiny
from tests.device.test_engines import feeds
from tests.engines.conftest import make_bundle
from tests.engines.test_build import edited, half

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(this_device().gpu is None, reason="no GPU here")]


def builds_here() -> str | None:
    """Why no engine can be built for this GPU, if none can: TensorRT-RTX knows no H100, H200 or Orin."""
    found = installed()
    if isinstance(found.get("tensorrt"), Backend):
        return None
    rtx = found.get("tensorrt_rtx")
    if not isinstance(rtx, Backend):
        return "no TensorRT is installed"
    if this_device().compute_capability not in rtx.compute_capabilities:
        return f"tensorrt_rtx does not build for {this_device().gpu}, and tensorrt is not installed"
    return None


def cuda_in_onnxruntime() -> bool:
    from mope_deploy.engines.onnxruntime.session import available_providers

    return "CUDAExecutionProvider" in available_providers()


WHY_NOT = builds_here() if this_device().gpu else "no GPU here"
tensorrt = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


def computes_the_oracle(session: Session, *, within: float = 1e-5) -> None:
    """At batch sizes and lengths below, within and beyond those of a profile 2:3:4, 3:6:12."""
    for batch, length in ((1, 1), (3, 5), (4, 12), (13, 7)):
        inputs = feeds(batch, length, seed=batch)
        found, want = session.run(inputs), tiny.oracle(inputs)
        for name, array in found.items():
            assert (array.dtype, array.shape) == (np.float32, want[name].shape)
            np.testing.assert_allclose(array, want[name], rtol=0, atol=within * np.abs(want[name]).max())
        assert session.run(inputs)["logits"].tobytes() == found["logits"].tobytes()
    assert list(session.run(feeds(), ["routing"])) == ["routing"]


@tensorrt
def test_build_prove_and_run(bundle: Bundle) -> None:
    sidecar, _ = build_engine(bundle, batch="2:3:4", text_length="3:6:12")
    session = open_session(bundle, engine="tensorrt")
    proof = Proof.read(engine_files(bundle, bundle.graph(), sidecar.backend).proof)
    assert proof is not None
    assert proof.device == this_device()
    computes_the_oracle(session)
    assert "proved by the golden samples" in open_session(bundle).why


@tensorrt
def test_the_inspector_tells_types(bundle: Bundle) -> None:
    """What the reader was written for by documents alone: it must find matrix layers in a real engine's JSON."""
    build_engine(bundle)
    text = open_session(bundle, engine="tensorrt").information()  # type: ignore[attr-defined]
    assert set(read_precisions(text)) == {"float32"}, text[:2000]


@tensorrt
def test_half_precision_is_read_back(tiny_graph: Path, tmp_path: Path) -> None:
    (entry,) = tiny.manifest()["graphs"]
    graph = edited(tiny_graph, tmp_path / "half.onnx", half)
    tolerance = {"logits": 1e-2, "routing": 1e-2}
    bundle = make_bundle(tmp_path / "half", graph, **{**entry, "precision": "fp16", "tolerance": tolerance})
    _, files = build_engine(bundle)
    session = open_session(bundle, engine="tensorrt")
    computes_the_oracle(session, within=1e-2)
    proof = Proof.read(files.proof)
    assert proof is not None
    assert proof.layers.get("float16"), session.information()[:2000]  # type: ignore[attr-defined]


@tensorrt
def test_an_exported_engine_runs_where_it_was_built(bundle: Bundle, tiny_graph: Path, tmp_path: Path) -> None:
    sidecar, files = build_engine(bundle, folder=tmp_path / "made")
    names = exported_names(bundle.graph(), sidecar.backend)
    contents = {**tiny.files(tiny_graph), names[0]: files.engine, names[1]: files.sidecar}
    exported = write_bundle(tmp_path / "exported", files=contents, manifest=tiny.manifest())
    computes_the_oracle(open_session(exported, engine="tensorrt"))
    came = exported_files(exported, exported.graph(), sidecar.backend)
    assert came is not None
    assert came.proof.exists()
    assert [files.exported for _, files in built_engines(exported, None)] == [True]
    Bundle.open(exported.path)


@tensorrt
def test_truncation_is_found_before_the_gpu_sees_it(bundle: Bundle) -> None:
    _, files = build_engine(bundle)
    files.engine.write_bytes(files.engine.read_bytes()[:-1])
    with pytest.raises(EngineError, match="is damaged"):
        open_session(bundle, engine="tensorrt")
    open_session(bundle, rebuild=True)


@pytest.mark.skipif(this_device().gpu is not None and not cuda_in_onnxruntime(), reason="this onnxruntime has no CUDA")
def test_onnxruntime_on_cuda_gives_the_golden_outputs(bundle: Bundle) -> None:
    from mope_deploy.engines.golden import check_outputs_are_golden

    session = open_session(bundle, engine="onnxruntime", providers=["CUDAExecutionProvider", "CPUExecutionProvider"])
    assert "CUDA" in session.device
    assert check_outputs_are_golden(bundle, session, graph="model").samples == len(tiny.SAMPLES)
    computes_the_oracle(session)
