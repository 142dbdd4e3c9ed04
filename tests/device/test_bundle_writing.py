"""Bundles are written whole or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from mope_deploy.bundle import Bundle, write_bundle
from mope_deploy.errors import BundleError, UsageError
from tests.device import tiny

pytestmark = pytest.mark.device


def snapshot(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_overwrite_only_when_asked_and_only_a_bundle(bundle_copy: Path, graph_file: Path, tmp_path: Path) -> None:
    before = snapshot(bundle_copy)
    files = tiny.files(graph_file)
    with pytest.raises(UsageError, match="exists"):
        write_bundle(bundle_copy, files=files, manifest=tiny.manifest())
    assert snapshot(bundle_copy) == before
    write_bundle(bundle_copy, files=files, manifest=tiny.manifest(name="second"), overwrite=True)
    assert Bundle.open(bundle_copy).manifest.name == "second"
    for name in ("folder", "file", "link"):
        target = tmp_path / name
        {"folder": target.mkdir, "file": target.touch, "link": lambda t=target: t.symlink_to(bundle_copy)}[name]()
        with pytest.raises(UsageError, match="not a bundle"):
            write_bundle(target, files=files, manifest=tiny.manifest(), overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "file", "folder", "link"]


@pytest.mark.parametrize("when", ["manifest", "golden", "source", "copy", "exchange", "rename", "interrupt"])
def test_a_failure_leaves_the_old_bundle(
    bundle_copy: Path, graph_file: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    before = snapshot(bundle_copy)
    files, manifest, error = tiny.files(graph_file), tiny.manifest(name="second"), BundleError
    if when == "manifest":
        manifest["task"]["labels"] = ["a"]
    elif when == "golden":
        files["golden/outputs.npz"] = b"nothing"
    elif when == "source":
        files["model.onnx"] = bundle_copy / "absent.onnx"
    elif when == "exchange":

        def refuse(*_: Any) -> bool:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("mope_deploy.files.place._exchange", refuse)
    elif when == "rename":
        monkeypatch.setattr("mope_deploy.files.place._exchange", lambda *_: False)
        rename = Path.rename

        def fail(self: Path, target: Path) -> Path:
            if self.name.endswith(".tmp"):
                raise OSError(28, "No space left on device")
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", fail)
    else:
        error = KeyboardInterrupt if when == "interrupt" else BundleError

        def stop(*_: Any) -> None:
            raise KeyboardInterrupt if when == "interrupt" else OSError(28, "No space left on device")

        monkeypatch.setattr(shutil, "copyfile", stop)
    with pytest.raises(error):
        write_bundle(bundle_copy, files=files, manifest=manifest, overwrite=True)
    monkeypatch.undo()
    assert snapshot(bundle_copy) == before
    assert [p.name for p in bundle_copy.parent.iterdir()] == [bundle_copy.name]


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "manifest.json", "a/../../evil"])
def test_nothing_is_written_outside(tmp_path: Path, graph_file: Path, name: str) -> None:
    files = {**tiny.files(graph_file), name: b"evil"}
    with pytest.raises(BundleError):
        write_bundle(tmp_path / "in" / "b", files=files, manifest=tiny.manifest())
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_that_is_no_json(tmp_path: Path, graph_file: Path) -> None:
    for bad in (float("nan"), {1, 2}, b"x"):
        with pytest.raises(BundleError):
            write_bundle(
                tmp_path / "b",
                files=tiny.files(graph_file),
                manifest=tiny.manifest(parity={"report": None, "figures": bad}),
            )
    assert list(tmp_path.iterdir()) == []


def test_folders_are_as_readable_as_others(bundle_path: Path) -> None:
    mask = os.umask(0o022)
    os.umask(mask)
    assert bundle_path.stat().st_mode & 0o777 == 0o777 & ~mask
