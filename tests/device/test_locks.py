"""Who may work in a folder: one process, and nobody once it is dead."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.reliability.kills import run_killed
from mope_deploy.errors import BundleError, UsageError
from mope_deploy.files import claim, locked, whole_folder
from tests.device.test_files import quick

__all__ = ["quick"]  # a fixture

pytestmark = pytest.mark.device
ROOT = Path(__file__).parents[2]


def test_one_process_works_in_a_folder_and_the_other_is_named(tmp_path: Path) -> None:
    with locked(tmp_path):
        said = f"{tmp_path} is in use by process {os.getpid()}; wait until it ends"
        with pytest.raises(BundleError, match=said), locked(tmp_path, error=BundleError):
            pytest.fail("two at once")
        with locked(tmp_path, name=".other"):
            pass
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path):
        pass


def test_a_dead_process_locks_nothing_not_even_by_its_children(tmp_path: Path) -> None:
    """The child outlives its parent, as a data loader's worker may."""
    code = (
        "import os, sys, time; from mope_deploy.files import locked\n"
        "with locked(sys.argv[1]):\n"
        "  if os.fork() == 0: print('x', flush=True); time.sleep(60)\n"
        "  sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=ROOT, start_new_session=True, **pipes) as one:  # type: ignore[call-overload]
        try:
            assert one.stdout.read(1) == b"x"
            with pytest.raises(UsageError, match=f"is in use by process {one.pid}"), locked(tmp_path):
                pytest.fail("two at once")
            one.kill()
            one.wait(timeout=20)
            with locked(tmp_path):
                pass
        finally:
            os.killpg(one.pid, 9)


def test_a_forked_child_takes_no_lock_away(tmp_path: Path) -> None:
    with locked(tmp_path):
        child = os.fork()
        if child == 0:
            try:
                raise SystemExit  # leaves the block as its parent would
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        assert (tmp_path / ".lock").exists()
        with pytest.raises(UsageError, match="in use"), locked(tmp_path):
            pytest.fail("two at once")


@pytest.mark.parametrize("call", ["open", "flock"])
def test_where_nothing_can_be_locked_it_is_said(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A read-only disk; a file system without locks."""

    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr({"open": os, "flock": fcntl}[call], call, refuse)
    with locked(tmp_path):
        pass
    assert "cannot be locked (Read-only file system): see to it that no other" in " ".join(
        capsys.readouterr().err.split()
    )


def test_of_two_that_claim_a_folder_one_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    with claim(target) as folder:
        assert folder.is_dir()
        with pytest.raises(BundleError, match="b is being made by another process"), claim(target, error=BundleError):
            pytest.fail("two at once")
        assert folder.is_dir()
    assert not target.exists(), "nothing was put there"
    with claim(target), whole_folder(target) as new:
        (new / "file").write_text("new")
    with pytest.raises(UsageError, match="exists and is not empty; choose another name"), claim(target):
        pytest.fail("taken")
    assert (target / "file").read_text() == "new"
    (tmp_path / "file").touch()
    for taken in ("file", "file/a"):
        said = r"cannot be made; received (Not a directory|File exists)"
        with pytest.raises(UsageError, match=said), claim(tmp_path / taken):
            pytest.fail("taken")


def test_a_claim_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    def work() -> None:
        with claim(tmp_path / "a"):
            os.kill(os.getpid(), 9)

    assert run_killed(work, at=10**6, below=tmp_path)
    assert (tmp_path / "a").is_dir()
    with claim(tmp_path / "a") as folder:
        (folder / "file").touch()
    assert (tmp_path / "a" / "file").exists()


def test_many_claim_at_once_and_one_has_it(tmp_path: Path) -> None:
    """Each child claims, says what it got, and keeps it until it is ended."""
    reader, writer = os.pipe()
    children = []
    for _ in range(8):
        child = os.fork()
        if child == 0:
            with contextlib.suppress(UsageError), claim(tmp_path / "a"):
                os.write(writer, b"1")
                time.sleep(60)
            os.write(writer, b"0")
            os._exit(0)
        children.append(child)
    found = b""
    while len(found) < 8:
        found += os.read(reader, 8)
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert sorted(found) == sorted(b"00000001")
