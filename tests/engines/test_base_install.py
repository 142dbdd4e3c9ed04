"""``mope build`` where only the base install and tensorrt_rtx are: no onnx, no onnxruntime, no torch.

The environment is made once, in the folder for temporary files, like that of tests/device/test_old_environment.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

from mope_deploy.bundle import Bundle
from mope_deploy.engines.tensorrt.sidecar import Sidecar
from tests.device.test_old_environment import REPOSITORY, clean, environment

ABSENT = ("onnx", "onnxruntime", "torch", "timm", "transformers", "safetensors")


@pytest.fixture(scope="module")
def base_python() -> Path:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    packages = (*project["dependencies"], *project["optional-dependencies"]["rtx"])
    return environment(Path(sys.executable), packages, name="base-rtx")


def run(python: Path, code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [python, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=clean(CUDA_VISIBLE_DEVICES=""), check=False)


def test_the_environment_has_nothing_else(base_python: Path) -> None:
    code = f"import importlib.util as u, json; print(json.dumps([n for n in {ABSENT} if u.find_spec(n)]))"
    assert json.loads(run(base_python, code).stdout) == []


def test_mope_build_there(base_python: Path, bundle: Bundle) -> None:
    main = "import sys; from mope_deploy.cli import main; sys.exit(main())"
    done = run(base_python, main, "build", bundle.path, "--compute", "8.6,8.9", "--batch", "1:2:4")
    assert done.returncode == 0, done.stderr
    assert "built, not run here" in done.stdout
    sidecar = Sidecar.read(bundle.path / "engines/model.tensorrt_rtx.json")
    assert (sidecar.compute_capabilities, sidecar.precision.products) == (("8.6", "8.9"), {"float32": 3})
    # Without onnxruntime the error is about the engine that was built, not about what was never installed.
    done = run(base_python, main, "verify", bundle.path)
    assert done.returncode == 1
    assert "model.tensorrt_rtx.engine needs a GPU to run" in done.stderr
    done = run(base_python, main, "info", bundle.path)
    assert done.returncode == 0, done.stderr
    assert "which is not installed" in done.stdout
