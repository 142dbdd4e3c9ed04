"""A bundle of the tiny model, for every device test.

The graph itself needs the onnx package, which no device has: where ``MOPE_TEST_GRAPH`` names a file built elsewhere,
that is used (test_old_environment.py does so), and the tests that compare against torch-side libraries are left out.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from mope_deploy.bundle import write_bundle
from tests.device import tiny

GRAPH = "MOPE_TEST_GRAPH"
collect_ignore_glob = ["test_against_*.py", "test_old_environment.py"] if os.environ.get(GRAPH) else []


@pytest.fixture(scope="session")
def graph_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if given := os.environ.get(GRAPH):
        return Path(given)
    from tests.device.graph import write_graph

    return write_graph(tmp_path_factory.mktemp("graph") / "model.onnx")


@pytest.fixture(scope="session")
def bundle_path(graph_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle for reading: tests that alter one take ``bundle_copy``."""
    target = tmp_path_factory.mktemp("bundles") / "tiny"
    write_bundle(target, files=tiny.files(graph_file), manifest=tiny.manifest())
    return target


@pytest.fixture
def bundle_copy(bundle_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle_path, tmp_path / "bundle"))


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    (tmp_path / "rows").mkdir()
    return tiny.write_samples(tmp_path / "rows", labels=[tiny.LABELS[i % 3] for i in range(len(tiny.SAMPLES))])
