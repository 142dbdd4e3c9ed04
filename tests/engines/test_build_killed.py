"""A build that is killed, whenever: no orphan works on, and an engine never stands beside another one's sidecar."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.reliability.kills import run_killed
from mope_deploy.bundle import Bundle
from mope_deploy.engines.listing import built_engines
from mope_deploy.engines.tensorrt.build import build_engine
from mope_deploy.engines.tensorrt.pair import building, put_sidecar
from mope_deploy.engines.tensorrt.sidecar import EngineFiles, Sidecar, engine_files
from mope_deploy.errors import UsageError
from mope_deploy.files import sha256
from tests.engines.conftest import left


def replace(files: EngineFiles, engine: bytes) -> None:
    """As a build does, with another engine; its sidecar is the old one's but for what it says of the file."""
    with building(files) as staged:
        staged.write_bytes(engine)
        document = json.loads(files.sidecar.read_text(encoding="utf-8"))
        document["engine"] = {"sha256": sha256(staged), "bytes": len(engine)}
        put_sidecar(files, json.dumps(document).encode())


def test_killed_at_any_operation_engine_and_sidecar_belong_together(built: Bundle) -> None:
    files = engine_files(built, built.graph(), "tensorrt_rtx")
    before = {path: path.read_bytes() for path in (files.engine, files.sidecar)}
    new = before[files.engine] + b"new"
    found, step, killed = [], 0, True
    while killed:
        for path, content in before.items():
            path.write_bytes(content)
        killed = run_killed(lambda: replace(files, new), at=step, below=built.path)
        ((_, opened),) = built_engines(built, "model")
        assert Sidecar.read(opened.sidecar).engine.sha256 == sha256(opened.engine), f"killed at operation {step}"
        found.append(opened.engine.read_bytes() == new)
        step += 1
    assert found[0] is False
    assert found[-1] is True
    assert step > 8
    replace(files, new)
    assert left(built) == [files.engine.name, files.sidecar.name]


def test_one_engine_is_built_by_one_process_at_a_time(built: Bundle) -> None:
    files = engine_files(built, built.graph(), "tensorrt_rtx")
    before = sha256(files.engine), files.sidecar.read_bytes()

    def fail() -> None:
        with building(files) as staged:
            staged.write_bytes(b"half")
            with pytest.raises(UsageError, match=f"is in use by process {os.getpid()}"):
                build_engine(built, compute="8.6")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (sha256(files.engine), files.sidecar.read_bytes()) == before
    assert left(built) == [files.engine.name, files.sidecar.name]


def test_an_interrupt_after_the_engine_took_its_place_takes_the_sidecar_along(
    built: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = engine_files(built, built.graph(), "tensorrt_rtx")
    new = files.engine.read_bytes() + b"new"

    def interrupted(path: Path) -> None:
        if path == files.engine.parent and files.engine.read_bytes() == new:
            raise KeyboardInterrupt

    monkeypatch.setattr("mope_deploy.files.whole.flush", interrupted)
    with pytest.raises(KeyboardInterrupt):
        replace(files, new)
    assert Sidecar.read(files.sidecar).engine.sha256 == sha256(files.engine)
    assert left(built) == [files.engine.name, files.sidecar.name]


BUILDS = """
import sys
from mope_deploy.bundle import Bundle
from mope_deploy.engines.tensorrt import worker
from mope_deploy.engines.tensorrt.build import build_engine
build_engine(Bundle.open(sys.argv[1]), compute="8.6")
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_builder_outlives_the_build(number: int, bundle: Bundle) -> None:
    process = subprocess.Popen([sys.executable, "-c", BUILDS, str(bundle.path)], stderr=subprocess.DEVNULL)
    worker = _wait_for(lambda: _children(process.pid))
    process.send_signal(number)
    process.wait()
    _wait_for(lambda: not Path(f"/proc/{worker[0]}").exists() or _is_zombie(worker[0]))
    assert all(name.endswith(".lock") for name in left(bundle)), left(bundle)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _is_zombie(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def _wait_for(ask):  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + 30
    while not (found := ask()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found
