"""Our export as a command of optimum's own command line, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mope_deploy import load


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    target = tmp_path_factory.mktemp("optimum") / "bundle"
    command = [Path(sys.executable).with_name("optimum-cli"), "export", "mope", run, target, "--fuse"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=target.parent)
    return done, target


def test_exports_a_bundle(exported: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    done, target = exported
    assert done.returncode == 0, done.stderr
    assert "model.onnx against the eager model" in done.stdout
    assert f"mope verify {target}" in done.stdout
    assert load(target).verify().samples == 8


def test_the_same_run_gives_the_same_graph_to_the_byte(
    exported: tuple[subprocess.CompletedProcess[str], Path], bundle: Path
) -> None:
    _, target = exported
    for name in ("model.onnx", "model.onnx.data", "model.fused.onnx", "golden/outputs.npz"):
        assert (target / name).read_bytes() == (bundle / name).read_bytes(), name


def test_says_nothing_that_a_user_cannot_act_on(exported: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    """torch's exporter, transformers and ONNX Runtime are talkative."""
    done, _ = exported
    steps = [line for line in done.stderr.splitlines() if line.endswith("…")]
    assert done.stderr.splitlines() == steps
    assert len(steps) >= 5


def test_misuse_leaves_with_our_exit_code(tmp_path: Path) -> None:
    command = [Path(sys.executable).with_name("optimum-cli"), "export", "mope", tmp_path / "nothing", tmp_path / "b"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: there is nothing at {tmp_path / 'nothing'}")
    assert not (tmp_path / "b").exists()
