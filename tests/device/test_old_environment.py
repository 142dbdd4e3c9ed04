"""The device tests once more, in the oldest environment that is promised: Python 3.10, numpy 1.26, onnxruntime 1.18.

Runs wherever a python3.10 that works is on the machine: on PATH, or among pyenv's and uv's versions. The environment is
made once (tens of seconds, 400 MB) in the folder for temporary files and used again; it is made anew when its list
of packages changes. The graph that the tests need is built here, where the onnx package is, and handed over as a file.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.device.conftest import GRAPH

REPOSITORY = Path(__file__).parents[2]
PACKAGES = (
    "numpy==1.26.4",
    "onnxruntime==1.18.1",
    "matplotlib",
    "msgspec",
    "nvidia-ml-py",
    "pillow",
    "tokenizers",
    "typer",
    "rich",
    "soundfile",
    "av",
    "pytest",
)
UNREACHABLE = (
    "Failed to establish a new connection",
    "Temporary failure in name resolution",
    "Name or service not known",
    "Network is unreachable",
    "Connection refused",
    "ProxyError",
    "Read timed out",
)


def candidates() -> Iterator[Path]:
    names = ("python3.10", "python3.10.exe")
    yield from (Path(found) for name in names if (found := shutil.which(name)))
    home = Path.home()
    for versions in (Path(os.environ.get("PYENV_ROOT", home / ".pyenv")) / "versions", home / ".local/share/uv/python"):
        yield from sorted(versions.glob("*3.10*/bin/python3.10"))


def working_python() -> Path | None:
    """The first candidate that runs, is a 3.10 and can make environments: a pyenv shim may exist and do none of it."""
    probe = "import sys, venv, ensurepip; print(sys.version_info[:2] == (3, 10))"
    for python in candidates():
        try:
            done = subprocess.run([python, "-c", probe], capture_output=True, text=True, timeout=60, check=False)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if done.returncode == 0 and done.stdout.strip() == "True":
            return python
    return None


def environment(python: Path, packages: tuple[str, ...] = PACKAGES, *, name: str = "old-device") -> Path:
    """Python of the environment, made if it is not there yet."""
    key = hashlib.sha256(repr((str(python), packages)).encode()).hexdigest()[:12]
    root = Path(tempfile.gettempdir()) / f"mope-deploy-tests-{os.getuid()}"
    root.mkdir(mode=0o700, exist_ok=True)
    if root.stat().st_uid != os.getuid():
        pytest.fail(f"{root} belongs to another user")
    folder = root / f"{name}-{key}"
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "complete").exists():
            shutil.rmtree(folder, ignore_errors=True)
            subprocess.run([python, "-m", "venv", folder], check=True, capture_output=True)
            install(folder / "bin" / "python", packages)
            (folder / "complete").touch()
    return folder / "bin" / "python"


def install(python: Path, packages: tuple[str, ...]) -> None:
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--retries", "1", *packages]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    if any(sign in done.stderr for sign in UNREACHABLE):
        pytest.skip("the package index is unreachable, so the environment cannot be made")
    pytest.fail(f"pip could not make the environment:\n{done.stderr[-3000:]}")


@pytest.fixture(scope="module")
def old_python() -> Path:
    python = working_python()
    if python is None:
        pytest.skip("no working python3.10 on this machine")
    return environment(python)


def clean(**added: str) -> dict[str, str]:
    """This process's environment without what would lead the other Python to this one's packages."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV", "PYTEST"))}
    return {**kept, "PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1", **added}


def test_the_environment_is_the_old_one(old_python: Path) -> None:
    code = "import sys, numpy, onnxruntime; print(sys.version_info[:2], numpy.__version__, onnxruntime.__version__)"
    done = subprocess.run([old_python, "-c", code], capture_output=True, text=True, env=clean(), check=True)
    assert done.stdout.strip() == "(3, 10) 1.26.4 1.18.1"
    code = "import importlib.util as u; print([n for n in ('torch', 'timm', 'transformers', 'onnx') if u.find_spec(n)])"
    done = subprocess.run([old_python, "-c", code], capture_output=True, text=True, env=clean(), check=True)
    assert done.stdout.strip() == "[]"


def test_device_tests_pass_there(old_python: Path, graph_file: Path, tmp_path: Path) -> None:
    # Without --confcutdir, pytest would read tests/conftest.py, which may need what is not there.
    arguments = ["-m", "device", "-q", "-p", "no:cacheprovider", "--confcutdir", "tests/device", "tests/device"]
    command = [old_python, "-m", "pytest", *arguments, "--basetemp", tmp_path / "old"]
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, env=clean(**{GRAPH: str(graph_file)}), check=False
    )
    report = (done.stdout + done.stderr)[-6000:]
    assert done.returncode == 0, report
    summary = done.stdout.strip().splitlines()[-1]
    passed = int(summary.split(" passed")[0].split()[-1])
    assert passed > 400, report
    assert "skipped" not in summary, report


def test_an_exported_model_runs_there(old_python: Path, tmp_path: Path) -> None:
    """Not these tests' hand-made graph but a MoPE as mope-export writes it, TopK and Gather included."""
    from export.pipeline import export_bundle
    from tests.export.runs import write_data
    from tests.tiny import bert_folder, tiny_model, vit_folder

    model = tiny_model(vit_folder(tmp_path / "vit"), bert_folder(tmp_path / "bert"), top_k=1)
    data = write_data(tmp_path / "data")
    bundle = export_bundle(model, tmp_path / "bundle", data=data)

    def mope(python: Path | str, *arguments: object) -> str:
        command = [python, "-c", "import sys; from mope_deploy.cli import main; sys.exit(main())", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=clean(), cwd=tmp_path, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "bundle is as it was exported" in mope(old_python, "verify", bundle)
    rows = {}
    for python in (old_python, sys.executable):
        output = mope(python, "run", bundle, "--data", data, "--routing")
        rows[python] = [json.loads(line) for line in output.splitlines()]
    old, new = rows.values()
    assert len(old) == len(new) == len(data.read_text().splitlines())
    for a, b in zip(old, new, strict=True):
        assert a["probabilities"] == pytest.approx(b["probabilities"], abs=1e-5)
        assert [layer.index(max(layer)) for layer in a["routing"]] == [
            layer.index(max(layer)) for layer in b["routing"]
        ]


def test_a_shim_that_does_not_work_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shim = tmp_path / "bin" / "python3.10"
    shim.parent.mkdir()
    shim.write_text("#!/bin/sh\nexit 127\n")
    shim.chmod(0o755)
    other = tmp_path / "versions" / "3.10.0" / "bin" / "python3.10"
    other.parent.mkdir(parents=True)
    other.symlink_to(sys.executable)  # works, and is no 3.10
    monkeypatch.setenv("PATH", str(shim.parent))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert list(candidates()) == [shim, other]
    assert working_python() is None
