"""Files and folders are the old one or the new one, whatever happens and whenever."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mope_deploy.errors import BundleError, EngineError
from mope_deploy.files import json_bytes, reason, sha256, whole_file, whole_folder, write_file

pytestmark = pytest.mark.device

FULL = OSError(28, "No space left on device")


def write(path: Path) -> None:
    write_file(path, "new", error=EngineError)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # disks of busy machines are slow


def fill(path: Path) -> None:
    with whole_folder(path, error=EngineError) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("new")
        (folder / "other").write_text("new")


def state(path: Path) -> Any:
    """Everything in a file or folder; None where there is nothing."""
    if path.is_dir():
        return {p.relative_to(path).as_posix(): p.read_text() for p in sorted(path.rglob("*")) if p.is_file()}
    return path.read_text() if path.exists() else None


def failing_at(step: int, failure: BaseException, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the ``step``-th of the calls that change a disk fail; the list fills with those that were made."""
    calls: list[str] = []

    def watched(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def one(*arguments: Any, **options: Any) -> Any:
            calls.append(name)
            if len(calls) == step:
                raise failure
            return call(*arguments, **options)

        return one

    for owner, names in ((os, ("fsync", "replace", "open")), (Path, ("rename", "mkdir", "write_bytes", "write_text"))):
        for name in names:
            monkeypatch.setattr(owner, name, watched(name, getattr(owner, name)))
    return calls


@pytest.fixture(params=[True, False], ids=["exchange", "two renames"])
def exchange(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Systems that can exchange two folders at once, and those that cannot."""
    if not request.param:
        monkeypatch.setattr("mope_deploy.files.place._exchange", lambda *_: False)


@pytest.mark.usefixtures("exchange")
@pytest.mark.parametrize("failure", [FULL, KeyboardInterrupt()], ids=["full", "interrupt"])
@pytest.mark.parametrize("old", [True, False], ids=["replacing", "new"])
@pytest.mark.parametrize("make", [write, fill])
def test_a_failure_at_any_point_leaves_the_old_or_the_new_one(
    make: Callable[[Path], None], old: bool, failure: BaseException, tmp_path: Path
) -> None:
    (tmp_path / "wanted").mkdir()
    make(tmp_path / "wanted" / "target")
    new = state(tmp_path / "wanted" / "target")
    failures = 0
    for step in range(1, 100):
        target = tmp_path / str(step) / "target"
        target.parent.mkdir()
        if old and make is write:
            target.write_text("old")
        elif old:
            target.mkdir()
            (target / "file").write_text("old")
        before = state(target)
        with pytest.MonkeyPatch.context() as patch:
            calls = failing_at(step, failure, patch)
            try:
                make(target)
                failed = False
            except KeyboardInterrupt:
                failed = True
            except EngineError as error:
                failed = "target cannot be written; received No space" in str(error)
                assert failed
        assert state(target) in (before, new)
        if not failed:
            assert state(target) == new
        left = [p.name for p in target.parent.iterdir() if p.name != "target"]
        # The old folder may outlive a failure to remove it, once the new one stands; the next writer removes it.
        assert left == [] or state(target) == new
        make(target)
        assert [p.name for p in target.parent.iterdir()] == ["target"]
        failures += failed
        if len(calls) < step:
            break
    assert failures >= 3
    assert state(target) == new


def test_a_failure_while_it_is_written_leaves_the_old_one(tmp_path: Path) -> None:
    def half_a_file() -> None:
        with whole_file(tmp_path / "a") as temporary:
            temporary.write_text("half")
            raise ZeroDivisionError

    def half_a_folder() -> None:
        with whole_folder(tmp_path / "b") as folder:
            (folder / "x").write_text("half")
            raise ZeroDivisionError

    (tmp_path / "a").write_text("old")
    for half in (half_a_file, half_a_folder):
        with pytest.raises(ZeroDivisionError):
            half()
    assert state(tmp_path) == {"a": "old"}


def test_a_process_that_is_killed_leaves_the_old_one(tmp_path: Path) -> None:
    """No code of ours runs after that: only what reached the name counts."""
    (tmp_path / "a").write_text("old")
    code = (
        "import os, sys; from mope_deploy.files import whole_file\n"
        "with whole_file(sys.argv[1]) as file: file.write_text('half'); os._exit(7)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "a"], check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 7
    assert (tmp_path / "a").read_text() == "old"


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "a")
    (tmp_path / "dangling").symlink_to(tmp_path / "folder" / "b")
    for name in ("link", "dangling"):
        write(tmp_path / name)
        assert (tmp_path / name).is_symlink()
    assert state(tmp_path / "folder") == {"a": "new", "b": "new"}


@pytest.mark.parametrize("redirected", [True, False], ids=["file", "pipe"])
def test_standard_output_is_written_to_wherever_it_leads(tmp_path: Path, redirected: bool) -> None:
    code = "from mope_deploy.files import write_file; write_file('/dev/stdout', 'new')"
    root = Path(__file__).parents[2]
    with (tmp_path / "out").open("wb") as file:
        where = file if redirected else subprocess.PIPE
        done = subprocess.run([sys.executable, "-c", code], stdout=where, stderr=subprocess.PIPE, check=False, cwd=root)
    assert done.returncode == 0, done.stderr
    assert ((tmp_path / "out").read_bytes() if redirected else done.stdout) == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_pipe_is_handed_out_itself(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with whole_file(tmp_path / "pipe") as path:
        assert path == tmp_path / "pipe"


def test_what_stands_in_the_way_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="cannot be written; received Is a directory"):
        write(tmp_path)
    with pytest.raises(EngineError, match="cannot be written; received No such file or directory"):
        write(tmp_path / "none" / "a")
    (tmp_path / "file").write_text("x")
    with pytest.raises(EngineError, match=r"file/a cannot be written; received (Not a directory|File exists)"):
        fill(tmp_path / "file" / "a")
    assert state(tmp_path) == {"file": "x"}


def test_folders_that_nobody_may_write_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the system says it of a read-only disk, which stops root as well."""

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    monkeypatch.setattr(Path, "mkdir", refuse)
    for make in (write, fill):
        with pytest.raises(EngineError, match="target cannot be written; received Read-only file system"):
            make(tmp_path / "target")


def test_a_folder_that_cannot_be_synced_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def only_files(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").is_dir():
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "fsync", only_files)
    write(tmp_path / "a")
    fill(tmp_path / "b")
    assert state(tmp_path) == {"a": "new", "b/inner/file": "new", "b/other": "new"}


def test_errors_of_the_block_are_its_own(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="mine"), whole_file(tmp_path / "a", error=EngineError):
        raise BundleError("mine")


def test_the_hash_is_that_of_all_bytes(tmp_path: Path) -> None:
    for size in (0, 1, 2**20, 2**20 + 1):
        data = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
        (tmp_path / "a").write_bytes(data)
        assert sha256(tmp_path / "a") == hashlib.sha256(data).hexdigest()


def test_documents(tmp_path: Path) -> None:
    assert json_bytes({"é": [1, None]}) == '{\n  "é": [\n    1,\n    null\n  ]\n}\n'.encode()
    endless: dict[str, Any] = {}
    endless["a"] = endless
    for bad in ({"a": float("nan")}, {"a": {1}}, {"a": b"x"}, endless):
        with pytest.raises(ValueError, match=r"."):
            json_bytes(bad)


def test_reasons_are_one_short_line() -> None:
    assert reason(FULL) == "No space left on device"
    assert reason(ValueError("a\n  b" + "c" * 500)) == "a b" + "c" * 197
    assert reason(ValueError()) == "ValueError"
