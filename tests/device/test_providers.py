"""ONNX Runtime's providers: what each is given, what is said where one is missing, and buffers for shapes that return.

No GPU is here: what a provider would be given is what reaches InferenceSession. Buffers are tried on the CPU, where the
same calls of ONNX Runtime work.
"""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from mope_deploy import console
from mope_deploy.bundle import Bundle
from mope_deploy.cli import app
from mope_deploy.engines import open_session, providers_here
from mope_deploy.engines.onnxruntime import providers
from mope_deploy.engines.onnxruntime import session as ort
from mope_deploy.engines.onnxruntime.binding import KEPT, Bindings
from mope_deploy.engines.onnxruntime.providers import CPU, CUDA, TENSORRT, TENSORRT_RTX, choose_providers, full_name
from mope_deploy.engines.onnxruntime.session import OnnxRuntimeSession
from mope_deploy.engines.session import TF32_TOLERANCE
from mope_deploy.engines.tensorrt.device import Device
from mope_deploy.errors import EngineError, UsageError
from tests.device import tiny
from tests.device.test_engines import feeds

pytestmark = pytest.mark.device

ALL = [TENSORRT_RTX, TENSORRT, CUDA, CPU]
# As the pages of ONNX Runtime name them; a misspelt one would only be found on a machine with a GPU.
DOCUMENTED = {
    CUDA: {"use_tf32", "cudnn_conv_algo_search", "arena_extend_strategy"},
    TENSORRT: {
        "trt_fp16_enable",
        "trt_int8_enable",
        "trt_engine_cache_enable",
        "trt_engine_cache_path",
        "trt_timing_cache_enable",
        "trt_timing_cache_path",
        "trt_profile_min_shapes",
        "trt_profile_opt_shapes",
        "trt_profile_max_shapes",
    },
    TENSORRT_RTX: {
        "enable_cuda_graph",
        "nv_runtime_cache_path",
        "nv_profile_min_shapes",
        "nv_profile_opt_shapes",
        "nv_profile_max_shapes",
    },
}


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(providers.TF32_OVERRIDE, "0")  # so that it is restored afterwards
    monkeypatch.delenv(providers.TF32_OVERRIDE)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[Any]]:
    """An onnxruntime that says it has every provider; what its sessions are asked for, which then run on the CPU."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ALL)
    real, kept = onnxruntime.InferenceSession, []

    def session(path: str, options: Any, *, providers: Any, **_: Any) -> Any:
        kept.append(providers)
        made = real(path, options, providers=[CPU])
        names = [one if isinstance(one, str) else one[0] for one in providers]
        monkeypatch.setattr(made, "get_providers", lambda: names)
        return made

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    return kept


@pytest.mark.parametrize("short", providers.PROVIDERS)
def test_short_names_and_full_ones(short: str) -> None:
    full = providers.PROVIDERS[short]
    assert full_name(short) == full_name(full) == full
    if full != TENSORRT_RTX or int(onnxruntime.__version__.split(".")[1]) >= 22:  # the release that brought it
        assert full in onnxruntime.get_all_providers()


def test_an_unknown_name() -> None:
    with pytest.raises(UsageError, match="did you mean 'tensorrt'"):
        full_name("tensort")


def test_cuda_computes_float32(bundle_path: Path, asked: list[list[Any]]) -> None:
    session = open_session(Bundle.open(bundle_path), providers=["cuda"])
    [[(name, options), cpu]] = asked
    assert (name, cpu) == (CUDA, CPU)
    assert set(options) == DOCUMENTED[CUDA]
    assert options["use_tf32"] == "0"
    assert options["cudnn_conv_algo_search"] in ("EXHAUSTIVE", "HEURISTIC", "DEFAULT")
    assert options["arena_extend_strategy"] in ("kNextPowerOfTwo", "kSameAsRequested")
    assert (session.device, session.least_tolerance) == (CUDA, 0.0)
    assert providers.TF32_OVERRIDE not in os.environ  # CUDA has an option for it


@pytest.mark.parametrize(
    ("short", "full", "prefix"), [("tensorrt", TENSORRT, "trt"), ("tensorrt-rtx", TENSORRT_RTX, "nv")]
)
def test_tensorrt_is_given_shapes_types_and_a_cache(
    bundle_path: Path, asked: list[list[Any]], tmp_path: Path, short: str, full: str, prefix: str
) -> None:
    bundle = Bundle.open(bundle_path)
    session = open_session(bundle, providers=[short])
    [[(name, options), (cuda, _), cpu]] = asked
    assert (name, cuda, cpu) == (full, CUDA, CPU)
    assert set(options) == DOCUMENTED[full]
    length = tiny.MAX_LENGTH
    assert {key: value for key, value in options.items() if "shapes" in key} == {
        f"{prefix}_profile_min_shapes": "pixel_values:1x3x8x8,input_ids:1x1,attention_mask:1x1",
        f"{prefix}_profile_opt_shapes": f"pixel_values:4x3x8x8,input_ids:4x{length},attention_mask:4x{length}",
        f"{prefix}_profile_max_shapes": f"pixel_values:16x3x8x8,input_ids:16x{length},attention_mask:16x{length}",
    }
    folder = tmp_path / "cache" / bundle.sha256[:16] / "model.onnx" / short
    assert {value for key, value in options.items() if key.endswith("_path")} == {str(folder)}
    assert stat.S_IMODE(folder.stat().st_mode) & 0o077 == 0
    assert all(value == "0" for key, value in options.items() if key in ("trt_fp16_enable", "trt_int8_enable"))
    assert os.environ[providers.TF32_OVERRIDE] == "0"
    assert session.least_tolerance == 0.0


def test_tensorrt_takes_batches_of_any_size(
    bundle_path: Path, asked: list[list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are cut to the sizes it was told, else it would build another engine in the middle of a run."""
    session = open_session(Bundle.open(bundle_path), providers=["tensorrt"])
    assert isinstance(session, OnnxRuntimeSession)
    monkeypatch.setattr(session, "_bindings", None)  # their buffers would be on a GPU
    batches, run = [], session._session.run
    monkeypatch.setattr(
        session._session, "run", lambda names, fed: batches.append(len(fed["input_ids"])) or run(names, fed)
    )
    inputs = feeds(37, 5)
    found, want = session.run(inputs), tiny.oracle(inputs)
    assert batches == [16, 16, 5]
    for name, array in found.items():
        np.testing.assert_allclose(array, want[name], rtol=0, atol=5e-6 * np.abs(want[name]).max())


def test_options_of_one_s_own_are_taken_as_they_are(bundle_path: Path, asked: list[list[Any]]) -> None:
    session = open_session(Bundle.open(bundle_path), providers=[("cuda", {"use_tf32": 1}), "cpu"])
    assert asked == [[(CUDA, {"use_tf32": 1}), CPU]]
    assert session.least_tolerance == TF32_TOLERANCE


def test_a_user_who_wants_tf32_gets_its_tolerance(
    bundle_path: Path, asked: list[list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(providers.TF32_OVERRIDE, "1")
    assert open_session(Bundle.open(bundle_path), providers=["tensorrt"]).least_tolerance == TF32_TOLERANCE
    assert os.environ[providers.TF32_OVERRIDE] == "1"


def test_without_a_place_for_a_cache(
    bundle_path: Path, asked: list[list[Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOPE_CACHE", str(tmp_path / "file"))
    open_session(Bundle.open(bundle_path), providers=["tensorrt"])
    [[(_, options), *_]] = asked
    assert not [key for key in options if "cache" in key]
    assert "trt_profile_max_shapes" in options


def test_where_caches_live(monkeypatch: pytest.MonkeyPatch) -> None:
    key = "ab" * 32
    monkeypatch.setenv("MOPE_CACHE", "/c")
    assert providers.cache_folder(key, "a/m.onnx") == Path("/c/abababababababab/a_m.onnx")
    monkeypatch.delenv("MOPE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert providers.cache_folder(key, "m.onnx") == Path("/x/mope-deploy/abababababababab/m.onnx")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/h")
    assert providers.cache_folder(key, "m.onnx") == Path("/h/.cache/mope-deploy/abababababababab/m.onnx")
    monkeypatch.setenv("HOME", "nowhere")
    assert providers.cache_folder(key, "m.onnx") is None


INSTALLED: list[tuple[dict[str, str], str, bool]] = [
    ({"onnxruntime": "1.31.1"}, "pip uninstall onnxruntime, then", True),
    ({"onnxruntime-gpu": "1.18.0"}, "this one is left as it is", False),
    ({}, "this one is left as it is", False),
    ({"onnxruntime-gpu": "1.18.0", "onnxruntime": "1.31.1"}, "have overwritten each other", False),
]


@pytest.mark.parametrize(("found", "words", "installs"), INSTALLED, ids=[words for _, words, _ in INSTALLED])
@pytest.mark.parametrize("missing", ["cuda", "tensorrt"])
def test_an_installed_onnxruntime_is_never_installed_over(
    monkeypatch: pytest.MonkeyPatch, found: dict[str, str], words: str, installs: bool, missing: str
) -> None:
    monkeypatch.setattr(providers, "distributions", lambda: found)
    with pytest.raises(EngineError) as caught:
        choose_providers([missing], [CPU])
    assert words in str(caught.value)
    assert ("pip install" in str(caught.value)) == installs


def test_a_gpu_build_that_cannot_be_imported_is_not_replaced(
    bundle_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A package that it needs is missing: the extra with onnxruntime in it would overwrite it."""
    monkeypatch.setattr(ort, "distributions", lambda: {"onnxruntime-gpu": "1.18.0"})
    monkeypatch.delitem(sys.modules, "onnxruntime")
    (tmp_path / "onnxruntime.py").write_text("import coloured_logs_that_are_not_here")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EngineError) as caught:
        open_session(Bundle.open(bundle_path))
    assert "onnxruntime-gpu 1.18.0 is installed and cannot be imported: No module named 'coloured" in str(caught.value)
    assert "pip install" not in str(caught.value)
    assert "mope-deploy[ort" not in str(caught.value)


def test_states_say_what_is_there_and_why_not(bundle_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, none = Device(os="Linux aarch64", gpu="Orin", compute_capability="8.7"), Device(os="Linux", no_gpu="no driver")
    monkeypatch.setattr(providers, "distributions", lambda: {"onnxruntime-gpu": "1.18.0"})

    def states(device: Device) -> dict[str, str]:
        return {name: state for name, state, _ in providers.provider_states([CUDA, CPU], device)}

    missing = "not in this onnxruntime (onnxruntime-gpu 1.18.0)"
    assert states(gpu) == {"cpu": "available", "cuda": "available", "tensorrt": missing, "tensorrt-rtx": missing}
    assert states(none)["cuda"] == "in this onnxruntime, but cannot run here: no driver"
    assert states(none)["cpu"] == "available"
    found = {name: options for name, _, options in providers_here(Bundle.open(bundle_path))}
    assert {full_name(name): set(options) for name, options in found.items()} == {CPU: set(), **DOCUMENTED}


def test_info_shows_them(bundle_path: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert console.run_app(app, ["info", str(bundle_path)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert f"onnxruntime here {onnxruntime.__version__}" in lines
    assert "provider cpu available" in lines
    assert any(line.startswith("provider cuda not in this onnxruntime") for line in lines)
    assert {"use_tf32=0", "trt_fp16_enable=0", "enable_cuda_graph=0"} <= set(lines)
    assert not (tmp_path / "cache").exists()  # it only looks


def test_provider_on_the_command_line(bundle_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert console.run_app(app, ["verify", str(bundle_path), "--provider", "cpu"]) == 0
    assert console.run_app(app, ["verify", str(bundle_path), "--provider", "gpu"]) == 2
    assert "received 'gpu'; expected cpu, cuda, tensorrt, tensorrt-rtx" in capsys.readouterr().err


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
