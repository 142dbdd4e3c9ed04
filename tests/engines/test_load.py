"""A built engine is checked in one order before it runs: hash, version, compute capability, OS, deserialising, I/O,
precision, golden samples.

Devices are descriptions handed in; deserialising, which needs a GPU, is the one thing that is ever faked.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tensorrt_rtx as trt

from mope_deploy.bundle import Bundle
from mope_deploy.engines import built_engines, open_built, open_session
from mope_deploy.engines.open import _rebuild
from mope_deploy.engines.tensorrt import session as tensorrt_session
from mope_deploy.engines.tensorrt.backends import Backend, open_backend
from mope_deploy.engines.tensorrt.device import Device, this_device
from mope_deploy.engines.tensorrt.profiles import Sizes
from mope_deploy.engines.tensorrt.session import _described, check_engine, check_tensors, deserialise, prove
from mope_deploy.engines.tensorrt.sidecar import (
    EngineFiles,
    Proof,
    Sidecar,
    engine_files,
    exported_files,
    exported_names,
)
from mope_deploy.errors import BundleError, EngineError, MopeError, ParityError
from tests.device import tiny
from tests.device.graph import write_graph
from tests.engines.conftest import make_bundle
from tests.engines.test_inspect import document, layer

AMPERE = Device(
    os=this_device().os,
    gpu="RTX 3090",
    compute_capability="8.6",
    driver="580.65.06",
    cuda="13.0",
    l4t=this_device().l4t,
)
VERSION = trt.__version__


@pytest.fixture
def backend() -> Backend:
    return open_backend("tensorrt_rtx")


def files_of(bundle: Bundle) -> EngineFiles:
    return engine_files(bundle, bundle.graph(), "tensorrt_rtx")


def check(bundle: Bundle, device: Device = AMPERE) -> bytes:
    files = files_of(bundle)
    return check_engine(
        Sidecar.read(files.sidecar), files, bundle, bundle.graph(), open_backend("tensorrt_rtx"), device
    )


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads(path.read_text(encoding="utf-8"))
    change(document)
    path.write_text(json.dumps(document), encoding="utf-8")


def refusal(bundle: Bundle, device: Device = AMPERE) -> str:
    with pytest.raises(EngineError) as caught:
        check(bundle, device)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_good_engine_passes_on_its_gpus(built: Bundle) -> None:
    plan = files_of(built).engine.read_bytes()
    assert check(built) == plan
    assert check(built, dataclasses.replace(AMPERE, gpu="RTX 5090", compute_capability="12.0")) == plan


def test_every_mismatch_is_named_in_order(built: Bundle) -> None:
    """All of them at once; each is put right after it was reported, and then the next one is."""
    files = files_of(built)
    good, plan = files.sidecar.read_text(encoding="utf-8"), files.engine.read_bytes()

    def spoil(document: dict[str, Any]) -> None:
        document["onnx"]["model.onnx"] = "0" * 64
        document["version"] = "1.6.0.1"
        document["built_on"]["os"] = "Windows AMD64"

    rewrite(files.sidecar, spoil)
    files.engine.write_bytes(plan[:-1])
    orin = dataclasses.replace(AMPERE, gpu="Orin", compute_capability="8.7")

    onnx = built.manifest.files["model.onnx"].sha256
    words = f"built from another ONNX file: model.onnx; received SHA-256 000000000000; expected {onnx[:12]}"
    assert words in refusal(built, orin)
    rewrite(files.sidecar, lambda d: d["onnx"].update({"model.onnx": onnx}))

    assert f"is damaged; received {len(plan) - 1:,} bytes; expected {len(plan):,}" in refusal(built, orin)
    files.engine.write_bytes(plan[:-1] + bytes([plan[-1] ^ 1]))
    assert re.search(r"is damaged; received SHA-256 [0-9a-f]{12}…; expected [0-9a-f]{12}…", refusal(built, orin))
    files.engine.write_bytes(plan)

    words = f"another version of tensorrt_rtx; received 1.6.0.1; expected {VERSION}, installed here"
    assert words in refusal(built, orin)
    rewrite(files.sidecar, lambda d: d.update(version=VERSION))

    words = "built for another GPU; received compute capability 8.6, 12.0; expected 8.7, that of Orin"
    assert words in refusal(built, orin)
    assert "--rebuild" in refusal(built, orin)

    assert f"built on another system; received Windows AMD64; expected {AMPERE.os}" in refusal(built)
    files.sidecar.write_text(good, encoding="utf-8")
    assert check(built) == plan


def test_another_jetson_linux(built: Bundle) -> None:
    def on_a_jetson(document: dict[str, Any]) -> None:
        document["built_on"] |= {"l4t": "36.4.3", "gpu": "Orin", "compute_capability": "8.6"}

    rewrite(files_of(built).sidecar, on_a_jetson)
    newer = dataclasses.replace(AMPERE, l4t="38.2.0")
    assert "built on another Jetson Linux; received 36.4.3; expected 38.2.0" in refusal(built, newer)
    check(built, dataclasses.replace(AMPERE, l4t="36.4.3"))


def test_without_a_gpu_the_reason_is_named(built: Bundle) -> None:
    bare = Device(os=AMPERE.os, no_gpu="no CUDA driver here")
    words = "needs a GPU to run; received no CUDA driver here; expected compute capability 8.6, 12.0"
    assert words in refusal(built, bare)


def test_garbage_with_the_right_hash_is_not_mistaken_for_a_missing_gpu(built: Bundle) -> None:
    """TensorRT-RTX's validity call tells an engine that is none from a machine without a GPU."""
    files = files_of(built)
    garbage = b"garbage" * 1000
    files.engine.write_bytes(garbage)
    entry = {"sha256": hashlib.sha256(garbage).hexdigest(), "bytes": len(garbage)}
    rewrite(files.sidecar, lambda d: d.update(engine=entry))
    assert "received no engine of this library; expected one built by tensorrt_rtx" in refusal(built)
    assert "no engine of this library" in refusal(built, this_device())


def test_missing_files(built: Bundle) -> None:
    files = files_of(built)
    files.engine.unlink()
    assert "cannot be read; received No such file" in refusal(built)
    files.sidecar.unlink()
    assert "cannot be read; received No such file" in refusal(built)


def test_deserialising_needs_a_gpu(built: Bundle, backend: Backend) -> None:
    assert this_device().gpu is None
    with pytest.raises(EngineError, match=r"no CUDA driver|cuInit failed|CUDA shows no GPU"):
        deserialise(backend, check(built), files_of(built))


# --- what was deserialised ---


class Deserialised:
    """What TensorRT's engine object says of its tensors: the tiny model's, unless ``changes`` say otherwise."""

    def __init__(self, **changes: tuple[Any, tuple[int, ...]] | None) -> None:
        self.inputs = ("pixel_values", "input_ids", "attention_mask")
        tensors = {
            "pixel_values": (trt.DataType.FLOAT, (-1, 3, tiny.SIZE, tiny.SIZE)),
            "input_ids": (trt.DataType.INT64, (-1, -1)),
            "attention_mask": (trt.DataType.INT64, (-1, -1)),
            "logits": (trt.DataType.FLOAT, (-1, len(tiny.LABELS))),
            "routing": (trt.DataType.FLOAT, (-1, tiny.LAYERS, tiny.EXPERTS)),
        }
        self.tensors = {name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}
        self.num_io_tensors = len(self.tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> Any:
        return trt.TensorIOMode.INPUT if name in self.inputs else trt.TensorIOMode.OUTPUT

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name][1]

    def get_tensor_dtype(self, name: str) -> Any:
        return self.tensors[name][0]


def compare(built: Bundle, backend: Backend, engine: Deserialised) -> None:
    files = files_of(built)
    check_tensors(_described(backend, engine), Sidecar.read(files.sidecar), built.graph(), files)


def test_tensors_as_promised(built: Bundle, backend: Backend) -> None:
    compare(built, backend, Deserialised())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"logits": (trt.DataType.HALF, (-1, 3))}, "outputs differ from the manifest's at logits; received .'float16'"),
        ({"logits": (trt.DataType.FLOAT, (-1, 4))}, "at logits"),
        ({"routing": None}, "at routing; received no such name"),
        ({"pixel_values": (trt.DataType.FLOAT, (-1, 3, 8, 9))}, "inputs differ from the manifest's at pixel_values"),
        ({"input_ids": (trt.DataType.INT32, (-1, -1))}, "at input_ids; received .'int32'"),
    ],
)
def test_tensors_that_were_not_promised(built: Bundle, backend: Backend, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(EngineError, match=words):
        compare(built, backend, Deserialised(**changes))


def test_integers_that_the_library_narrowed(built: Bundle, backend: Backend) -> None:
    """A sidecar that says int32, as the parsed network of an older library does, stands for the manifest's int64."""

    def narrowed(document: dict[str, Any]) -> None:
        document["inputs"][1]["dtype"] = "int32"

    rewrite(files_of(built).sidecar, narrowed)
    compare(built, backend, Deserialised(input_ids=(trt.DataType.INT32, (-1, -1))))
    with pytest.raises(EngineError, match="at input_ids"):
        compare(built, backend, Deserialised())


def test_the_session_calls_what_the_library_has() -> None:
    """The session itself cannot run without a GPU: at least no name in it is misspelt."""
    source = Path(tensorrt_session.__file__).read_text(encoding="utf-8")
    for kind, owner, least in (
        ("_context", trt.IExecutionContext, 4),
        ("_?engine", trt.ICudaEngine, 4),
        ("inspector", trt.EngineInspector, 2),
    ):
        called = set(re.findall(rf"\b{kind}\.([a-z]\w+)", source)) - {"bytes", "sha256", "name"}
        assert len(called) >= least, called
        assert [name for name in sorted(called) if not hasattr(owner, name)] == []


# --- goldens before any prediction; ONNX Runtime stands where the engine would ---


FP32 = document(layer("gemm", "Float", "Float"), layer("kgen", "Float"))


def proved(
    bundle: Bundle, backend: Backend, device: Device = AMPERE, session: Any = None, information: str = FP32
) -> Any:
    files = files_of(bundle)
    session = session or open_session(bundle, engine="onnxruntime", threads=1)
    sidecar = Sidecar.read(files.sidecar)
    return prove(session, bundle, sidecar, files, backend, device, information=lambda: information)


def test_goldens_are_run_once_per_engine_and_device(built: Bundle, backend: Backend) -> None:
    before = {p: p.read_bytes() for p in built.path.rglob("*") if p.is_file()}
    measured = proved(built, backend)
    assert measured.samples == len(tiny.SAMPLES)
    assert 0 < measured.logits_error < 1e-6
    proof = Proof.read(files_of(built).proof)
    assert proof is not None
    assert (proof.device, proof.logits_error, proof.version) == (AMPERE, measured.logits_error, VERSION)
    assert proof.layers == {"float32": 1}
    assert proved(built, backend) is None
    for other in (
        dataclasses.replace(AMPERE, gpu="RTX A4000"),
        dataclasses.replace(AMPERE, driver="590.1"),
    ):
        assert proved(built, backend, other) is not None
    # Outside the hashed files: nothing that was there is touched.
    assert {p: p.read_bytes() for p in before} == before
    Bundle.open(built.path)


def test_an_engine_of_another_precision_is_refused_before_the_goldens(built: Bundle, backend: Backend) -> None:
    class Untouched:
        def run(self, *_: Any) -> None:
            pytest.fail("ran before its precision was known")

    half = document(layer("gemm", "Half", "Half"), layer("gemm", "Half", "Half"))
    words = r"model\.tensorrt_rtx\.engine is called fp32 and computes in something else; received matrix layers: 2 of "
    for _ in range(2):
        with pytest.raises(EngineError, match=words):
            proved(built, backend, session=Untouched(), information=half)
        assert not files_of(built).proof.exists()
    rewrite(files_of(built).sidecar, lambda d: d["precision"].update(declared="fp16"))
    assert proved(built, backend, information=half) is not None
    assert json.loads(files_of(built).proof.read_text())["layers"] == {"float16": 2}


def test_an_inspector_that_tells_nothing(built: Bundle, backend: Backend) -> None:
    assert proved(built, backend, information="") is not None
    assert json.loads(files_of(built).proof.read_text())["layers"] == {}


def test_a_proof_of_an_earlier_release_proves_nothing(built: Bundle, backend: Backend) -> None:
    """It says nothing of the precision."""
    proved(built, backend)
    rewrite(files_of(built).proof, lambda d: d.pop("layers"))
    assert proved(built, backend) is not None
    assert proved(built, backend) is None


def test_a_proof_of_another_engine_or_bundle_proves_nothing(built: Bundle, backend: Backend) -> None:
    for key in ("engine_sha256", "bundle_sha256", "version"):
        assert proved(built, backend) is not None
        rewrite(files_of(built).proof, lambda d, key=key: d.update({key: "0" * 64 if "sha" in key else "1.0"}))
    files_of(built).proof.write_text("{", encoding="utf-8")
    assert proved(built, backend) is not None
    assert proved(built, backend) is None


def test_wrong_goldens_are_refused_every_time(built: Bundle, backend: Backend, tmp_path: Path) -> None:
    graph = write_graph(tmp_path / "model.onnx")
    head = tiny.weights()["head"]
    assert graph.read_bytes().count(head.tobytes()) == 1
    graph.write_bytes(graph.read_bytes().replace(head.tobytes(), (head * 1.001).tobytes()))
    wrong = open_session(make_bundle(tmp_path / "wrong", graph), engine="onnxruntime", threads=1)
    for _ in range(2):
        with pytest.raises(ParityError, match=r"logits are not the golden ones; received an error of 0.001; expected"):
            proved(built, backend, session=wrong)
        assert not files_of(built).proof.exists()
    wrong.least_tolerance = 5e-3  # what a session of a TF32 engine says
    assert proved(built, backend, session=wrong).logits_error == pytest.approx(1e-3, rel=0.01)


def test_building_again_forgets_the_proof(built: Bundle, backend: Backend) -> None:
    from mope_deploy.engines.tensorrt.build import build_engine

    proved(built, backend)
    build_engine(built, compute="8.6")
    assert not files_of(built).proof.exists()


# --- choosing ---


def test_auto_says_why_the_engine_is_not_used(built: Bundle) -> None:
    session = open_session(built)
    assert session.name == "onnxruntime"
    assert "model.tensorrt_rtx.engine needs a GPU to run" in session.why
    files_of(built).engine.write_bytes(b"x")
    assert "is damaged; received 1 bytes" in open_session(built).why
    with pytest.raises(EngineError, match="is damaged"):
        open_session(built, engine="tensorrt")


def test_auto_without_an_engine(bundle: Bundle) -> None:
    assert "no TensorRT engine was built" in open_session(bundle).why
    with pytest.raises(EngineError, match="no TensorRT engine was built"):
        open_session(bundle, engine="tensorrt")
    assert open_session(bundle, engine="onnxruntime").why == ""
    assert open_session(bundle, threads=1).why == ""


def rebuilt(bundle: Bundle) -> str:
    return _rebuild(bundle, None, built_engines(bundle, None))[0]


def test_rebuilding_keeps_sizes_and_options(built: Bundle) -> None:
    def options(document: dict[str, Any]) -> None:
        document["workspace"] = 2**28
        document["precision"]["tf32"] = True

    rewrite(files_of(built).sidecar, options)
    files_of(built).engine.write_bytes(b"damaged")
    assert rebuilt(built) == "tensorrt_rtx"
    made = Sidecar.read(files_of(built).sidecar)
    assert made.profile == {"batch": Sizes(1, 2, 4), "text_length": Sizes(1, 12, 12)}
    assert (made.workspace, made.precision.tf32) == (2**28, True)
    check(built)
    files_of(built).sidecar.write_text("{", encoding="utf-8")  # nothing to keep: the defaults
    rebuilt(built)
    assert Sidecar.read(files_of(built).sidecar).profile["batch"] == Sizes(1, 4, 16)


def test_rebuilding_with_a_library_that_is_gone(built: Bundle) -> None:
    """The engine of another library than the one installed today: its sizes still count."""
    rewrite(files_of(built).sidecar, lambda d: d.update(backend="tensorrt"))
    theirs = engine_files(built, built.graph(), "tensorrt")
    files_of(built).sidecar.rename(theirs.sidecar)
    files_of(built).engine.rename(theirs.engine)
    assert "tensorrt is not installed" in open_session(built).why
    assert rebuilt(built) == "tensorrt_rtx"
    assert Sidecar.read(files_of(built).sidecar).profile["batch"] == Sizes(1, 2, 4)


def test_rebuilding_is_not_begun_where_nothing_can_run(built: Bundle) -> None:
    before = files_of(built).engine.read_bytes()
    with pytest.raises(EngineError, match="running a TensorRT engine needs a GPU"):
        open_session(built, rebuild=True)
    assert files_of(built).engine.read_bytes() == before
    for options in ({"threads": 2}, {"providers": ["CPUExecutionProvider"]}, {"engine": "onnxruntime"}):
        with pytest.raises(MopeError, match="belongs to"):
            open_session(built, rebuild=True, **options)


# --- engines that came with the bundle ---


def came(bundle: Bundle) -> EngineFiles:
    found = exported_files(bundle, bundle.graph(), "tensorrt_rtx")
    assert found is not None
    return found


def check_exported(bundle: Bundle, device: Device = AMPERE) -> bytes:
    sidecar = Sidecar.read(came(bundle).sidecar)
    return check_engine(sidecar, came(bundle), bundle, bundle.graph(), open_backend("tensorrt_rtx"), device)


def test_an_exported_engine_is_checked_like_any_other(exported: Bundle) -> None:
    assert check_exported(exported) == came(exported).engine.read_bytes()
    with pytest.raises(EngineError, match=r"exported/model\.tensorrt_rtx\.engine was built for another GPU; .*8\.7"):
        check_exported(exported, dataclasses.replace(AMPERE, gpu="Orin", compute_capability="8.7"))
    with pytest.raises(EngineError, match="built on another system"):
        check_exported(exported, dataclasses.replace(AMPERE, os="Windows AMD64"))
    session = open_session(exported)
    assert session.name == "onnxruntime"
    assert "exported/model.tensorrt_rtx.engine needs a GPU to run" in session.why


def test_an_exported_engine_is_covered_by_the_bundles_own_hashes(exported: Bundle) -> None:
    name, _ = exported_names(exported.graph(), "tensorrt_rtx")
    came(exported).engine.write_bytes(came(exported).engine.read_bytes()[:-1] + b"x")
    with pytest.raises(BundleError, match=rf"{name} was altered"):
        Bundle.open(exported.path)


def test_the_proof_of_an_exported_engine_is_the_devices(
    exported: Bundle, backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = open_session(exported, engine="onnxruntime", threads=1)
    sidecar = Sidecar.read(came(exported).sidecar)

    def prove_it() -> Any:
        return prove(session, exported, sidecar, came(exported), backend, AMPERE, information=lambda: FP32)

    assert prove_it() is not None
    assert came(exported).proof == exported.path / "engines/model.tensorrt_rtx.exported.proof.json"
    assert came(exported).proof.exists()
    assert prove_it() is None
    assert Bundle.open(exported.path).unlisted() == ()
    monkeypatch.setenv("MOPE_ENGINES", str(tmp_path / "elsewhere"))
    assert prove_it() is not None
    assert came(exported).proof.parent == tmp_path / "elsewhere" / exported.sha256[:16]
    assert prove_it() is None


def test_an_engine_that_the_manifest_does_not_list_is_never_read(built: Bundle) -> None:
    (built.path / "engines/exported").mkdir()
    for path in (files_of(built).engine, files_of(built).sidecar):
        path.rename(built.path / "engines/exported" / path.name)
    assert exported_files(built, built.graph(), "tensorrt_rtx") is None
    assert built_engines(built, None) == []
    with pytest.raises(EngineError, match="no TensorRT engine was built"):
        open_session(built, engine="tensorrt")


def test_the_engine_built_here_comes_before_the_exported_one(
    exported: Bundle, built: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in (files_of(built).engine, files_of(built).sidecar):
        path.rename(exported.path / "engines" / path.name)
    tried: list[Path] = []

    def deserialise_nothing(_: Backend, __: bytes, files: EngineFiles) -> Any:
        tried.append(files.engine)
        raise EngineError(f"{files.engine} tried")

    monkeypatch.setattr(tensorrt_session, "deserialise", deserialise_nothing)
    monkeypatch.setattr("mope_deploy.engines.open.this_device", lambda: AMPERE)
    with pytest.raises(EngineError, match=r"engines/model\.tensorrt_rtx\.engine tried"):
        open_session(exported, engine="tensorrt")
    assert tried == [files_of(exported).engine, came(exported).engine]
    # The first is of no use: its refusal is the one reported, and the second is tried all the same.
    files_of(exported).engine.write_bytes(b"damaged")
    tried.clear()
    with pytest.raises(EngineError, match="is damaged"):
        open_session(exported, engine="tensorrt")
    assert tried == [came(exported).engine]
    tried.clear()
    with pytest.raises(EngineError, match="exported/model"):
        open_built(exported, None, "tensorrt_rtx", came(exported))
    assert tried == [came(exported).engine]


def test_rebuilding_beside_an_exported_engine_keeps_its_sizes(exported: Bundle) -> None:
    before = came(exported).engine.read_bytes()
    assert rebuilt(exported) == "tensorrt_rtx"
    assert Sidecar.read(files_of(exported).sidecar).profile["batch"] == Sizes(1, 2, 4)
    assert came(exported).engine.read_bytes() == before
    Bundle.open(exported.path)
