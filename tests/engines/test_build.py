"""Engines are built for real by NVIDIA's own parser and compiler; what cannot be trusted is not built at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tensorrt_rtx
from onnx import TensorProto, helper, numpy_helper

from mope_deploy.bundle import Bundle, write_bundle
from mope_deploy.engines.tensorrt import build
from mope_deploy.engines.tensorrt.backends import open_backend
from mope_deploy.engines.tensorrt.build import build_engine
from mope_deploy.engines.tensorrt.device import this_device
from mope_deploy.engines.tensorrt.log import shared_log
from mope_deploy.engines.tensorrt.profiles import Sizes
from mope_deploy.engines.tensorrt.sidecar import Sidecar
from mope_deploy.engines.tensorrt.worker import _build, _configure
from mope_deploy.errors import EngineError, UsageError
from mope_deploy.manifest import FileEntry
from tests.device import tiny
from tests.device.graph import write_graph
from tests.engines.conftest import left, make_bundle


def edited(source: Path, target: Path, edit: Callable[[onnx.ModelProto], None]) -> Path:
    model = onnx.load(source)
    edit(model)
    onnx.save(model, target)
    return target


def test_an_engine_and_its_sidecar(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    before = (bundle.path / "manifest.json").read_bytes()
    sidecar, files = build_engine(bundle, batch="1:4:8", text_length="2:5:12")
    assert left(bundle) == ["model.tensorrt_rtx.engine", "model.tensorrt_rtx.json"]
    data = files.engine.read_bytes()
    assert sidecar.engine == FileEntry(hashlib.sha256(data).hexdigest(), len(data))
    assert sidecar.onnx == {"model.onnx": hashlib.sha256((bundle.path / "model.onnx").read_bytes()).hexdigest()}
    assert (sidecar.backend, sidecar.version) == ("tensorrt_rtx", tensorrt_rtx.__version__)
    assert sidecar.profile == {"batch": Sizes(1, 4, 8), "text_length": Sizes(2, 5, 12)}
    assert [(s.name, s.dtype, s.shape) for s in sidecar.inputs] == [
        (s.name, s.dtype, s.shape) for s in bundle.graph().inputs
    ]
    assert sidecar.precision.products == {"float32": 3}  # pixels, head, router
    assert sidecar.precision.tf32 is False
    assert sidecar.built_on == this_device()
    assert 100 * 2**20 < sidecar.peak_bytes < 2**31
    assert Sidecar.read(files.sidecar) == sidecar
    document = json.loads(files.sidecar.read_text(encoding="utf-8"))
    assert document["verified"] is False
    assert document["built_on"]["gpu"] is None
    # The bundle is what it was: its hashes hold, and an engine is no stray file.
    assert (bundle.path / "manifest.json").read_bytes() == before
    assert Bundle.open(bundle.path).unlisted() == ()
    assert capsys.readouterr().err == f"building model with tensorrt_rtx {tensorrt_rtx.__version__}\n"


def test_every_compute_capability_at_once_where_there_is_no_gpu(bundle: Bundle) -> None:
    sidecar, _ = build_engine(bundle)
    assert sidecar.compute_capabilities == ("8.0", "8.6", "8.9", "12.0", "12.1")
    assert sidecar.profile["text_length"] == Sizes(1, tiny.MAX_LENGTH, tiny.MAX_LENGTH)


def test_weights_in_a_file_of_their_own(tmp_path: Path) -> None:
    graph = write_graph(tmp_path / "model.onnx", external=True)
    files = {**tiny.files(graph), "model.onnx.data": tmp_path / "model.onnx.data"}
    (entry,) = tiny.manifest()["graphs"]
    manifest = tiny.manifest(graphs=[{**entry, "data": ["model.onnx.data"]}])
    sidecar, _ = build_engine(write_bundle(tmp_path / "b", files=files, manifest=manifest), compute="8.9")
    assert sorted(sidecar.onnx) == ["model.onnx", "model.onnx.data"]


@pytest.mark.parametrize("top_k", [0, 2])
def test_an_exported_mope(top_k: int, tmp_path: Path) -> None:
    from export.pipeline import export_bundle
    from tests.export.runs import write_data
    from tests.tiny import bert_folder, tiny_model, vit_folder

    model = tiny_model(vit_folder(tmp_path / "vit"), bert_folder(tmp_path / "bert"), top_k=top_k)
    bundle = Bundle.open(export_bundle(model, tmp_path / "bundle", data=write_data(tmp_path / "data")))
    sidecar, _ = build_engine(bundle, batch="1:2:16", compute="8.6,12.0")
    assert [spec.name for spec in sidecar.outputs] == ["logits", "routing"]
    assert set(sidecar.precision.products) == {"float32"}
    assert sum(sidecar.precision.products.values()) > 20


# --- refused before anything is built ---


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch": "4:2:8"}, "1 <= min <= opt <= max"),
        ({"batch": "0:1:2"}, "1 <= min"),
        ({"batch": "1:2"}, "min:opt:max, like 1:4:16"),
        ({"batch": "one"}, "'one'"),
        ({"text_length": "1:8:13"}, "this bundle cuts longer texts to 12 tokens"),
        ({"compute": "8.7"}, "received 8.7; expected of what tensorrt_rtx builds for here: 7.5, 8.0"),
        ({"compute": "ampere"}, "compute capabilities like 8.6,12.0"),
        ({"backend": "tensorrt-rtx"}, "did you mean 'tensorrt_rtx'"),
        ({"graph": "modle"}, "did you mean 'model'"),
        ({"workspace": 0}, "--workspace"),
    ],
)
def test_misuse(bundle: Bundle, options: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        build_engine(bundle, **options)
    assert words in str(caught.value)
    assert left(bundle) == []


def with_topk(model: onnx.ModelProto) -> None:
    """Add to the logits 0 × the sum of the 5 greatest mask values of each text: the numbers stay, a TopK is there."""
    graph = model.graph
    graph.initializer.append(numpy_helper.from_array(np.array([5], np.int64), "five"))
    graph.initializer.append(numpy_helper.from_array(np.array(0, np.float32), "zero"))
    nodes = [node for node in graph.node if node.output[0] != "logits"]
    nodes += [
        helper.make_node("TopK", ["mask", "five"], ["top", "places"], axis=1, name="take_five"),
        helper.make_node("ReduceSum", ["top", "axis_1"], ["sum"], keepdims=1),
        helper.make_node("Mul", ["sum", "zero"], ["nothing"]),
        helper.make_node("MatMul", ["hidden", "head"], ["scores_0"]),
        helper.make_node("Add", ["scores_0", "nothing"], ["logits"]),
    ]
    del graph.node[:]
    graph.node.extend(nodes)


def test_a_text_shorter_than_a_topk_needs(tiny_graph: Path, tmp_path: Path) -> None:
    """TensorRT itself only warns, and returns an engine."""
    bundle = make_bundle(tmp_path / "b", edited(tiny_graph, tmp_path / "topk.onnx", with_topk))
    with pytest.raises(UsageError) as caught:
        build_engine(bundle, text_length="4:8:12", batch="8:8:8", compute="8.6")
    assert "--text-len; received 4:8:12 with a least size of 4" in str(caught.value)
    assert "expected a least size of 5, as TopK take_five takes 5 values" in str(caught.value)
    assert left(bundle) == []
    build_engine(bundle, text_length="5:8:12", batch="8:8:8", compute="8.6")


def test_an_operator_that_no_parser_takes(tiny_graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before; and by the parser, should the exporter's list ever hold more than it takes."""

    def edit(model: onnx.ModelProto) -> None:
        model.graph.node.append(helper.make_node("NonZero", ["mask"], ["places"], name="where"))
        model.graph.node.append(helper.make_node("Shape", ["places"], ["unused"]))

    bundle = make_bundle(tmp_path / "b", edited(tiny_graph, tmp_path / "bad.onnx", edit))
    with pytest.raises(EngineError, match="no export writes such a file; received operator 'NonZero'"):
        build_engine(bundle, compute="8.6")
    monkeypatch.setattr(build, "check_graph_file", lambda *_: None)
    with pytest.raises(EngineError, match=r"the parser refuses model.onnx at NonZero where: .*NonZero"):
        build_engine(bundle, compute="8.6")
    assert left(bundle) == []


def test_garbage_instead_of_a_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"\x00garbage" * 100)
    bundle = make_bundle(tmp_path / "b", tmp_path / "bad.onnx")
    with pytest.raises(EngineError, match=r"model\.onnx is no ONNX file, or damaged"):
        build_engine(bundle, compute="8.6")
    monkeypatch.setattr(build, "check_graph_file", lambda *_: None)
    with pytest.raises(EngineError, match=r"the parser finds nothing in model\.onnx"):
        build_engine(bundle, compute="8.6")
    assert left(bundle) == []


def test_an_error_line_fails_the_build_and_leaves_what_was_there(built: Bundle) -> None:
    """Turing has no FP32 product in this library: the builder says so in its log."""
    before = {path: path.read_bytes() for path in (built.path / "engines").iterdir()}
    with pytest.raises(EngineError, match=r"no engine that can be trusted: .*FP32 GEMM is not supported"):
        build_engine(built, compute="8.6,7.5")
    assert {path: path.read_bytes() for path in (built.path / "engines").iterdir()} == before


def test_an_error_line_beside_an_engine_fails_the_build(bundle: Bundle, tmp_path: Path) -> None:
    """The library logs a real ERROR in the middle of a build, and returns a real engine all the same."""
    backend, graph = open_backend("tensorrt_rtx"), bundle.graph()
    log = shared_log(backend)

    def say(_: Mapping[str, Any]) -> None:
        tensorrt_rtx.Builder(log.logger).create_builder_config().get_compute_capability(0)

    request = {
        "backend": "tensorrt_rtx",
        "onnx": str(bundle.file("model.onnx")),
        "engine": str(tmp_path / "e.engine"),
        "precision": "fp32",
        "profile": {"batch": [1, 2, 4], "text_length": [1, 6, 12]},
        **{
            kind: [{"name": s.name, "dtype": s.dtype, "shape": s.shape} for s in getattr(graph, kind)]
            for kind in ("inputs", "outputs")
        },
        "compute_capabilities": ["8.6"],
        "tf32": False,
        "workspace": None,
    }
    log.clear()
    with pytest.raises(EngineError, match=r"no engine that can be trusted: .*getComputeCapability"):
        _build(request, say)
    assert not (tmp_path / "e.engine").exists()
    log.clear()
    _build(request, lambda _: None)
    assert (tmp_path / "e.engine").stat().st_size > 1000


def test_a_network_at_odds_with_the_manifest(tiny_graph: Path, tmp_path: Path) -> None:
    def edit(model: onnx.ModelProto) -> None:
        model.graph.output[0].name = "scores"  # nothing computes it under that name
        model.graph.node.append(helper.make_node("Identity", ["hidden"], ["logits_2"]))
        model.graph.output[0].name = "logits_2"
        model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = tiny.WIDTH

    bundle = make_bundle(tmp_path / "b", edited(tiny_graph, tmp_path / "other.onnx", edit))
    with pytest.raises(EngineError, match=r"differs from the manifest at logits_2; .*expected one of logits, routing"):
        build_engine(bundle, compute="8.6")


# --- precision is what the parsed network says ---


def half(model: onnx.ModelProto) -> None:
    """The product with the pixels in float16, the rest in float32."""
    graph = model.graph
    weights = next(tensor for tensor in graph.initializer if tensor.name == "pixels")
    weights.CopyFrom(numpy_helper.from_array(tiny.weights()["pixels"].astype(np.float16), "pixels"))
    nodes = []
    for node in graph.node:
        if node.output[0] == "x":
            nodes.append(helper.make_node("Cast", ["row"], ["row_half"], to=TensorProto.FLOAT16))
            nodes.append(helper.make_node("MatMul", ["row_half", "pixels"], ["x_half"]))
            nodes.append(helper.make_node("Cast", ["x_half"], ["x"], to=TensorProto.FLOAT))
        else:
            nodes.append(node)
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)


def test_half_precision_that_is_half_precision(tiny_graph: Path, tmp_path: Path) -> None:
    graph = edited(tiny_graph, tmp_path / "half.onnx", half)
    sidecar, _ = build_engine(make_bundle(tmp_path / "a", graph, precision="fp16"), compute="8.6")
    assert sidecar.precision.products == {"float16": 1, "float32": 2}
    with pytest.raises(EngineError, match=r"called fp32 and is something else; received products: .*1 of float16"):
        build_engine(make_bundle(tmp_path / "b", graph, precision="fp32"), compute="8.6")


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
def test_a_lower_precision_that_is_really_float32(tiny_graph: Path, tmp_path: Path, precision: str) -> None:
    bundle = make_bundle(tmp_path / "b", tiny_graph, precision=precision)
    with pytest.raises(EngineError, match=f"called {precision} and is something else; received products: 3 of float32"):
        build_engine(bundle, compute="8.6")
    assert left(bundle) == []


@pytest.mark.parametrize("tf32", [False, True])
def test_the_builder_is_told_so(tf32: bool) -> None:
    """TF32 is on by default in a new configuration."""
    backend = open_backend("tensorrt_rtx")
    config = tensorrt_rtx.Builder(shared_log(backend).logger).create_builder_config()
    assert config.get_flag(tensorrt_rtx.BuilderFlag.TF32)
    _configure(backend, config, {"tf32": tf32, "workspace": 2**28, "compute_capabilities": ["8.6", "12.0"]})
    assert config.get_flag(tensorrt_rtx.BuilderFlag.TF32) is tf32
    assert config.profiling_verbosity == tensorrt_rtx.ProfilingVerbosity.DETAILED
    assert config.get_memory_pool_limit(tensorrt_rtx.MemoryPoolType.WORKSPACE) == 2**28
    capabilities = [config.get_compute_capability(i) for i in range(config.num_compute_capabilities)]
    assert capabilities == [tensorrt_rtx.ComputeCapability.SM86, tensorrt_rtx.ComputeCapability.SM120]


def test_tf32_only_by_name(bundle: Bundle) -> None:
    sidecar, _ = build_engine(bundle, compute="8.6", tf32=True)
    assert sidecar.precision.tf32 is True
