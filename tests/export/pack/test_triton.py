"""A model repository for Triton: its configuration parsed against Triton's own schema, its files run in ONNX Runtime.

No Triton server runs here.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from google.protobuf import text_format

from export.pack import triton
from export.pack.triton import check_repository, write_repository
from mope_deploy.bundle import Bundle, write_bundle
from mope_deploy.errors import BundleError, ExportError, MissingExtraError, UsageError
from tests.device import tiny
from tests.device.graph import write_graph


@pytest.fixture(scope="session")
def schema() -> Any:
    """NVIDIA's ``model_config.proto`` as its own client ships it."""
    return triton.schema()


@pytest.fixture(scope="session")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_graph(tmp_path_factory.mktemp("graph") / "model.onnx")


@pytest.fixture
def bundle(graph: Path, tmp_path: Path) -> Bundle:
    return write_bundle(tmp_path / "bundle", files=tiny.files(graph), manifest=tiny.manifest())


def parsed(schema: Any, model: Path) -> Any:
    return text_format.Parse((model / "config.pbtxt").read_text(encoding="utf-8"), schema.ModelConfig())


def tree(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def test_the_configuration_is_what_tritons_own_schema_reads(schema: Any, bundle: Bundle, tmp_path: Path) -> None:
    version = write_repository(bundle, tmp_path / "models")
    assert version == tmp_path / "models/tiny/1"
    assert tree(tmp_path / "models") == [
        "tiny/1/bundle.json",
        "tiny/1/model.onnx",
        "tiny/config.pbtxt",
        "tiny/labels.txt",
    ]
    config = parsed(schema, version.parent)
    assert (config.name, config.platform, config.max_batch_size) == ("tiny", "onnxruntime_onnx", 16)
    T = schema.DataType
    assert [(t.name, t.data_type, list(t.dims)) for t in config.input] == [
        ("pixel_values", T.Value("TYPE_FP32"), [3, tiny.SIZE, tiny.SIZE]),
        ("input_ids", T.Value("TYPE_INT64"), [-1]),
        ("attention_mask", T.Value("TYPE_INT64"), [-1]),
    ]
    assert [(t.name, t.data_type, list(t.dims), t.label_filename) for t in config.output] == [
        ("logits", T.Value("TYPE_FP32"), [len(tiny.LABELS)], "labels.txt"),
        ("routing", T.Value("TYPE_FP32"), [tiny.LAYERS, tiny.EXPERTS], ""),
    ]
    assert config.WhichOneof("scheduling_choice") == "dynamic_batching"
    assert list(config.dynamic_batching.preferred_batch_size) == [4, 16]
    assert config.dynamic_batching.max_queue_delay_microseconds == 500
    assert config.version_policy.latest.num_versions == 1
    assert not config.instance_group
    (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert (accelerator.name, dict(accelerator.parameters)) == ("cuda", {"use_tf32": "0"})
    assert (version.parent / "labels.txt").read_text().splitlines() == list(tiny.LABELS)
    assert json.loads((version / "bundle.json").read_text())["sha256"] == bundle.sha256


def test_options(schema: Any, graph: Path, tmp_path: Path) -> None:
    cpu = {"threads": None, "arena": True}
    build = {"target": "server", "profile": {"batch": [1, 8, 64]}, "workspace": None, "cpu": cpu}
    bundle = write_bundle(tmp_path / "b", files=tiny.files(graph), manifest=tiny.manifest(build=build))
    version = write_repository(
        bundle, tmp_path / "m", name="fleet-1", max_batch=32, queue_delay_us=0, instances=2, kind="gpu"
    )
    config = parsed(schema, version.parent)
    assert (version.parent.name, config.name, config.max_batch_size) == ("fleet-1", "fleet-1", 32)
    assert list(config.dynamic_batching.preferred_batch_size) == [8, 32]
    assert config.dynamic_batching.max_queue_delay_microseconds == 0
    (group,) = config.instance_group
    assert (group.count, group.kind) == (2, schema.ModelInstanceGroup.KIND_GPU)
    config = parsed(schema, write_repository(bundle, tmp_path / "m", name="one", max_batch=1).parent)
    assert list(config.dynamic_batching.preferred_batch_size) == [1]


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("max_batch_size", "max_batchsize"),
        ("TYPE_INT64", "TYPE_LONG"),
        ("dims: [-1]", 'dims: ["text_length"]'),
        ("max_queue_delay_microseconds", "max_queue_delay_milliseconds"),
        ("num_versions: 1\n  }\n", "num_versions: 1\n"),
        ('platform: "onnxruntime_onnx"', "platform: onnxruntime_onnx"),
    ],
)
def test_that_schema_finds_mistakes(schema: Any, bundle: Bundle, tmp_path: Path, right: str, wrong: str) -> None:
    model = write_repository(bundle, tmp_path / "models").parent
    text = (model / "config.pbtxt").read_text()
    assert right in text
    (model / "config.pbtxt").write_text(text.replace(right, wrong))
    with pytest.raises(text_format.ParseError):
        parsed(schema, model)


@pytest.mark.parametrize("external", [False, True])
def test_the_version_runs_as_it_lies_there(external: bool, tmp_path: Path) -> None:
    """A graph with weights apart is a folder called model.onnx, and finds them under the name it has for them."""
    graph = write_graph(tmp_path / "weights.onnx", external=external)
    (entry,) = tiny.manifest()["graphs"]
    files = {**tiny.files(graph)}
    del files["model.onnx"]
    files["int8/net.onnx"] = graph
    entry |= {"name": "net", "file": "int8/net.onnx"}
    if external:
        files["int8/weights.onnx.data"] = tmp_path / "weights.onnx.data"
        entry["data"] = ["int8/weights.onnx.data"]
    bundle = write_bundle(tmp_path / "b", files=files, manifest=tiny.manifest(graphs=[entry]))
    version = write_repository(bundle, tmp_path / "models")
    shutil.rmtree(bundle.path)
    graph.unlink()
    apart = ["bundle.json", "model.onnx/model.onnx", "model.onnx/weights.onnx.data"]
    assert tree(version) == (apart if external else ["bundle.json", "model.onnx"])
    session = ort.InferenceSession(version / "model.onnx/model.onnx" if external else version / "model.onnx")
    pictures = [tiny.picture(i, size) for i, (_, size) in enumerate(tiny.SAMPLES)]
    raw = [{"image": p, "text": t} for p, (t, _) in zip(pictures, tiny.SAMPLES, strict=True)]
    inputs = tiny.preprocessing().collate(raw)
    np.testing.assert_allclose(session.run(["logits"], inputs)[0], tiny.oracle(inputs)["logits"], rtol=1e-5, atol=1e-5)


def test_the_next_version_keeps_what_was_tuned(schema: Any, bundle: Bundle, tmp_path: Path) -> None:
    model = write_repository(bundle, tmp_path / "models").parent
    tuned = (model / "config.pbtxt").read_text().replace("microseconds: 500", "microseconds: 9 # tuned")
    tuned = tuned.replace("max_batch_size: 16", "max_batch_size: 8\ndefault_model_filename: 'model.onnx'")
    (model / "config.pbtxt").write_text(tuned)
    (model / "7").mkdir()
    (model / "notes").mkdir()
    version = write_repository(bundle, tmp_path / "models", max_batch=64)
    assert version == model / "8"
    assert tree(version) == ["bundle.json", "model.onnx"]
    assert (model / "config.pbtxt").read_text() == tuned
    assert parsed(schema, model).dynamic_batching.max_queue_delay_microseconds == 9
    assert (model / "1/model.onnx").exists()


def changed(bundle: Bundle, graph: Path, folder: Path, **changes: Any) -> Bundle:
    return write_bundle(folder, files=tiny.files(graph), manifest=tiny.manifest(**changes))


def test_a_model_of_another_interface_is_not_given_a_version(bundle: Bundle, graph: Path, tmp_path: Path) -> None:
    model = write_repository(bundle, tmp_path / "models").parent
    before = {name: (model / name).read_bytes() for name in tree(model)}

    def refused(other: Bundle, words: str) -> None:
        with pytest.raises(UsageError, match=words) as caught:
            write_repository(other, tmp_path / "models")
        assert "\n" not in str(caught.value)
        assert {name: (model / name).read_bytes() for name in tree(model)} == before

    task = {"type": "single-label", "labels": [*tiny.LABELS[1:], tiny.LABELS[0]], "threshold": None}
    refused(changed(bundle, graph, tmp_path / "labels", task=task), "other labels, or in another order")
    (entry,) = tiny.manifest()["graphs"]
    without = {**entry, "outputs": entry["outputs"][:1]}
    outputs = tiny.npz({"logits": bundle.golden()[1]["logits"]})
    files = {**tiny.files(graph), "golden/outputs.npz": outputs}
    other = write_bundle(tmp_path / "o", files=files, manifest=tiny.manifest(graphs=[without], routing=None))
    refused(other, r"of another set of outputs; received .*'routing'.*; expected .*'logits'.*; choose another name")
    for right, wrong, words in (
        ("onnxruntime_onnx", "tensorrt_plan", "another platform; received tensorrt_plan; expected onnxruntime_onnx"),
        ("[3, 8, 8]", "[3, 8, 9]", "another set of inputs"),
        ("max_batch_size: 16", "max_batch_size: 0", "another batching; received no batch axis"),
        ("output {", "output ] {", r"config\.pbtxt cannot be read: \d+:\d+ : .*Expected"),
    ):
        text = before["config.pbtxt"].decode().replace(right, wrong)
        (model / "config.pbtxt").write_text(text)
        before["config.pbtxt"] = text.encode()
        refused(bundle, words)
        before["config.pbtxt"] = text.replace(wrong, right).encode()
        (model / "config.pbtxt").write_bytes(before["config.pbtxt"])
    write_repository(bundle, tmp_path / "models")


def test_foreign_folders_are_left_alone(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "models/tiny").mkdir(parents=True)
    (tmp_path / "models/tiny/thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"tiny exists and is no model of a Triton repository: no config\.pbtxt"):
        write_repository(bundle, tmp_path / "models")
    assert tree(tmp_path / "models") == ["tiny/thesis.txt"]
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "models/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "models/file").write_text("mine")
    for name in ("linked", "file"):
        with pytest.raises(UsageError, match="is no model of a Triton repository"):
            write_repository(bundle, tmp_path / "models", name=name)
    for folder, words in (
        (bundle.path, "is a bundle, not"),
        (bundle.path / "triton", "is a bundle, not"),
        (tmp_path / "models/file", "is a file"),
    ):
        with pytest.raises(UsageError, match=words):
            write_repository(bundle, folder)
    assert Bundle.open(bundle.path).unlisted() == ()


def test_a_place_that_cannot_be_is_found_out_before_an_export(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "models/my_own").mkdir(parents=True)
    check_repository(tmp_path / "models", "another")
    check_repository(tmp_path / "none/yet", "my own")
    for folder, words in (
        (bundle.path, "is a bundle, not"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "file/models", "cannot be written"),
        (Path("/proc/models"), "cannot be written"),
        (tmp_path / "models", r"my_own exists and is no model"),
    ):
        with pytest.raises(UsageError, match=words):
            check_repository(folder, "my own")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "file", "models"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "../out"}, "name of a Triton model"),
        ({"name": ""}, "name of a Triton model"),
        ({"name": ".hidden"}, "name of a Triton model"),
        ({"max_batch": 0}, "largest batch; received 0; expected 1 to 4,096"),
        ({"queue_delay_us": -1}, "queue delay"),
        ({"instances": 0}, "instances"),
        ({"kind": "tpu"}, "one of auto, gpu, cpu"),
        ({"graph": "modle"}, "did you mean 'model'"),
    ],
)
def test_misuse(bundle: Bundle, tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        write_repository(bundle, tmp_path / "models", **options)
    assert not (tmp_path / "models").exists()


def test_a_graph_that_onnxruntime_does_not_take(graph: Path, tmp_path: Path) -> None:
    (entry,) = tiny.manifest()["graphs"]
    bundle = changed(None, graph, tmp_path / "b", graphs=[{**entry, "runs_on": "tensorrt"}])  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no graph for onnxruntime"):
        write_repository(bundle, tmp_path / "models")


def test_a_failure_leaves_nothing_behind(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(triton.shutil, "copyfile", full)
    with pytest.raises(ExportError, match="cannot be written; received No space left"):
        write_repository(bundle, tmp_path / "models")
    assert list((tmp_path / "models").iterdir()) == []
    monkeypatch.undo()
    model = write_repository(bundle, tmp_path / "models").parent
    before = tree(model)
    monkeypatch.setattr(triton.shutil, "copyfile", full)
    with pytest.raises(ExportError):
        write_repository(bundle, tmp_path / "models")
    assert tree(model) == before
    assert not [path for path in model.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("name", "model"), [("a b/c: d", "a_b_c_d"), ("数", "mope"), ("..", "mope"), ("v1.2-x", "v1.2-x")]
)
def test_names_of_bundles_as_names_of_models(graph: Path, tmp_path: Path, name: str, model: str) -> None:
    bundle = changed(None, graph, tmp_path / "b", name=name)  # type: ignore[arg-type]
    assert write_repository(bundle, tmp_path / "models").parent.name == model


def test_labels_in_any_language_but_on_one_line(schema: Any, graph: Path, tmp_path: Path) -> None:
    labels = ['say "no"', "数", "a\\b"]
    task = {"type": "single-label", "labels": labels, "threshold": None}
    model = write_repository(changed(None, graph, tmp_path / "b", task=task), tmp_path / "models").parent  # type: ignore[arg-type]
    assert (model / "labels.txt").read_text(encoding="utf-8").splitlines() == labels
    for label in ("one\ntwo", "one\u2028two", "one\x1ctwo", "one\x85two"):  # where str.splitlines would part it
        task["labels"] = [label, "three", "four"]
        with pytest.raises(BundleError, match=r"task\.labels\[0\]; received .*; expected a string of 1 to 256"):
            changed(None, graph, tmp_path / "c", task=task)  # type: ignore[arg-type]


def test_a_configuration_that_other_tools_wrote_is_the_same_model(schema: Any, bundle: Bundle, tmp_path: Path) -> None:
    model = write_repository(bundle, tmp_path / "models", instances=2, kind="cpu").parent
    config = parsed(schema, model)
    forms = [
        text_format.MessageToString(config, **options)
        for options in ({}, {"as_one_line": True}, {"use_short_repeated_primitives": True}, {"pointy_brackets": True})
    ]
    for i, form in enumerate([*forms, forms[0] + "of_a_later_triton { field: 1 }"]):
        (model / "config.pbtxt").write_text(form)
        assert write_repository(bundle, tmp_path / "models") == model / str(i + 2)
        assert (model / "config.pbtxt").read_text() == form


def test_without_the_extra_nothing_is_written(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    triton.schema.cache_clear()
    monkeypatch.setitem(sys.modules, "tritonclient", None)
    with pytest.raises(
        MissingExtraError, match=r"needs the package 'tritonclient'.*pip install 'mope-deploy\[triton\]'"
    ):
        write_repository(bundle, tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_the_schema_needs_no_grpc() -> None:
    code = "import sys; sys.modules['grpc'] = None; from export.pack.triton import schema; print(schema().ModelConfig)"
    assert (
        "ModelConfig" in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    )
