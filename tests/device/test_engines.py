"""One session protocol: what is fed is checked, what fails is said in one line."""

from __future__ import annotations

import shutil
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from mope_deploy.bundle import Bundle, write_bundle
from mope_deploy.engines import Session, open_session
from mope_deploy.engines.onnxruntime import library
from mope_deploy.engines.onnxruntime.cpu import cpu_settings
from mope_deploy.engines.onnxruntime.graph import open_graph
from mope_deploy.engines.onnxruntime.session import OnnxRuntimeSession
from mope_deploy.engines.session import alone
from mope_deploy.errors import EngineError, MissingExtraError, UsageError
from tests.device import tiny

pytestmark = pytest.mark.device


@pytest.fixture(scope="module")
def session(bundle_path: Path) -> Session:
    return open_session(Bundle.open(bundle_path), threads=1)


def feeds(batch: int = 3, length: int = 5, seed: int = 0) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    mask = (np.arange(length) < draw.integers(1, length + 1, (batch, 1))).astype(np.int64)
    return {
        "pixel_values": draw.standard_normal((batch, 3, tiny.SIZE, tiny.SIZE)).astype(np.float32),
        "input_ids": draw.integers(0, len(tiny.VOCABULARY), (batch, length)),
        "attention_mask": mask,
    }


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 7), (13, 3), (32, 12)])
def test_computes_what_the_oracle_computes(session: Session, batch: int, length: int) -> None:
    inputs = feeds(batch, length, seed=batch)
    found, want = session.run(inputs), tiny.oracle(inputs)
    assert list(found) == ["logits", "routing"]
    for name, array in found.items():
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, want[name], rtol=0, atol=5e-6 * np.abs(want[name]).max())


def test_the_comparison_bites(session: Session) -> None:
    inputs = feeds()
    want = tiny.oracle(inputs)
    inputs["input_ids"][0, 0] = (inputs["input_ids"][0, 0] + 1) % len(tiny.VOCABULARY)
    assert np.abs(session.run(inputs)["logits"][0] - want["logits"][0]).max() > 1e-3


def test_only_the_outputs_asked_for(session: Session) -> None:
    assert list(session.run(feeds(), ["routing"])) == ["routing"]
    assert list(session.run(feeds(), ["routing", "logits"])) == ["routing", "logits"]
    with pytest.raises(UsageError, match="'scores'; expected one of logits, routing"):
        session.run(feeds(), ["scores"])


def changed(**arrays: Any) -> dict[str, Any]:
    return {name: array for name, array in {**feeds(), **arrays}.items() if array is not None}


IDS = np.ones((3, 5), np.int64)
WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "received none; expected pixel_values, input_ids, attention_mask"),
    (changed(attention_mask=None), "received input_ids, pixel_values;"),
    (changed(extra=IDS), "extra"),
    (
        changed(input_ids=IDS.astype(np.int32)),
        "input input_ids; received int32 (3, 5); expected int64 (batch, text_length)",
    ),
    (changed(input_ids=IDS.tolist()), "received list; expected a numpy array"),
    (changed(pixel_values=np.zeros((3, 3, 8, 8))), "received float64"),
    (changed(pixel_values=np.zeros((3, 3, 8, 9), np.float32)), "shape (3, 3, 8, 9); expected float32 (batch, 3, 8, 8)"),
    (changed(pixel_values=np.zeros((3, 8, 8), np.float32)), "received float32 (3, 8, 8)"),
    (changed(input_ids=IDS[:2]), "with batch = 3 as in pixel_values"),
    (changed(attention_mask=IDS[:, :4]), "with text_length = 5 as in input_ids"),
    ({name: array[:0] for name, array in feeds().items()}, "(0, 3, 8, 8)"),
    (changed(input_ids=IDS[:, :0], attention_mask=IDS[:, :0]), "(3, 0)"),
    (changed(input_ids=IDS * len(tiny.VOCABULARY)), "values from 19 to 19; expected 0 to 18"),
    (changed(input_ids=-IDS), "values from -1 to -1"),
    (changed(attention_mask=IDS * 2), "input attention_mask; received values from 2 to 2; expected 0 to 1"),
]


@pytest.mark.parametrize(("inputs", "words"), WRONG, ids=[words for _, words in WRONG])
def test_feeds_are_checked(session: Session, inputs: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        session.run(inputs)
    assert words in str(caught.value)


def test_big_endian_and_views_are_taken(session: Session) -> None:
    inputs = feeds()
    views = {**inputs, "pixel_values": np.asfortranarray(inputs["pixel_values"])}
    np.testing.assert_array_equal(session.run(views)["logits"], session.run(inputs)["logits"])


def test_repeats_are_bit_identical(session: Session) -> None:
    for name, array in session.run(feeds()).items():
        assert array.tobytes() == session.run(feeds())[name].tobytes()


def test_unknown_engine(bundle_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'onnxruntime'"):
        open_session(Bundle.open(bundle_path), engine="onnxruntim")


def test_threads_and_providers(bundle_path: Path) -> None:
    opened = Bundle.open(bundle_path)
    with pytest.raises(UsageError, match="threads"):
        open_session(opened, threads=0)
    one = open_session(opened, threads=1, providers=["CPUExecutionProvider"])
    assert (one.name, one.device) == ("onnxruntime", "CPUExecutionProvider")
    with pytest.raises(EngineError, match=r"no NoSuchExecutionProvider; .*expected one of .*CPUExecutionProvider"):
        open_session(opened, providers=["NoSuchExecutionProvider"])
    with_options = open_session(
        opened, providers=[("CPUExecutionProvider", {"arena_extend_strategy": "kSameAsRequested"})]
    )
    assert with_options.run(feeds())["logits"].shape == (3, 3)


def test_a_silent_fallback_to_the_cpu_is_an_error(bundle_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime-gpu without a driver lists CUDA, fails to start it and runs on the CPU."""
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )

    class OnTheCpu(onnxruntime.InferenceSession):
        def __init__(self, path: str, options: Any, **_: Any) -> None:
            super().__init__(path, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "InferenceSession", OnTheCpu)
    with pytest.raises(EngineError, match="could not start CUDAExecutionProvider; received a session on CPU"):
        open_session(Bundle.open(bundle_path), providers=["CUDAExecutionProvider"])


def test_auto_passes_over_a_cuda_that_does_not_start(bundle_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    asked: list[Any] = []

    class OnTheCpu(onnxruntime.InferenceSession):
        def __init__(self, path: str, options: Any, *, providers: Any) -> None:
            asked.append(providers)
            super().__init__(path, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "InferenceSession", OnTheCpu)
    chosen = open_session(Bundle.open(bundle_path))
    assert chosen.device == "CPUExecutionProvider"
    assert "could not start CUDAExecutionProvider" in chosen.why
    # CUDA was asked for without TF32, the CPU only after it
    (first, cpu), last = asked
    assert (first[0], first[1]["use_tf32"]) == ("CUDAExecutionProvider", "0")
    assert [cpu] == last == ["CPUExecutionProvider"]


def test_a_provider_that_fails_prints_nothing(
    bundle_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """ONNX Runtime's own fallback prints to standard output, where `--json` goes."""

    class Failing(onnxruntime.InferenceSession):
        def _create_inference_session(self, providers: Any, *rest: Any, **more: Any) -> None:
            self._fallback_providers = ["CPUExecutionProvider"]
            raise RuntimeError("CUDA failure 35: driver too old")

    monkeypatch.setattr(onnxruntime, "InferenceSession", Failing)
    with pytest.raises(EngineError, match="driver too old"):
        open_session(Bundle.open(bundle_path))
    assert capsys.readouterr() == ("", "")


def test_no_fallback_while_running(session: Session) -> None:
    """ONNX Runtime would print, and go on with another provider, where the chosen one fails in the middle of a run."""
    assert session._session._enable_fallback is False
    session._session.enable_fallback()
    assert session._session._enable_fallback is False


def test_missing_onnxruntime_names_both_extras(bundle_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr(library, "distributions", dict)
    with pytest.raises(MissingExtraError) as caught:
        open_session(Bundle.open(bundle_path))
    assert "mope-deploy[ort]" in str(caught.value)
    assert "mope-deploy[ort-gpu]" in str(caught.value)
    assert caught.value.exit_code == 2


def test_broken_onnxruntime(bundle_path: Path, tmp_path: Path) -> None:
    """A wheel built for another numpy fails while it is imported: one line, not a traceback."""
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('numpy.core.multiarray failed to import')")
    code = f"from mope_deploy import load; load({str(bundle_path)!r})"
    paths = f"import sys; sys.path.insert(0, {str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", f"{paths}; {code}"], capture_output=True, text=True, check=False)
    assert "EngineError: onnxruntime is installed and cannot be imported: numpy.core" in done.stderr


def test_a_graph_too_new_for_this_onnxruntime(graph_file: Path, tmp_path: Path) -> None:
    """The IR version is the first field of the file, one byte: 99 is beyond any release."""
    data = bytearray(graph_file.read_bytes())
    assert data[:2] == b"\x08\x0a"
    data[1] = 99
    (tmp_path / "new.onnx").write_bytes(bytes(data))
    bundle = write_bundle(tmp_path / "b", files=tiny.files(tmp_path / "new.onnx"), manifest=tiny.manifest())
    with pytest.raises(EngineError, match=f"onnxruntime {onnxruntime.__version__} is too old for model.onnx") as caught:
        open_session(bundle)
    assert "\n" not in str(caught.value)


def test_garbage_instead_of_a_graph(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"\x00garbage" * 100)
    bundle = write_bundle(tmp_path / "b", files=tiny.files(tmp_path / "bad.onnx"), manifest=tiny.manifest())
    with pytest.raises(
        EngineError, match=r"model\.onnx is no ONNX file, or damaged; received no field begins at byte 1"
    ):
        open_session(bundle)
    assert capfd.readouterr().err == ""


def test_a_graph_at_odds_with_the_manifest(bundle_path: Path) -> None:
    bundle = Bundle.open(bundle_path)
    graph, path = bundle.graph(), bundle.file("model.onnx")
    first, *rest = graph.inputs
    for wrong, words in (
        (replace(graph, inputs=tuple(rest)), "inputs differ .* at pixel_values"),
        (replace(graph, inputs=(replace(first, dtype="float16"), *rest)), "float16"),
        (replace(graph, inputs=(replace(first, shape=("batch", 3, 8, 9)), *rest)), "pixel_values"),
        (replace(graph, inputs=(replace(first, shape=(1, 3, 8, 8)), *rest)), None),
        (replace(graph, outputs=graph.outputs[:1]), "outputs differ .* at routing"),
    ):
        if words is None:
            OnnxRuntimeSession(path, wrong)  # an axis free in the file may be fixed by the manifest
            continue
        with pytest.raises(EngineError, match=words):
            OnnxRuntimeSession(path, wrong)


def test_graphs_open_without_a_bundle(bundle_path: Path, split_path: Path, tmp_path: Path) -> None:
    """As an exporter opens files that no manifest lists yet."""
    for source, name in ((bundle_path, "one"), (split_path, "split")):
        folder = Path(shutil.copytree(source, tmp_path / name))
        graph = Bundle.open(folder).graph()
        (folder / "manifest.json").unlink()
        found = open_graph(graph, folder.joinpath, cpu=cpu_settings(threads=1, spinning=False))
        assert found.inputs == Bundle.open(bundle_path).graph().inputs
        np.testing.assert_allclose(found.run(feeds())["logits"], tiny.oracle(feeds())["logits"], rtol=0, atol=1e-5)


def test_a_failure_while_running_is_one_line(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: Any) -> None:
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(session, "_session", types.SimpleNamespace(run=run))
    with pytest.raises(EngineError, match="failed while running the graph: out of memory"):
        session.run(feeds())


def test_samples_alone_lose_their_padding() -> None:
    inputs = feeds(5, 7, seed=4)
    shapes = {spec["name"]: spec["shape"] for spec in tiny.manifest()["graphs"][0]["inputs"]}
    found = list(alone(inputs, shapes))
    assert len(found) == 5
    for row, one in enumerate(found):
        real = int(inputs["attention_mask"][row].sum())
        assert one["attention_mask"].shape == (1, real)
        assert one["attention_mask"].all()
        assert (one["input_ids"] == inputs["input_ids"][row : row + 1, :real]).all()
        assert (one["pixel_values"] == inputs["pixel_values"][row : row + 1]).all()


def test_graphs_that_read_ranges_off_tensors_get_one_sample_at_a_time(
    bundle_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Bundle.open(bundle_path)
    plain = opened.graph()
    session = OnnxRuntimeSession(opened.file(plain.file), replace(plain, precision="int8-dynamic"))
    batches: list[int] = []
    run = session._run

    def watched(part: Any, names: Any) -> Any:
        batches.append(len(part["input_ids"]))
        return run(part, names)

    monkeypatch.setattr(session, "_run", watched)
    inputs = feeds(5, 7, seed=4)
    found, want = session.run(inputs), tiny.oracle(inputs)
    assert batches == [1] * 5
    np.testing.assert_allclose(found["logits"], want["logits"], rtol=1e-4, atol=1e-4)
