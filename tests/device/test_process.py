"""What belongs to the whole process is left as it was: by threads that load and predict at once, and after a fork."""

from __future__ import annotations

import copy
import io
import json
import locale
import logging
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import typer
from PIL import Image, ImageFile

from mope_deploy.bundle import Bundle
from mope_deploy.console import run_app
from mope_deploy.engines import open as opening
from mope_deploy.engines import open_session
from mope_deploy.engines.onnxruntime.library import TELEMETRY_OFF
from mope_deploy.engines.tensorrt.cuda import Cuda
from mope_deploy.errors import UsageError
from mope_deploy.predictor import load
from tests.device import tiny

pytestmark = pytest.mark.device


def whole_process() -> dict[str, Any]:
    """What a library must leave alone."""
    loggers = {None, *logging.root.manager.loggerDict}
    return {
        "streams": (sys.stdout, sys.stderr, sys.excepthook),
        "warnings": (list(warnings.filters), warnings.showwarning),
        "environment": dict(os.environ),
        "locale": locale.setlocale(locale.LC_ALL),
        "logs": {name: (logging.getLogger(name).level, logging.getLogger(name).handlers[:]) for name in loggers},
        "logs off": logging.root.manager.disable,
        "random": (random.getstate(), np.random.get_state()[1].tobytes(), np.random.get_state()[2]),
        "numpy": np.geterr(),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)],
        "folders": (os.getcwd(), tempfile.tempdir),
        "sockets": socket.getdefaulttimeout(),
        "pillow": (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES),
    }


def picture_with_a_warning() -> bytes:
    """A JPEG whose EXIF ends too early, which Pillow warns about and shows."""
    buffer, exif = io.BytesIO(), b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\x03\0\x01\0\0\0"
    Image.new("RGB", (8, 8), (200, 10, 10)).save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


def test_threads_leave_the_process_as_it_was(
    bundle_path: Path, split_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "exif.jpg").write_bytes(picture_with_a_warning())
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    real, swapped, workers = sys.stdout, [], 8
    together = threading.Barrier(workers)

    class Watching(onnxruntime.InferenceSession):
        def __init__(self, *given: Any, **more: Any) -> None:
            swapped.append(sys.stdout is not real)
            super().__init__(*given, **more)
            swapped.append(sys.stdout is not real)

    monkeypatch.setattr(onnxruntime, "InferenceSession", Watching)
    load(bundle_path, threads=1)
    Image.init()  # Pillow reads its plugins once
    before = whole_process()

    def work(index: int) -> None:
        for turn in range(2):
            together.wait()
            predictor = load(split_path if index % 2 else bundle_path, threads=1)
            predictor.predict(image=[tmp_path / "exif.jpg"] * 4, text="red")
            with pytest.raises(Exception, match="bad"):
                predictor.predict(image=tmp_path / "bad.jpg", text="red")
            if turn == 0:
                predictor.verify()

    with warnings.catch_warnings(record=True) as heard, ThreadPoolExecutor(workers) as pool:
        warnings.simplefilter("always")
        inside = list(warnings.filters)
        list(pool.map(work, range(workers)))
        assert list(warnings.filters) == inside
    assert any("EXIF" in str(one.message) for one in heard)  # there was something to hide
    assert not any(swapped)
    after = whole_process()
    for name, value in before.items():
        assert after[name] == value, name


def test_a_command_hides_warnings_that_are_not_for_its_user(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    app, picture = typer.Typer(), tmp_path / "exif.jpg"
    picture.write_bytes(picture_with_a_warning())

    @app.command()
    def command() -> None:
        tiny.preprocessing().load_image(picture)
        warnings.warn("mine", UserWarning, stacklevel=1)

    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        before = list(warnings.filters)
        assert run_app(app, []) == 0
        assert list(warnings.filters) == before
    assert [str(one.message) for one in heard] == ["mine"]


def test_cuda_is_not_started_without_need(bundle_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """cuInit alone makes CUDA unusable in processes that are forked off later."""

    def start(self: Cuda) -> None:
        pytest.fail("CUDA was started")

    monkeypatch.setattr(Cuda, "__init__", start)
    bundle = Bundle.open(bundle_path)
    assert open_session(bundle, engine="onnxruntime").name == "onnxruntime"
    monkeypatch.setattr(opening, "is_installed", lambda name: False)
    assert "no TensorRT is installed" in open_session(bundle).why


def run(code: str, home: Path, **environment: str) -> Any:
    """What ``code`` prints, as JSON, in a process of its own with a home of its own."""
    home.mkdir(exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if name not in (TELEMETRY_OFF, "CI", "GITHUB_ACTIONS")}
    folders = {name: str(home) for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "TMPDIR")}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**kept, **folders, "PYTHONDONTWRITEBYTECODE": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


CALLS_HOME = """
    import importlib.abc, json, os, sys, time

    class Watch(importlib.abc.MetaPathFinder):
        seen = []

        def find_spec(self, name, path, target=None):
            if name == "onnxruntime":
                self.seen.append(os.environ.get("ORT_DISABLE_TELEMETRY"))

    sys.meta_path.insert(0, Watch())
    from PIL import Image
    from mope_deploy import load

    predictor = load({bundle!r}, threads=1, engine="onnxruntime")
    predictor.predict(image=Image.new("RGB", (8, 8)), text="red")
    time.sleep(0.3)
    names = (f"/proc/self/fd/{{one}}" for one in os.listdir("/proc/self/fd"))
    opened = [os.readlink(name) for name in names if os.path.islink(name)]
    sockets = [name for name in opened if name.startswith("socket")]
    print(json.dumps([Watch.seen, sockets, len(os.listdir("/proc/self/task"))]))
"""


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="sockets and threads are read from Linux's /proc")
def test_nothing_calls_home(bundle_path: Path, tmp_path: Path) -> None:
    """No file in the user's folders, no socket, no thread of its own; and the variable stood before the import."""
    seen, sockets, threads = run(CALLS_HOME.format(bundle=str(bundle_path)), tmp_path / "home", OMP_NUM_THREADS="1")
    assert (seen, sockets) == (["1"], [])
    assert [path for path in (tmp_path / "home").rglob("*") if path.is_file()] == []
    assert threads <= 2  # Python's, and OpenBLAS's where there is one


def test_what_the_user_says_of_telemetry_stands(monkeypatch: pytest.MonkeyPatch, bundle_path: Path) -> None:
    monkeypatch.setenv(TELEMETRY_OFF, "0")
    load(bundle_path, threads=1)
    assert os.environ[TELEMETRY_OFF] == "0"


FORKS = """
    import json, os, signal, sys
    import numpy as np
    from PIL import Image
    from mope_deploy import load
    from mope_deploy.errors import EngineError

    def ask(predictor):
        return predictor.predict(image=Image.new("RGB", (8, 8), (9, 9, 9)), text="red").label

    def child(work):
        process = os.fork()
        if not process:
            signal.alarm(20)
            try:
                os._exit(work())
            finally:
                os._exit(99)
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

    one, two = (load({bundle!r}, threads=n, engine="onnxruntime") for n in (1, 2))
    wanted = ask(one), ask(two)

    def works():
        return 0 if ask(one) == wanted[0] else 1

    def says_why():
        global two
        try:
            ask(two)
        except EngineError as error:
            if "before its process was forked" not in str(error):
                return 2
            two = load({bundle!r}, threads=2, engine="onnxruntime")  # in the place of the other, which is let go
            return 0 if ask(two) == wanted[1] else 3
        return 4

    print(json.dumps([child(works), child(says_why)]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_after_a_fork_it_works_or_says_why_not(bundle_path: Path, tmp_path: Path) -> None:
    assert run(FORKS.format(bundle=str(bundle_path)), tmp_path / "home") == [0, 0]


def test_no_other_process_is_handed_a_predictor(bundle_path: Path) -> None:
    predictor = load(bundle_path, threads=1)
    for hand in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(UsageError, match=r"cannot be pickled.*call mope_deploy\.load\(") as caught:
            hand(predictor)
        assert str(bundle_path) in str(caught.value)
