"""examples/plain_onnxruntime.py gives the library's numbers without importing the library."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mope_deploy.bundle import write_bundle
from mope_deploy.predictor import load
from tests.device import tiny

pytestmark = pytest.mark.device

EXAMPLE = Path(__file__).parents[2] / "examples" / "plain_onnxruntime.py"


def test_imports_nothing_of_ours() -> None:
    tree = ast.parse(EXAMPLE.read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    packages = {name.partition(".")[0] for name in names} - {"__future__", "json", "sys", "pathlib"}
    assert packages == {"numpy", "onnxruntime", "PIL", "tokenizers"}


@pytest.mark.parametrize("bundle", ["bundle_path", "split_path"])
def test_gives_the_same_probabilities(bundle: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    bundle_path = request.getfixturevalue(bundle)
    tiny.picture(2, (30, 13)).convert("RGBA").save(tmp_path / "a.png")
    text = "the green card is odd not blue not seven left of the red card"
    command = [sys.executable, str(EXAMPLE), str(bundle_path), str(tmp_path / "a.png"), text]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    want = load(bundle_path).predict(image=tmp_path / "a.png", text=text).probabilities
    assert json.loads(done.stdout) == pytest.approx(dict(want), abs=1e-7)
    done = subprocess.run(command[:3], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "usage" in done.stderr


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(8, 8), (9, 11)])
def test_prepares_images_to_the_last_bit(tmp_path: Path, mode: str, size: tuple[int, int]) -> None:
    from dataclasses import asdict, replace

    from mope_deploy.preprocess import Preprocessing

    namespace: dict = {"__name__": "example"}
    exec(compile(EXAMPLE.read_text(encoding="utf-8"), str(EXAMPLE), "exec"), namespace)
    resize = (10, 10) if size[0] == size[1] else (10, 13)
    spec = replace(
        tiny.IMAGE, height=size[0], width=size[1], crop_mode=mode, resize_height=resize[0], resize_width=resize[1]
    )
    preparing = Preprocessing(spec, None)
    for width, height in [(8, 8), (3, 5), (31, 12), (12, 31), (10, 10)]:
        tiny.picture(width, (width, height)).save(tmp_path / "a.png")
        want = preparing.normalise(preparing.load_image(tmp_path / "a.png")[None])
        np.testing.assert_array_equal(namespace["read_image"](tmp_path / "a.png", asdict(spec)), want)


def test_multi_label(graph_file: Path, tmp_path: Path) -> None:
    task = {"type": "multi-label", "labels": list(tiny.LABELS), "threshold": 0.5}
    bundle = write_bundle(tmp_path / "b", files=tiny.files(graph_file), manifest=tiny.manifest(task=task)).path
    tiny.picture(0, (9, 9)).save(tmp_path / "a.png")
    command = [sys.executable, str(EXAMPLE), str(bundle), str(tmp_path / "a.png"), "red"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    want = load(bundle).predict(image=tmp_path / "a.png", text="red").probabilities
    assert json.loads(done.stdout) == pytest.approx(dict(want), abs=1e-7)
