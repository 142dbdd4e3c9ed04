"""A bundle of the tiny model, for every device test.

The graph itself needs the onnx package, which no device has: where ``MOPE_TEST_GRAPH`` names a file built elsewhere,
that is used (test_old_environment.py does so), and the tests that compare against torch-side libraries are left out.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from mope_deploy.bundle import write_bundle
from tests.device import tiny

GRAPH = "MOPE_TEST_GRAPH"
collect_ignore_glob = ["test_against_*.py", "test_old_environment.py"] if os.environ.get(GRAPH) else []


@pytest.fixture(scope="session")
def graph_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if given := os.environ.get(GRAPH):
        return Path(given)
    from tests.device.graph import write_graph, write_split

    folder = tmp_path_factory.mktemp("graph")
    for name in ("text", "text-or-none"):
        write_split(folder / f"main-{name}.onnx", folder / f"{name}.onnx", missing=name == "text-or-none")
    return write_graph(folder / "model.onnx")


@pytest.fixture(scope="session")
def bundle_path(graph_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle for reading: tests that alter one take ``bundle_copy``."""
    target = tmp_path_factory.mktemp("bundles") / "tiny"
    write_bundle(target, files=tiny.files(graph_file), manifest=tiny.manifest())
    return target


@pytest.fixture(scope="session")
def split_path(graph_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as a main file and a part, for reading."""
    return write_split_bundle(tmp_path_factory.mktemp("bundles") / "split", graph_file)


def write_split_bundle(target: Path, graph_file: Path, *, missing: bool = False, **changes: Any) -> Path:
    """``changes`` are of its one entry in ``graphs``; ``missing`` makes the text one that may be missing."""
    text = graph_file.with_name("text-or-none.onnx" if missing else "text.onnx")
    document = tiny.split(tiny.manifest(), missing=missing)
    document["graphs"][0] |= changes
    files = tiny.files(text.with_name(f"main-{text.name}"), missing=missing) | {"model.text.onnx": text}
    write_bundle(target, files=files, manifest=document)
    return target


@pytest.fixture
def bundle_copy(bundle_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle_path, tmp_path / "bundle"))


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    (tmp_path / "rows").mkdir()
    return tiny.write_samples(tmp_path / "rows", labels=[tiny.LABELS[i % 3] for i in range(len(tiny.SAMPLES))])
