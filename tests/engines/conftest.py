"""Engines really built by TensorRT-RTX, which needs no GPU for that; a GPU that is here is hidden."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from mope_deploy.bundle import Bundle, write_bundle
from mope_deploy.engines.tensorrt.backends import Backend, open_backend
from mope_deploy.engines.tensorrt.build import build_engine
from mope_deploy.engines.tensorrt.sidecar import engine_files, exported_names
from tests.device import tiny
from tests.device.graph import write_graph


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("MOPE_ENGINES", raising=False)


def make_bundle(folder: Path, graph: Path, **changes: Any) -> Bundle:
    """The tiny bundle around a graph; ``changes`` are of its one entry in ``graphs``."""
    (entry,) = tiny.manifest()["graphs"]
    return write_bundle(folder, files=tiny.files(graph), manifest=tiny.manifest(graphs=[{**entry, **changes}]))


@pytest.fixture(scope="session")
def tiny_graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_graph(tmp_path_factory.mktemp("graph") / "model.onnx")


@pytest.fixture
def bundle(tiny_graph: Path, tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle", tiny_graph)


@pytest.fixture(scope="session")
def built_once(tiny_graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    bundle = make_bundle(tmp_path_factory.mktemp("built") / "bundle", tiny_graph)
    build_engine(bundle, compute="8.6,12.0", batch="1:2:4")
    return bundle.path


@pytest.fixture
def built(built_once: Path, tmp_path: Path) -> Bundle:
    """A bundle with an engine for compute capabilities 8.6 and 12.0, to be altered."""
    return Bundle.open(shutil.copytree(built_once, tmp_path / "built"))


@pytest.fixture
def exported(built_once: Path, tiny_graph: Path, tmp_path: Path) -> Bundle:
    """A bundle that was exported with that engine."""
    source = Bundle.open(built_once)
    graph = source.graph()
    files, names = engine_files(source, graph, "tensorrt_rtx"), exported_names(graph, "tensorrt_rtx")
    contents = {**tiny.files(tiny_graph), names[0]: files.engine, names[1]: files.sidecar}
    return write_bundle(tmp_path / "exported", files=contents, manifest=tiny.manifest())


@pytest.fixture
def backend() -> Backend:
    return open_backend("tensorrt_rtx")


def left(bundle: Bundle) -> list[str]:
    """Names of what lies in the folder of engines."""
    folder = bundle.path / "engines"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []
