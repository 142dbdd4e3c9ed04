"""Bundles that are replaced while they are loaded: never the labels of one and the weights of another."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import mope_deploy
from mope_deploy.bundle import Bundle
from mope_deploy.errors import BundleError, UsageError
from tests.device.damage import exchange, rewrite

pytestmark = pytest.mark.device


@pytest.fixture
def two(tmp_path: Path, bundle_path: Path) -> tuple[Path, Path]:
    """Two bundles that differ in their labels and in one byte of their graph that nothing computes with."""
    shutil.copytree(bundle_path, tmp_path / "a")
    shutil.copytree(bundle_path, tmp_path / "b")
    graph = (bundle_path / "model.onnx").read_bytes()
    exchange(tmp_path / "b", "model.onnx", graph + b"\x7a\x00")  # an empty doc_string … of the same meaning
    rewrite(tmp_path / "b", lambda document: document["task"].update(labels=[f"b{i}" for i in range(3)]))
    return tmp_path / "a", tmp_path / "b"


@contextlib.contextmanager
def swapping(swap: Callable[[], object]) -> Iterator[None]:
    """``swap`` again and again, while the block runs."""
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            swap()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def renamed(here: Path, other: Path) -> Callable[[], None]:
    """Three renames: both bundles exchange their names."""

    def swap() -> None:
        here.rename(here.with_name("between"))
        other.rename(here)
        here.with_name("between").rename(other)

    return swap


def linked(here: Path, a: Path, b: Path) -> Callable[[], None]:
    """A link that leads to the one or the other, replaced in one operation."""
    turn = iter(range(10**9))
    here.symlink_to(a)

    def swap() -> None:
        new = here.with_name("new")
        new.symlink_to((a, b)[next(turn) % 2])
        os.replace(new, here)

    return swap


def file_by_file(here: Path, a: Path, b: Path) -> Callable[[], None]:
    """Each file for itself, as ``cp`` and ``rsync`` do."""
    turn = iter(range(10**9))

    def swap() -> None:
        source = (a, b)[next(turn) % 2]
        for name in ("manifest.json", "model.onnx"):
            shutil.copyfile(source / name, here.with_name("new"))
            os.replace(here.with_name("new"), here / name)

    return swap


@pytest.mark.parametrize(("how", "loads"), [("renamed", 150), ("linked", 40), ("file by file", 8)])
def test_labels_and_weights_are_of_one_bundle(
    two: tuple[Path, Path], how: str, loads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a session reads is looked at as it is opened: it has the hash that the manifest of the labels has."""
    a, b = two
    if how == "renamed":
        here, swap = a, renamed(a, b)
    elif how == "linked":
        here = a.with_name("current")
        swap = linked(here, a, b)
    else:
        here = a.with_name("current")
        shutil.copytree(a, here)
        swap = file_by_file(here, a, b)
    read: dict[Path, bytes] = {}

    def open_session(bundle: Bundle, **_: Any) -> Any:
        read[bundle.path] = (bundle.path / "model.onnx").read_bytes()
        return SimpleNamespace(name="onnxruntime", inputs=())

    monkeypatch.setattr("mope_deploy.predictor.open_session", open_session)
    loaded = refused = 0
    with swapping(swap):
        for _ in range(loads):
            try:
                predictor = mope_deploy.load(here)
            except (BundleError, UsageError):
                refused += 1
                continue
            loaded += 1
            graph = read[predictor.bundle.path]
            assert graph.endswith(b"\x7a\x00") == (predictor.labels[0] == "b0")
    assert loaded + refused == loads
    assert loaded or how != "linked"
    assert mope_deploy.load(here).labels, "at rest it loads"


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("how", ["renamed", "linked"])
def test_another_bundle_while_a_session_opens(
    two: tuple[Path, Path], how: str, back: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under its name there is another one as the graph is read, and afterwards the first again or not."""
    a, b = two
    here = a if how == "renamed" else a.with_name("current")
    swap = renamed(a, b) if how == "renamed" else linked(here, b, a)
    if how == "linked":
        here.unlink()
        here.symlink_to(a)
    read = []

    def open_session(bundle: Bundle, **_: Any) -> Any:
        swap()
        read.append(bundle.file("model.onnx").read_bytes())
        if back:
            swap()
        return SimpleNamespace(name="onnxruntime", inputs=())

    monkeypatch.setattr("mope_deploy.predictor.open_session", open_session)
    if how == "renamed":
        with pytest.raises(BundleError, match="was changed while it was being read"):
            mope_deploy.load(here)
    else:  # where the link led to as it was opened is where all is read
        assert mope_deploy.load(here).labels[0] != "b0"
        assert not read[0].endswith(b"\x7a\x00")


def test_a_change_after_opening_is_seen(bundle_copy: Path) -> None:
    opened = Bundle.open(bundle_copy)
    opened.check_unchanged()
    graph = bundle_copy / "model.onnx"
    data = graph.read_bytes()
    graph.write_bytes(data)  # the same bytes, but who knows what was there between
    with pytest.raises(BundleError, match="was changed while it was being read"):
        opened.check_unchanged()
    opened = Bundle.open(bundle_copy)
    (bundle_copy / "engines").mkdir()
    opened.check_unchanged()  # the one thing that a device adds itself
    opened = Bundle.open(bundle_copy)
    os.rename(bundle_copy, bundle_copy.with_name("away"))
    os.rename(bundle_copy.with_name("away"), bundle_copy)
    with pytest.raises(BundleError, match="was changed"):
        opened.check_unchanged()


def test_tokenizer_and_goldens_are_hashed_as_they_are_read(bundle_copy: Path) -> None:
    opened = Bundle.open(bundle_copy)
    for name in ("tokenizer.json", "golden/inputs.npz"):
        file = bundle_copy / name
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    with pytest.raises(BundleError, match=r"tokenizer\.json was altered"):
        _ = opened.preprocessing
    with pytest.raises(BundleError, match=r"inputs\.npz was altered"):
        opened.golden()
