"""A target is taken before the work, and work that cannot be placed is kept."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from export.pack.place import claimed, place
from mope_deploy.bundle import Bundle
from mope_deploy.errors import BundleError, UsageError
from tests.device import tiny
from tests.device.graph import write_graph


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    graph = write_graph(tmp_path_factory.mktemp("graph") / "model.onnx")
    return {"files": tiny.files(graph), "manifest": tiny.manifest()}


def test_of_two_exports_to_one_target_the_second_is_refused_at_its_start(made: dict[str, Any], tmp_path: Path) -> None:
    target = tmp_path / "b"
    with claimed(target, overwrite=False):
        with pytest.raises(UsageError, match="is being made by another process"), claimed(target, overwrite=False):
            pytest.fail("two have it")
        place(target, **made, overwrite=False)
    assert Bundle.open(target)
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_an_export_that_fails_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), claimed(tmp_path / "b", overwrite=False):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_what_is_to_be_replaced_stands_until_then(made: dict[str, Any], tmp_path: Path) -> None:
    place(tmp_path / "b", **made, overwrite=False)
    with claimed(tmp_path / "b", overwrite=True):
        assert Bundle.open(tmp_path / "b")
        place(tmp_path / "b", **made, overwrite=True)
    assert Bundle.open(tmp_path / "b")


@pytest.mark.parametrize("overwrite", [False, True])
def test_work_that_finds_its_place_taken_is_kept_beside_it(
    overwrite: bool, made: dict[str, Any], tmp_path: Path
) -> None:
    target = tmp_path / "b"
    (tmp_path / "b-1").write_text("taken as well")
    if overwrite:
        place(target, **made, overwrite=False)
    with claimed(target, overwrite=overwrite):
        shutil.rmtree(target)
        target.mkdir()
        (target / "thesis.txt").write_text("mine")
        with pytest.raises(UsageError, match=r"exists and is not a bundle.*the finished bundle is kept as .*b-2"):
            place(target, **made, overwrite=overwrite)
    assert Bundle.open(tmp_path / "b-2")
    assert (target / "thesis.txt").read_text() == "mine"


def test_what_cannot_be_written_anywhere_says_the_first_reason(made: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="task") as caught:
        place(tmp_path / "b", files=made["files"], manifest={**made["manifest"], "task": None}, overwrite=False)
    assert "kept" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
