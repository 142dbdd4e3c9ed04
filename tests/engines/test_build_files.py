"""Where engines are built: what the machine has room for, and which files are written and which never."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from mope_deploy.bundle import Bundle, write_bundle
from mope_deploy.engines.tensorrt.build import _died, build_engine
from mope_deploy.engines.tensorrt.profiles import Sizes
from mope_deploy.engines.tensorrt.sidecar import EngineFiles, Sidecar, engine_files, exported_files, find_engines
from mope_deploy.errors import EngineError, UsageError
from mope_deploy.manifest import FileEntry
from tests.device import tiny
from tests.engines.conftest import left, make_bundle


def test_too_little_memory(bundle: Bundle) -> None:
    files = {**bundle.manifest.files, "model.onnx": FileEntry("0" * 64, 2**39)}
    huge = Bundle(bundle.path, dataclasses.replace(bundle.manifest, files=files), bundle.sha256)
    with pytest.raises(
        EngineError, match=r"too little free memory .* expected about 1,573,\d+ MiB; .*--no-memory-check"
    ):
        build_engine(huge, compute="8.6")
    assert left(bundle) == []


def test_a_builder_that_was_killed() -> None:
    assert "SIGKILL (out of memory, most likely)" in str(_died(-9, ""))
    assert "SIGSEGV" in str(_died(-11, ""))
    assert "ImportError: libnvinfer" in str(_died(1, "Traceback\n  ImportError: libnvinfer\n\n"))


def test_engines_elsewhere(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOPE_ENGINES", str(tmp_path / "elsewhere"))
    _, files = build_engine(bundle, compute="8.6")
    assert files.engine.parent == tmp_path / "elsewhere" / bundle.sha256[:16]
    assert files.engine.exists()
    assert left(bundle) == []


def test_folders_that_cannot_hold_engines(bundle: Bundle, tmp_path: Path) -> None:
    (bundle.path / "engines").write_text("a file")
    with pytest.raises(EngineError, match=r"cannot be written.*MOPE_ENGINES"):
        build_engine(bundle, compute="8.6")
    (bundle.path / "engines").unlink()
    (bundle.path / "engines/model.tensorrt_rtx.engine").mkdir(parents=True)
    with pytest.raises(EngineError, match=r"model\.tensorrt_rtx\.engine cannot be written; received Is a directory"):
        build_engine(bundle, compute="8.6")
    assert left(bundle) == ["model.tensorrt_rtx.engine"]
    shutil.rmtree(bundle.path / "engines")
    (bundle.path / "engines").symlink_to(tmp_path)
    with pytest.raises(UsageError, match="symbolic link"):
        build_engine(bundle, compute="8.6")


def test_a_listed_file_is_never_overwritten(tiny_graph: Path, tmp_path: Path) -> None:
    files = {**tiny.files(tiny_graph), "engines/model.tensorrt_rtx.engine": b"exported"}
    bundle = write_bundle(tmp_path / "b", files=files, manifest=tiny.manifest())
    with pytest.raises(UsageError, match="belongs to the exported bundle"):
        build_engine(bundle, compute="8.6")
    Bundle.open(bundle.path)


# --- engines that are exported with a bundle ---


def test_building_for_a_bundle_that_is_being_assembled(bundle: Bundle, exported: Bundle, tmp_path: Path) -> None:
    """Into a folder of the exporter's; nothing of it stays in the bundle it was built from."""
    sidecar, files = build_engine(bundle, compute="8.6", folder=tmp_path / "new" / "folder")
    assert sorted(path.name for path in (tmp_path / "new/folder").iterdir()) == [files.engine.name, files.sidecar.name]
    assert left(bundle) == []
    assert json.loads(files.sidecar.read_text(encoding="utf-8"))["verified"] is False
    found = exported_files(exported, exported.graph(), "tensorrt_rtx")
    assert found is not None
    assert Sidecar.read(found.sidecar).onnx == sidecar.onnx  # the graph is the same one in both bundles


def test_building_leaves_an_exported_engine_alone(exported: Bundle) -> None:
    before = {name: (exported.path / name).read_bytes() for name in exported.manifest.files}
    _, files = build_engine(exported, compute="8.9")
    assert files == engine_files(exported, exported.graph(), "tensorrt_rtx")
    assert {name: (exported.path / name).read_bytes() for name in before} == before
    opened = Bundle.open(exported.path)
    assert opened.unlisted() == ()
    here, came = find_engines(opened, opened.graph())
    assert (here[0], here[1].exported, came[0], came[1].exported) == ("tensorrt_rtx", False, "tensorrt_rtx", True)


def test_what_the_bundle_was_exported_for(tiny_graph: Path, tmp_path: Path) -> None:
    """Sizes and workspace of a device preset, unless others are asked for."""
    build = {"target": "orin-nano", "profile": {"batch": [1, 1, 2], "text_length": [2, 4, 6]}, "workspace": 64}
    build |= {"cpu": {"threads": None, "arena": True}}
    bundle = write_bundle(tmp_path / "b", files=tiny.files(tiny_graph), manifest=tiny.manifest(build=build))
    sidecar, _ = build_engine(bundle, compute="8.6")
    assert sidecar.profile == {"batch": Sizes(1, 1, 2), "text_length": Sizes(2, 4, 6)}
    assert sidecar.workspace == 64 * 2**20
    sidecar, _ = build_engine(bundle, compute="8.6", batch="1:2:3", workspace=32)
    assert sidecar.profile == {"batch": Sizes(1, 2, 3), "text_length": Sizes(2, 4, 6)}
    assert sidecar.workspace == 32 * 2**20


def test_a_graph_for_tensorrt_alone_is_for_each_of_its_libraries(tiny_graph: Path, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b", tiny_graph, runs_on="tensorrt")
    assert build_engine(bundle, compute="8.6")[0].graph == "model"
    bundle = make_bundle(tmp_path / "c", tiny_graph, runs_on="onnxruntime")
    with pytest.raises(UsageError, match="no graph for tensorrt; received model"):
        build_engine(bundle, compute="8.6")


def test_files_of_an_engine(bundle: Bundle) -> None:
    folder = bundle.path / "engines"
    assert engine_files(bundle, bundle.graph(), "tensorrt") == EngineFiles(
        folder / "model.tensorrt.engine", folder / "model.tensorrt.json", folder / "model.tensorrt.proof.json"
    )
