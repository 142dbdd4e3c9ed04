"""``mope build`` and what the other commands say about engines."""

from __future__ import annotations

from pathlib import Path

import pytest
import tensorrt_rtx

from mope_deploy.bundle import Bundle
from tests.device import tiny
from tests.device.test_cli import mope  # noqa: F401  (a fixture)

VERSION = tensorrt_rtx.__version__


def test_build(mope, bundle: Bundle) -> None:  # noqa: F811
    done = mope("build", bundle.path, "--batch", "1:2:4", "--text-len", "2:6:12", "--compute", "8.6,12.0")
    assert done.code == 0, done.err
    assert done.err == f"building model with tensorrt_rtx {VERSION}\n"
    first, *lines = done.out.splitlines()
    assert first.startswith(f"{bundle.path}/engines/model.tensorrt_rtx.engine: 0.")
    assert lines[0] == f"tensorrt_rtx {VERSION}, for 8.6, 12.0; batch 1:2:4, text_length 2:6:12"
    assert lines[1].startswith("fp32, products: 3 of float32; ")
    assert lines[2].startswith("built, not run here: ")
    assert "before any prediction" in lines[3]


def test_every_other_command_still_works(mope, built: Bundle) -> None:  # noqa: F811
    done = mope("verify", built.path)
    assert done.code == 0
    assert "not part of the bundle" not in done.err
    assert done.err.startswith("engine: onnxruntime on CPUExecutionProvider, ")
    assert "model.tensorrt_rtx.engine needs a GPU to run" in done.err
    done = mope("run", built.path, "--image", built.path / "golden/0.png", "--text", "red")
    assert done.out.splitlines()[0] in tiny.LABELS
    assert "needs a GPU" in done.err
    shown = " ".join(mope("info", built.path).out.split())
    for words in (
        f"tensorrt_rtx here {VERSION}",
        "tensorrt here not installed",
        "onnxruntime here",
        f"engine model.tensorrt_rtx.engine tensorrt_rtx {VERSION}, for 8.6, 12.0; batch 1:2:4",
    ):
        assert words in shown


def test_an_exported_engine(mope, exported: Bundle) -> None:  # noqa: F811
    done = mope("verify", exported.path)
    assert done.code == 0
    assert "exported/model.tensorrt_rtx.engine needs a GPU to run" in done.err
    name = f"{exported.path}/engines/exported/model.tensorrt_rtx.engine"
    assert f"note: {name} was not run: {name} needs a GPU to run" in done.err
    done = mope("bench", exported.path, "--variants", "all", "--duration", "0.1")
    assert f"note: {name} was not measured: {name} needs a GPU to run" in done.err
    assert mope("build", exported.path, "--compute", "8.9").code == 0
    shown = " ".join(mope("info", exported.path).out.split())
    assert f" engine model.tensorrt_rtx.engine tensorrt_rtx {VERSION}, for 8.9; batch 1:4:16" in shown
    assert f" exported engine model.tensorrt_rtx.engine tensorrt_rtx {VERSION}, for 8.6, 12.0; batch 1:2:4" in shown


def test_info_names_a_damaged_sidecar(mope, built: Bundle) -> None:  # noqa: F811
    (built.path / "engines/model.tensorrt_rtx.json").write_text("{")
    done = mope("info", built.path)
    assert done.code == 0
    assert "model.tensorrt_rtx.json is damaged" in done.out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("build", "{b}", "--batch", "4:1:2"), 2, "--batch; received 4:1:2"),
        (("build", "{b}", "--text-len", "1:8:99"), 2, "cuts longer texts to 12 tokens"),
        (("build", "{b}", "--backend", "tensorrt"), 2, "mope-deploy[trt]"),
        (("build", "{b}", "--compute", "7.5"), 1, "FP32 GEMM is not supported"),
        (("build", "{b}/golden"), 2, "is not a bundle"),
        (("verify", "{b}", "--engine", "tensorrt"), 1, "no TensorRT engine was built"),
        (("run", "{b}", "--image", "{b}/golden/0.png", "--text", "a", "--rebuild"), 1, "needs a GPU"),
        (("verify", "{b}", "--engine", "tensorrt", "--threads", "2"), 2, "threads belongs to onnxruntime"),
    ],
)
def test_failures_are_one_line(mope, bundle: Bundle, arguments: tuple[str, ...], code: int, words: str) -> None:  # noqa: F811
    done = mope(*(argument.format(b=bundle.path) for argument in arguments))
    assert done.code == code
    assert words in done.err
    assert done.err.splitlines()[-1].startswith("error: ")
    assert not list(Path(bundle.path).glob("engines/*"))
