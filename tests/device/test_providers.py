"""ONNX Runtime's providers: what each is given, what is said where one is missing, and buffers for shapes that return.

No GPU is here: what a provider would be given is what reaches InferenceSession. Buffers are tried on the CPU, where the
same calls of ONNX Runtime work.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from mope_deploy import console
from mope_deploy.bundle import Bundle
from mope_deploy.cli import app
from mope_deploy.engines import open_session
from mope_deploy.engines.onnxruntime import library, providers
from mope_deploy.engines.onnxruntime.binding import KEPT, Bindings
from mope_deploy.engines.onnxruntime.providers import CPU, CUDA, choose_providers, full_name
from mope_deploy.engines.onnxruntime.session import OnnxRuntimeSession
from mope_deploy.engines.session import TF32_TOLERANCE
from mope_deploy.engines.tensorrt.device import Device
from mope_deploy.errors import EngineError, UsageError
from tests.device import tiny
from tests.device.test_engines import feeds

pytestmark = pytest.mark.device

TENSORRT = "TensorrtExecutionProvider"  # any that is not ours
ALL = [TENSORRT, CUDA, CPU]
# As the page of ONNX Runtime names them; a misspelt one would only be found on a machine with a GPU.
DOCUMENTED = {"use_tf32", "cudnn_conv_algo_search", "arena_extend_strategy"}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[Any]]:
    """An onnxruntime that says it has every provider; what its sessions are asked for, which then run on the CPU."""
    monkeypatch.setattr("mope_deploy.engines.open.prove_provider", lambda *_: None)  # tests/engines has its tests
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ALL)
    kept: list[list[Any]] = []

    class OnTheCpu(onnxruntime.InferenceSession):
        def __init__(self, path: str, options: Any, *, providers: Any) -> None:
            kept.append(providers)
            super().__init__(path, options, providers=[CPU])
            self.names = [one if isinstance(one, str) else one[0] for one in providers]

        def get_providers(self) -> list[str]:
            return self.names

    monkeypatch.setattr(onnxruntime, "InferenceSession", OnTheCpu)
    return kept


@pytest.mark.parametrize("short", providers.PROVIDERS)
def test_short_names_and_full_ones(short: str) -> None:
    full = providers.PROVIDERS[short]
    assert full_name(short) == full_name(full) == full
    assert full in onnxruntime.get_all_providers()


@pytest.mark.parametrize(("name", "words"), [("cudaa", "did you mean 'cuda'"), ("tensorrt", "expected cpu, cuda, or ")])
def test_an_unknown_name(name: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        full_name(name)


def test_cuda_computes_float32(bundle_path: Path, asked: list[list[Any]]) -> None:
    session = open_session(Bundle.open(bundle_path), providers=["cuda"])
    [[(name, options), cpu]] = asked
    assert (name, cpu) == (CUDA, CPU)
    assert set(options) == DOCUMENTED
    assert options["use_tf32"] == "0"
    assert options["cudnn_conv_algo_search"] in ("EXHAUSTIVE", "HEURISTIC", "DEFAULT")
    assert options["arena_extend_strategy"] in ("kNextPowerOfTwo", "kSameAsRequested")
    assert (session.device, session.least_tolerance) == (CUDA, 0.0)


def test_options_of_one_s_own_are_taken_as_they_are(bundle_path: Path, asked: list[list[Any]]) -> None:
    session = open_session(Bundle.open(bundle_path), providers=[("cuda", {"use_tf32": 1}), "cpu"])
    assert asked == [[(CUDA, {"use_tf32": 1}), CPU]]
    assert session.least_tolerance == TF32_TOLERANCE


@pytest.mark.parametrize("options", [{}, {"trt_fp16_enable": True, "device_id": 1}])
def test_any_other_provider_is_handed_through(
    bundle_path: Path, asked: list[list[Any]], monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """By its full name, alone or with options: nothing is added, and no batch is cut for it."""
    given = (TENSORRT, options) if options else TENSORRT
    session = open_session(Bundle.open(bundle_path), providers=[given])
    assert isinstance(session, OnnxRuntimeSession)
    assert asked == [[given, CPU]]
    assert (session.device, session.least_tolerance, session._bindings) == (TENSORRT, 0.0, None)
    batches, run = [], session._session.run
    monkeypatch.setattr(
        session._session, "run", lambda names, fed: batches.append(len(fed["input_ids"])) or run(names, fed)
    )
    inputs = feeds(37, 5)
    found, want = session.run(inputs), tiny.oracle(inputs)
    assert batches == [37]
    for name, array in found.items():
        np.testing.assert_allclose(array, want[name], rtol=0, atol=5e-6 * np.abs(want[name]).max())


INSTALLED: list[tuple[dict[str, str], str, bool]] = [
    ({"onnxruntime": "1.31.1"}, "pip uninstall onnxruntime, then", True),
    ({"onnxruntime-gpu": "1.18.0"}, "this one is left as it is", False),
    ({}, "this one is left as it is", False),
    ({"onnxruntime-gpu": "1.18.0", "onnxruntime": "1.31.1"}, "have overwritten each other", False),
]


@pytest.mark.parametrize(("found", "words", "installs"), INSTALLED, ids=[words for _, words, _ in INSTALLED])
def test_an_installed_onnxruntime_is_never_installed_over(
    monkeypatch: pytest.MonkeyPatch, found: dict[str, str], words: str, installs: bool
) -> None:
    monkeypatch.setattr(providers, "distributions", lambda: found)
    with pytest.raises(EngineError) as caught:
        choose_providers(["cuda"], [CPU])
    assert words in str(caught.value)
    assert ("pip install" in str(caught.value)) == installs


def test_a_gpu_build_that_cannot_be_imported_is_not_replaced(
    bundle_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A package that it needs is missing: the extra with onnxruntime in it would overwrite it."""
    monkeypatch.setattr(library, "distributions", lambda: {"onnxruntime-gpu": "1.18.0"})
    monkeypatch.delitem(sys.modules, "onnxruntime")
    (tmp_path / "onnxruntime.py").write_text("import coloured_logs_that_are_not_here")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EngineError) as caught:
        open_session(Bundle.open(bundle_path))
    assert "onnxruntime-gpu 1.18.0 is installed and cannot be imported: No module named 'coloured" in str(caught.value)
    assert "pip install" not in str(caught.value)
    assert "mope-deploy[ort" not in str(caught.value)


def test_states_say_what_is_there_and_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, none = Device(os="Linux aarch64", gpu="Orin", compute_capability="8.7"), Device(os="Linux", no_gpu="no driver")
    monkeypatch.setattr(providers, "distributions", lambda: {"onnxruntime-gpu": "1.18.0"})

    def states(device: Device) -> dict[str, str]:
        return {name: state for name, state, _ in providers.provider_states([CUDA, CPU], device)}

    missing = "not in this onnxruntime (onnxruntime-gpu 1.18.0)"
    assert states(gpu) == {"cpu": "available", "cuda": "available"}
    assert {name: state for name, state, _ in providers.provider_states([CPU], gpu)}["cuda"] == missing
    assert states(none)["cuda"] == "in this onnxruntime, but cannot run here: no driver"
    assert states(none)["cpu"] == "available"
    given = {name: set(options) for name, _, options in providers.provider_states([CPU], none)}
    assert given == {"cpu": set(), "cuda": DOCUMENTED}


def test_info_shows_them(bundle_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert console.run_app(app, ["info", str(bundle_path)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert f"onnxruntime here {onnxruntime.__version__}" in lines
    assert "provider cpu available" in lines
    assert any(line.startswith("provider cuda not in this onnxruntime") for line in lines)
    assert "use_tf32=0" in lines


def test_provider_on_the_command_line(bundle_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert console.run_app(app, ["verify", str(bundle_path), "--provider", "cpu"]) == 0
    assert console.run_app(app, ["verify", str(bundle_path), "--provider", "gpu"]) == 2
    assert "received 'gpu'; expected cpu, cuda, or ONNX Runtime's own name of one" in capsys.readouterr().err


# --- buffers ---


@pytest.fixture
def plain(bundle_path: Path) -> OnnxRuntimeSession:
    session = open_session(Bundle.open(bundle_path), threads=1)
    assert isinstance(session, OnnxRuntimeSession)
    return session


@pytest.fixture
def bindings(plain: OnnxRuntimeSession) -> Bindings:
    return Bindings(onnxruntime, plain._session, plain.inputs, plain.outputs, device="cpu")


def test_shapes_that_return_are_bound(bindings: Bindings, plain: OnnxRuntimeSession) -> None:
    names = ["logits", "routing"]
    assert bindings.run(feeds(3, 5, seed=0), names) is None  # met for the first time
    kept = []
    for seed in (1, 2, 3):
        found = bindings.run(feeds(3, 5, seed=seed), names)
        assert found is not None
        kept.append(found)
    for seed, found in zip((1, 2, 3), kept, strict=True):  # compared last: a later run must not write into them
        want = plain.run(feeds(3, 5, seed=seed))
        for name in names:
            np.testing.assert_array_equal(found[name], want[name])
    assert bindings.run(feeds(3, 6), names) is None
    assert bindings.run(feeds(2, 5), names) is None
    assert bindings.run(feeds(3, 5), ["routing"]) is None
    found = bindings.run(feeds(3, 5), ["routing"])
    assert found is not None
    assert list(found) == ["routing"]


def test_buffers_are_made_once_for_a_shape(bindings: Bindings, monkeypatch: pytest.MonkeyPatch) -> None:
    made, real = [], onnxruntime.OrtValue.ortvalue_from_numpy
    monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_numpy", lambda *a: made.append(a[1:]) or real(*a))
    for seed in range(6):
        bindings.run(feeds(3, 5, seed=seed), ["logits"])
    assert made == [("cpu", 0)] * 3  # one for each input


def test_few_shapes_are_kept(bindings: Bindings) -> None:
    for _ in range(2):
        bindings.run(feeds(1, 5), ["logits"])
    for length in range(6, 6 + KEPT):
        bindings.run(feeds(1, length), ["logits"])
    assert len(bindings._made) == KEPT
    assert bindings.run(feeds(1, 5), ["logits"]) is None  # forgotten, so new again


def test_views_and_other_byte_orders(bindings: Bindings, plain: OnnxRuntimeSession) -> None:
    inputs = feeds(3, 5)
    odd = {
        "pixel_values": np.asfortranarray(inputs["pixel_values"]),
        "input_ids": inputs["input_ids"].astype(">i8"),
        "attention_mask": inputs["attention_mask"][::-1][::-1],
    }
    bindings.run(odd, ["logits"])
    found = bindings.run(odd, ["logits"])
    assert found is not None
    np.testing.assert_array_equal(found["logits"], plain.run(inputs)["logits"])


def test_a_session_on_cuda_uses_them(
    bundle_path: Path, asked: list[list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = open_session(Bundle.open(bundle_path), providers=["cuda"])
    assert isinstance(session, OnnxRuntimeSession)
    assert isinstance(session._bindings, Bindings)
    assert session._bindings._device == "cuda"
    monkeypatch.setattr(session._bindings, "_device", "cpu")
    for seed in range(3):
        inputs = feeds(2, 4, seed=seed)
        want = tiny.oracle(inputs)["logits"]
        np.testing.assert_allclose(session.run(inputs)["logits"], want, rtol=0, atol=5e-6 * np.abs(want).max())
    assert next(iter(session._bindings._made.values())) is not None
    assert open_session(Bundle.open(bundle_path), providers=["cpu"])._bindings is None  # type: ignore[attr-defined]
