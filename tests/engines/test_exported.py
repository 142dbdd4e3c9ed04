"""Engines that came with the bundle."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from mope_deploy.bundle import Bundle
from mope_deploy.engines import built_engines, open_built, open_session
from mope_deploy.engines.tensorrt import session as tensorrt_session
from mope_deploy.engines.tensorrt.backends import Backend, open_backend
from mope_deploy.engines.tensorrt.device import Device
from mope_deploy.engines.tensorrt.profiles import Sizes
from mope_deploy.engines.tensorrt.session import check_engine, prove
from mope_deploy.engines.tensorrt.sidecar import (
    EngineFiles,
    Sidecar,
    exported_files,
    exported_names,
)
from mope_deploy.errors import BundleError, EngineError
from tests.engines.built import AMPERE, FP32, files_of, rebuilt


def came(bundle: Bundle) -> EngineFiles:
    found = exported_files(bundle, bundle.graph(), "tensorrt_rtx")
    assert found is not None
    return found


def check_exported(bundle: Bundle, device: Device = AMPERE) -> bytes:
    sidecar = Sidecar.read(came(bundle).sidecar)
    return check_engine(sidecar, came(bundle), bundle, bundle.graph(), open_backend("tensorrt_rtx"), device)


def test_an_exported_engine_is_checked_like_any_other(exported: Bundle) -> None:
    assert check_exported(exported) == came(exported).engine.read_bytes()
    with pytest.raises(EngineError, match=r"exported/model\.tensorrt_rtx\.engine was built for another GPU; .*8\.7"):
        check_exported(exported, dataclasses.replace(AMPERE, gpu="Orin", compute_capability="8.7"))
    with pytest.raises(EngineError, match="built on another system"):
        check_exported(exported, dataclasses.replace(AMPERE, os="Windows AMD64"))
    session = open_session(exported)
    assert session.name == "onnxruntime"
    assert "exported/model.tensorrt_rtx.engine needs a GPU to run" in session.why


def test_an_exported_engine_is_covered_by_the_bundles_own_hashes(exported: Bundle) -> None:
    name, _ = exported_names(exported.graph(), "tensorrt_rtx")
    came(exported).engine.write_bytes(came(exported).engine.read_bytes()[:-1] + b"x")
    with pytest.raises(BundleError, match=rf"{name} was altered"):
        Bundle.open(exported.path)


def test_the_proof_of_an_exported_engine_is_the_devices(
    exported: Bundle, backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = open_session(exported, engine="onnxruntime", threads=1)
    sidecar = Sidecar.read(came(exported).sidecar)

    def prove_it() -> Any:
        return prove(session, exported, sidecar, came(exported), backend, AMPERE, information=lambda: FP32)

    assert prove_it() is not None
    assert came(exported).proof == exported.path / "engines/model.tensorrt_rtx.exported.proof.json"
    assert came(exported).proof.exists()
    assert prove_it() is None
    assert Bundle.open(exported.path).unlisted() == ()
    monkeypatch.setenv("MOPE_ENGINES", str(tmp_path / "elsewhere"))
    assert prove_it() is not None
    assert came(exported).proof.parent == tmp_path / "elsewhere" / exported.sha256[:16]
    assert prove_it() is None


def test_an_engine_that_the_manifest_does_not_list_is_never_read(built: Bundle) -> None:
    (built.path / "engines/exported").mkdir()
    for path in (files_of(built).engine, files_of(built).sidecar):
        path.rename(built.path / "engines/exported" / path.name)
    assert exported_files(built, built.graph(), "tensorrt_rtx") is None
    assert built_engines(built, None) == []
    with pytest.raises(EngineError, match="no TensorRT engine was built"):
        open_session(built, engine="tensorrt")


def test_the_engine_built_here_comes_before_the_exported_one(
    exported: Bundle, built: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in (files_of(built).engine, files_of(built).sidecar):
        path.rename(exported.path / "engines" / path.name)
    tried: list[Path] = []

    def deserialise_nothing(_: Backend, __: bytes, files: EngineFiles) -> Any:
        tried.append(files.engine)
        raise EngineError(f"{files.engine} tried")

    monkeypatch.setattr(tensorrt_session, "deserialise", deserialise_nothing)
    monkeypatch.setattr("mope_deploy.engines.open.this_device", lambda: AMPERE)
    with pytest.raises(EngineError, match=r"engines/model\.tensorrt_rtx\.engine tried"):
        open_session(exported, engine="tensorrt")
    assert tried == [files_of(exported).engine, came(exported).engine]
    # The first is of no use: its refusal is the one reported, and the second is tried all the same.
    files_of(exported).engine.write_bytes(b"damaged")
    tried.clear()
    with pytest.raises(EngineError, match="is damaged"):
        open_session(exported, engine="tensorrt")
    assert tried == [came(exported).engine]
    tried.clear()
    with pytest.raises(EngineError, match="exported/model"):
        open_built(exported, None, "tensorrt_rtx", came(exported))
    assert tried == [came(exported).engine]


def test_rebuilding_beside_an_exported_engine_keeps_its_sizes(exported: Bundle) -> None:
    before = came(exported).engine.read_bytes()
    assert rebuilt(exported) == "tensorrt_rtx"
    assert Sidecar.read(files_of(exported).sidecar).profile["batch"] == Sizes(1, 2, 4)
    assert came(exported).engine.read_bytes() == before
    Bundle.open(exported.path)
