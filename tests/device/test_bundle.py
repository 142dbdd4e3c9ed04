"""Bundles: written whole or not at all; opened exactly as documented or refused."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mope_deploy import bundle as module
from mope_deploy import manifest as schema
from mope_deploy.bundle import Bundle, write_bundle
from mope_deploy.errors import BundleError, MopeError, UsageError
from tests.device import tiny

pytestmark = pytest.mark.device


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Alter the manifest of a bundle in place."""
    document = json.loads((path / "manifest.json").read_text())
    change(document)
    (path / "manifest.json").write_text(json.dumps(document))


def refused(path: Path, *words: str, kind: type[MopeError] = BundleError, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        Bundle.open(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700
    for word in words:
        assert word in message
    return message


def test_round_trip(bundle_path: Path, graph_file: Path) -> None:
    opened = Bundle.open(bundle_path)
    manifest = opened.manifest
    assert manifest.task.labels == tiny.LABELS
    assert manifest.graphs[0].inputs[1].shape == ("batch", "text_length")
    assert manifest.graphs[0].inputs[1].range == (0, len(tiny.VOCABULARY) - 1)
    assert manifest.routing == schema.Routing(layers=tiny.LAYERS, experts=tiny.EXPERTS, top_k=None)
    assert opened.preprocessing == tiny.preprocessing()
    assert opened.file("model.onnx").read_bytes() == graph_file.read_bytes()
    for name, entry in manifest.files.items():
        assert hashlib.sha256((bundle_path / name).read_bytes()).hexdigest() == entry.sha256
    assert opened.sha256 == hashlib.sha256((bundle_path / "manifest.json").read_bytes()).hexdigest()
    inputs, outputs = opened.golden()
    assert inputs["pixel_values"].shape == (len(tiny.SAMPLES), 3, tiny.SIZE, tiny.SIZE)
    assert outputs["routing"].shape == (len(tiny.SAMPLES), tiny.LAYERS, tiny.EXPERTS)
    with pytest.raises(BundleError, match="lists no file"):
        opened.file("../secret")


def test_every_file_but_the_manifest_is_listed(bundle_path: Path) -> None:
    listed = json.loads((bundle_path / "manifest.json").read_text())["files"]
    found = {p.relative_to(bundle_path).as_posix() for p in bundle_path.rglob("*") if p.is_file()}
    assert set(listed) == found - {"manifest.json"}
    assert Bundle.open(bundle_path).unlisted() == ()


def test_a_flipped_bit_in_any_file_is_found(bundle_path: Path, tmp_path: Path) -> None:
    for name in Bundle.open(bundle_path).manifest.files:
        target = tmp_path / "copy"
        shutil.copytree(bundle_path, target)
        damaged = bytearray((target / name).read_bytes())
        damaged[len(damaged) // 2] ^= 1
        (target / name).write_bytes(bytes(damaged))
        refused(target, name, "was altered", "SHA-256")
        Bundle.open(target, verify=False)  # sizes still agree
        (target / name).write_bytes(bytes(damaged) + b"x")
        refused(target, name, "was altered", "bytes", verify=False)
        (target / name).unlink()
        refused(target, name, "is missing", verify=False)
        (target / name).mkdir()
        refused(target, name, "is not a file", verify=False)
        shutil.rmtree(target)


def test_links_are_refused(bundle_copy: Path, tmp_path: Path) -> None:
    """A link may lead outside, today or tomorrow."""
    (bundle_copy / "model.onnx").rename(tmp_path / "model.onnx")
    (bundle_copy / "model.onnx").symlink_to(tmp_path / "model.onnx")
    refused(bundle_copy, "symbolic link", "cp -rL")
    (bundle_copy / "model.onnx").unlink()
    (tmp_path / "model.onnx").rename(bundle_copy / "model.onnx")
    Bundle.open(bundle_copy)
    (bundle_copy / "golden").rename(tmp_path / "golden")
    (bundle_copy / "golden").symlink_to(tmp_path / "golden")
    refused(bundle_copy, "golden is a symbolic link")


def test_a_linked_manifest_is_refused(bundle_copy: Path, tmp_path: Path) -> None:
    (bundle_copy / "manifest.json").rename(tmp_path / "m.json")
    (bundle_copy / "manifest.json").symlink_to(tmp_path / "m.json")
    refused(bundle_copy, "symbolic link")


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../x",
        "golden/../../x",
        "..",
        ".",
        "",
        "a//b",
        "./a",
        "a\\b",
        "C:x",
        ".hidden",
        "a b",
        "a\n",
        "x" * 200,
        "é",
        "a/" * 20 + "a",
        "manifest.json",
        "-rf",
        None,
        7,
        ["a"],
    ],
)
@pytest.mark.parametrize("field", ["file", "data", "tokenizer", "samples", "files", "report"])
def test_names_that_could_leave_the_folder(bundle_copy: Path, field: str, name: Any) -> None:
    if name is None and field in ("tokenizer", "report"):
        return  # null is allowed there, and checked below

    def change(document: dict[str, Any]) -> None:
        if field == "files":
            document["files"][name if isinstance(name, str) else str([name])] = {"sha256": "0" * 64, "bytes": 1}
        elif field == "file":
            document["graphs"][0]["file"] = name
        elif field == "data":
            document["graphs"][0]["data"] = [name]
        elif field == "tokenizer":
            document["preprocess"]["tokenizer"] = name
        elif field == "samples":
            document["golden"]["samples"] = name
        else:
            document["parity"]["report"] = name

    rewrite(bundle_copy, change)
    refused(bundle_copy, "the relative path of a file inside the bundle")


CPU = {"threads": None, "arena": True}
GATE = {"samples": 5, "mark": "CPU", "kept": [], "thresholds": {"labels": 0.99}, "figures": {"labels": 1.0}}
CHANGES: list[tuple[str, Any, str]] = [
    ("format", "other", "'mope-bundle'"),
    ("name", "", "name"),
    ("name", "x" * 201, "201 characters"),
    ("created", "yesterday", "UTC"),
    ("created", "2025-13-01T00:00:00Z", "UTC"),
    ("versions", [], "versions"),
    ("versions", {"torch": 2}, "versions.torch"),
    ("versions", {str(i): "1" for i in range(101)}, "at most 100"),
    ("versions", {"x" * 101: "1"}, "100 characters"),
    ("task.type", "regression", "single-label, multi-label"),
    ("task.labels", [], "labels"),
    ("task.labels", ["a", "a", "b"], "'a' twice"),
    ("task.labels", ["a", "b", 3], "labels[2]"),
    ("task.labels", ["a", "b", "x" * 257], "257 characters"),
    ("task.labels", ["a", "b"], "logits"),
    ("task.threshold", 0.5, "null"),
    ("task", None, "JSON object"),
    ("modalities.main", "text", "modalities"),
    ("modalities.main", "smell", "image, text"),
    ("modalities.complementary", ["text", "text"], "twice"),
    ("modalities.complementary", [], "image, text"),
    ("preprocess.image.height", 16, "pixel_values"),
    ("preprocess.image.mean", [0.1, 0.2], "3 numbers"),
    ("preprocess.image.extra", 1, "unknown key 'extra'"),
    ("preprocess.text.max_length", 10**6, "65,536"),
    ("preprocess.text", None, "both"),
    ("preprocess.tokenizer", None, "both"),
    ("graphs", [], "1 to 64 items"),
    ("graphs", {}, "graphs"),
    ("graphs.0.opset", "18", "opset"),
    ("graphs.0.opset", True, "opset"),
    ("graphs.0.ir_version", 10**30, "ir_version"),
    ("graphs.0.runs_on", "tensorrt-99", "any, onnxruntime"),
    ("graphs.0.inputs", [], "inputs"),
    ("graphs.0.inputs.0.dtype", "float64", "float32"),
    ("graphs.0.inputs.0.dtype", "float16", "pixel_values; received float16"),
    ("graphs.0.inputs.0.shape", ["batch", 3, 8, 0], "shape[3]"),
    ("graphs.0.inputs.0.shape", ["batch", 3, 8, "Width!"], "shape[3]"),
    ("graphs.0.inputs.0.shape", ["batch", 3, 8, 9], "expected float32 (batch, 3, 8, 8)"),
    ("graphs.0.inputs.0.shape", [1] * 9, "0 to 8 items"),
    ("graphs.0.inputs.0.name", "pixels", "pixel_values"),
    ("graphs.0.inputs.0.name", "input_ids", "twice"),
    ("graphs.0.inputs.1.range", [5, 1], "least, greatest"),
    ("graphs.0.inputs.1.range", [0, float("inf")], "not JSON"),
    ("graphs.0.inputs.1.range", [0, 10**400], "an integer of 401 digits"),
    ("graphs.0.inputs.1.range", [0, 1e305], "range"),
    ("graphs.0.outputs.0.name", "scores", "logits"),
    ("graphs.0.file", "other.onnx", "'other.onnx' is used and not listed"),
    ("graphs.0.data", ["model.onnx.data"], "is used and not listed"),
    ("routing", None, "routing"),
    ("routing.layers", 4, "routing"),
    ("routing.top_k", 5, "1 to 4"),
    ("graphs.0.precision", "fp8", "fp32, fp16, bf16, int8, int8-dynamic"),
    ("graphs.0.tolerance.logits", float("nan"), "NaN is not JSON"),
    ("graphs.0.tolerance.logits", -1, "tolerance.logits"),
    ("graphs.0.tolerance", 1, "JSON object"),
    ("graphs.0.gate", {"samples": 5}, "missing"),
    ("graphs.0.gate", {**GATE, "samples": 0}, "samples"),
    ("graphs.0.gate", {**GATE, "mark": "guessed"}, "emulated"),
    ("graphs.0.gate", {**GATE, "thresholds": {"labels": 1.5}}, "thresholds.labels"),
    ("graphs.0.gate", {**GATE, "kept": ["a", "a"]}, "'a' twice"),
    ("graphs.0.gate", {**GATE, "figures": {"labels": None}}, "figures"),
    (
        "build",
        {"target": None, "profile": {"batch": [4, 1, 16]}, "workspace": None, "cpu": CPU},
        "least, best, greatest",
    ),
    (
        "build",
        {"target": None, "profile": {"batch": [1, 4.5, 16]}, "workspace": None, "cpu": CPU},
        "least, best, greatest",
    ),
    ("build", {"target": None, "profile": {}, "workspace": 0, "cpu": CPU}, "workspace"),
    ("build", {"target": 3, "profile": {}, "workspace": None, "cpu": CPU}, "target"),
    ("build", {"target": None, "profile": {}, "workspace": 1}, "cpu missing"),
    ("build", {"target": None, "profile": {}, "workspace": 1, "cpu": {**CPU, "threads": 0}}, "threads"),
    ("build", {"target": None, "profile": {}, "workspace": 1, "cpu": {**CPU, "arena": 1}}, "true or false"),
    ("graphs.0.parts", None, "parts"),
    ("golden.inputs", "golden/none.npz", "not listed"),
    ("parity.figures", {"a": [1]}, "figures"),
    ("parity.figures", {"a": "x" * 1001}, "1,001 characters"),
    ("parity.figures", {str(i): 1 for i in range(201)}, "200"),
    ("files", {}, "files"),
    ("files", {f"f{i}": {"sha256": "0" * 64, "bytes": 1} for i in range(10_001)}, "10,000"),
    ("files.parity.json", {"sha256": "0" * 63, "bytes": 2}, "64 hexadecimal"),
    ("files.parity.json", {"sha256": "A" * 64, "bytes": 2}, "64 hexadecimal"),
    ("files.parity.json", {"sha256": "0" * 64, "bytes": -1}, "bytes"),
    ("files.parity.json", {"sha256": "0" * 64, "bytes": 1e3}, "bytes"),
    ("files.parity.json", {"sha256": "0" * 64, "bytes": 2**60}, "bytes"),
    ("files.parity.json", {"sha256": "0" * 64}, "bytes missing"),
    ("extra", 1, "unknown key 'extra'"),
    ("gaphs", 1, "did you mean 'graphs'?"),
]


# The same for a split graph: its parts fit the modalities, the main file and the list of files.
PARTS: list[tuple[str, Any, str]] = [
    ("graphs.0.parts", [], "conditions_text"),
    ("graphs.0.runs_on", "any", "onnxruntime for a graph in parts"),
    ("graphs.0.parts.0.modality", "image", "parts; received image; expected text, or none"),
    ("graphs.0.parts.0.file", "other.onnx", "'other.onnx' is used and not listed"),
    ("graphs.0.parts.0.data", ["part.data"], "'part.data' is used and not listed"),
    ("graphs.0.parts.0.file", "model.onnx", "one file twice"),
    ("graphs.0.parts.0.inputs.0.name", "pixel_values", "input_ids, attention_mask"),
    ("graphs.0.parts.0.outputs.0.name", "pooled", "y_text and conditions_text"),
    ("graphs.0.parts.0.outputs.1.shape", ["batch", "text_length"], "float32 (batch, a size)"),
    ("graphs.0.parts.0.outputs.1.shape", ["batch", 5], "expected float32 (batch, 5)"),
    ("graphs.0.parts.0.outputs.1.dtype", "float16", "float32 (batch, a size)"),
    ("graphs.0.inputs.1.name", "input_ids", "pixel_values, conditions_text"),
    ("graphs.0.inputs", [tiny.manifest()["graphs"][0]["inputs"][0]], "no conditions_text"),
]


def put(document: dict[str, Any], place: str, value: Any) -> None:
    head, _, rest = place.partition(".")
    if head == "files" and rest:
        document["files"][rest] = value
        return
    *path, last = place.split(".")
    target: Any = document
    for key in path:
        target = target[int(key) if key.isdigit() else key]
    target[last] = value


@pytest.mark.parametrize(("place", "value", "words"), CHANGES, ids=[f"{place}-{words}" for place, _, words in CHANGES])
def test_strict(bundle_copy: Path, place: str, value: Any, words: str) -> None:
    rewrite(bundle_copy, lambda document: put(document, place, value))
    refused(bundle_copy, "manifest.json", words)


@pytest.mark.parametrize(("place", "value", "words"), PARTS, ids=[f"{place}-{words}" for place, _, words in PARTS])
def test_strict_about_parts(graph_file: Path, tmp_path: Path, place: str, value: Any, words: str) -> None:
    files = {**tiny.files(graph_file), "model.text.onnx": b"not opened here"}
    path = write_bundle(tmp_path / "b", files=files, manifest=tiny.split(tiny.manifest())).path
    graph = Bundle.open(path).manifest.graphs[0]
    assert [spec.name for spec in graph.raw_inputs] == ["pixel_values", "input_ids", "attention_mask"]
    assert graph.files == ("model.onnx", "model.text.onnx")
    rewrite(path, lambda document: put(document, place, value))
    refused(path, words)


@pytest.mark.parametrize("key", sorted([*tiny.manifest(), "format", "schema", "files"]))
def test_no_field_may_be_left_out(bundle_copy: Path, key: str) -> None:
    rewrite(bundle_copy, lambda document: document.pop(key))
    refused(bundle_copy, key)


@pytest.mark.parametrize(("version", "todo"), [(4, "--upgrade"), (999, "--upgrade"), (0, "again"), (-1, "again")])
def test_unknown_schemas_say_what_to_do(bundle_copy: Path, version: int, todo: str) -> None:
    rewrite(bundle_copy, lambda document: document.update(schema=version))
    refused(bundle_copy, f"schema; received {version}", "reads: 1, 2, 3", todo)


@pytest.mark.parametrize("version", ["1", 1.0, True, None, [1]])
def test_a_schema_is_an_integer(bundle_copy: Path, version: Any) -> None:
    rewrite(bundle_copy, lambda document: document.update(schema=version))
    refused(bundle_copy, "schema")


def test_the_first_schema_stays_readable(bundle_copy: Path) -> None:
    """As the first release wrote it; what came later takes the values that say nothing."""
    text = (bundle_copy / "manifest.json").read_text()
    (bundle_copy / "manifest.json").write_text(json.dumps(tiny.as_schema_1(json.loads(text))))
    manifest = Bundle.open(bundle_copy).manifest
    assert manifest.schema == 1
    assert manifest.graphs[0].tolerance == schema.Tolerance(logits=1e-5, routing=1e-5)
    assert manifest.graphs[0].gate is None
    assert manifest.build == schema.Build(target=None, profile={}, workspace=None, cpu=schema.Cpu(None, True))


def test_the_second_schema_stays_readable(bundle_copy: Path) -> None:
    document = json.loads((bundle_copy / "manifest.json").read_text())
    old = tiny.as_schema_2(document | {"build": {"target": "orin-nano", "profile": {}, "workspace": 512}})
    (bundle_copy / "manifest.json").write_text(json.dumps(old))
    manifest = Bundle.open(bundle_copy).manifest
    assert manifest.schema == 2
    assert manifest.graphs[0].parts == ()
    assert manifest.build == schema.Build("orin-nano", {}, 512, schema.Cpu(None, True))
    rewrite(bundle_copy, lambda document: document["graphs"][0].update(parts=[]))
    refused(bundle_copy, "unknown key 'parts'")


@pytest.mark.parametrize("place", ["golden.tolerance", "graphs.0.precision"])
def test_the_first_schema_is_read_as_strictly(bundle_copy: Path, place: str) -> None:
    document = tiny.as_schema_1(json.loads((bundle_copy / "manifest.json").read_text()))
    put(document, place, 1)
    (bundle_copy / "manifest.json").write_text(json.dumps(document))
    refused(bundle_copy, place.rpartition(".")[2])


def test_what_lowers_precision_and_what_to_build(bundle_copy: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document["graphs"][0] |= {"precision": "int8", "gate": {**GATE, "kept": ["main.encoder.blocks.1"]}}
        document["build"] = {"target": "orin-nano", "profile": {"batch": [1, 1, 4]}, "workspace": 512}
        document["build"]["cpu"] = {"threads": 4, "arena": False}

    rewrite(bundle_copy, change)
    manifest = Bundle.open(bundle_copy).manifest
    assert manifest.graphs[0].gate == schema.Gate(
        5, "CPU", ("main.encoder.blocks.1",), {"labels": 0.99}, {"labels": 1.0}
    )
    assert manifest.build == schema.Build("orin-nano", {"batch": (1, 1, 4)}, 512, schema.Cpu(threads=4, arena=False))


@pytest.mark.parametrize(
    ("runs_on", "taken"),
    [
        ("any", ["onnxruntime", "tensorrt", "tensorrt_rtx"]),
        ("onnxruntime", ["onnxruntime"]),
        ("tensorrt", ["tensorrt", "tensorrt_rtx"]),
    ],
)
def test_which_engine_takes_a_graph(bundle_copy: Path, runs_on: str, taken: list[str]) -> None:
    rewrite(bundle_copy, lambda document: put(document, "graphs.0.runs_on", runs_on))
    opened = Bundle.open(bundle_copy)
    for engine in ("onnxruntime", "tensorrt", "tensorrt_rtx"):
        if engine in taken:
            assert opened.graph(engine=engine).name == "model"
        else:
            with pytest.raises(UsageError, match=f"no graph for {engine}"):
                opened.graph(engine=engine)
            with pytest.raises(UsageError, match=runs_on):
                opened.graph("model", engine=engine)


def test_damaged_manifests(bundle_copy: Path) -> None:
    file = bundle_copy / "manifest.json"
    good = file.read_bytes()
    for bad, words in (
        (b"", "damaged"),
        (good[: len(good) // 2], "damaged"),
        (b"\xff\xfe", "no UTF-8"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a":' * 200_000, "nested too deeply"),
        (b"[]", "JSON object"),
        (b"null", "JSON object"),
        (good.replace(b'"schema"', b'"schema": 3, "schema"', 1), "twice"),
        (good.replace(b'"schema": 3', b'"schema": ' + b"9" * 5000, 1), "5,000 digits"),
    ):
        file.write_bytes(bad)
        refused(bundle_copy, "manifest.json", words)
    with file.open("wb") as large:
        large.truncate(module.MAX_MANIFEST_BYTES + 1)
    refused(bundle_copy, "manifest.json is too large")


def test_random_damage_to_the_manifest_is_never_another_exception(bundle_copy: Path) -> None:
    file = bundle_copy / "manifest.json"
    good = file.read_bytes()
    draw = np.random.default_rng(3)
    opened = 0
    for _ in range(300):
        bad = bytearray(good)
        bad[draw.integers(len(bad))] = draw.integers(256)
        file.write_bytes(bytes(bad))
        try:
            Bundle.open(bundle_copy)
            opened += 1  # a letter of a name, say
        except MopeError as error:
            message = str(error)
            del error
            if "\n" in message:
                pytest.fail(message)
    assert opened < 200


def test_things_that_are_no_bundle(tmp_path: Path, bundle_path: Path) -> None:
    usage = {"kind": UsageError}
    refused(tmp_path / "none", "nothing there", **usage)
    refused(bundle_path / "manifest.json", "give the folder", **usage)
    refused(bundle_path / "model.onnx", "give the folder", **usage)
    refused(bundle_path.parent, f"did you mean {bundle_path}", **usage)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    refused(tmp_path / "run", "a training run", "mope-export", **usage)
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "model.safetensors").write_bytes(b"")
    refused(tmp_path / "checkpoint", "a checkpoint", "mope-export", **usage)


def exchange(path: Path, name: str, data: bytes) -> None:
    """Put other bytes into a file and their hash into the manifest."""
    (path / name).write_bytes(data)
    entry = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    rewrite(path, lambda document: document["files"].update({name: entry}))


class Opener:
    """Unpickling it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_no_pickle_is_loaded(bundle_copy: Path, tmp_path: Path) -> None:
    outputs = Bundle.open(bundle_copy).golden()[1]
    payload = np.array([Opener(tmp_path / "run by a pickle")], dtype=object)
    exchange(bundle_copy, "golden/outputs.npz", tiny.npz({**outputs, "logits": payload}))
    with pytest.raises(BundleError, match=r"outputs\.npz is damaged"):
        Bundle.open(bundle_copy).golden()
    assert not (tmp_path / "run by a pickle").exists()


def test_damaged_golden_arrays(bundle_copy: Path) -> None:
    outputs = Bundle.open(bundle_copy).golden()[1]
    for bad in (
        b"",
        b"PK\x03\x04",
        tiny.npz(outputs)[:-100],
        tiny.npz({"logits": outputs["logits"]}),
        tiny.npz({**outputs, "logits": outputs["logits"].astype(np.float64)}),
        tiny.npz({**outputs, "logits": outputs["logits"][:2]}),
        tiny.npz({**outputs, "logits": outputs["logits"][0]}),
        tiny.npz({name: array[:0] for name, array in outputs.items()}),
    ):
        exchange(bundle_copy, "golden/outputs.npz", bad)
        opened = Bundle.open(bundle_copy)
        with pytest.raises(BundleError):
            opened.golden()


def test_golden_arrays_may_not_unpack_without_limit(bundle_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_GOLDEN_BYTES", 1000)
    with pytest.raises(BundleError, match="too large"):
        Bundle.open(bundle_copy).golden()


def test_damaged_tokenizer_is_named(bundle_copy: Path) -> None:
    exchange(bundle_copy, "tokenizer.json", b"{}")
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        _ = Bundle.open(bundle_copy).preprocessing


def two_graphs() -> list[dict[str, Any]]:
    (graph,) = tiny.manifest()["graphs"]
    return [graph, {**copy.deepcopy(graph), "name": "model-fused", "runs_on": "onnxruntime"}]


def test_choice_of_graph(tmp_path: Path, graph_file: Path, bundle_path: Path) -> None:
    one = Bundle.open(bundle_path)
    assert one.graph().name == "model"
    made = write_bundle(tmp_path / "b", files=tiny.files(graph_file), manifest=tiny.manifest(graphs=two_graphs()))
    assert made.graph().name == "model"  # a variant is only run when it is asked for
    assert made.graph("model-fused").runs_on == "onnxruntime"
    assert made.graph(engine="other").name == "model"
    with pytest.raises(UsageError, match="did you mean 'model-fused'"):
        made.graph("model-fusd")
    first_is_special = tiny.manifest(graphs=two_graphs()[::-1])
    special = write_bundle(tmp_path / "c", files=tiny.files(graph_file), manifest=first_is_special)
    assert special.graph().name == "model-fused"
    assert special.graph(engine="other").name == "model"
    with pytest.raises(UsageError, match="engine other"):
        made.graph("model-fused", engine="other")


# --- writing ---


def snapshot(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_overwrite_only_when_asked_and_only_a_bundle(bundle_copy: Path, graph_file: Path, tmp_path: Path) -> None:
    before = snapshot(bundle_copy)
    files = tiny.files(graph_file)
    with pytest.raises(UsageError, match="exists"):
        write_bundle(bundle_copy, files=files, manifest=tiny.manifest())
    assert snapshot(bundle_copy) == before
    write_bundle(bundle_copy, files=files, manifest=tiny.manifest(name="second"), overwrite=True)
    assert Bundle.open(bundle_copy).manifest.name == "second"
    for name in ("folder", "file", "link"):
        target = tmp_path / name
        {"folder": target.mkdir, "file": target.touch, "link": lambda t=target: t.symlink_to(bundle_copy)}[name]()
        with pytest.raises(UsageError, match="not a bundle"):
            write_bundle(target, files=files, manifest=tiny.manifest(), overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "file", "folder", "link"]


@pytest.mark.parametrize("when", ["manifest", "golden", "source", "copy", "rename", "interrupt"])
def test_a_failure_leaves_the_old_bundle(
    bundle_copy: Path, graph_file: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    before = snapshot(bundle_copy)
    files, manifest, error = tiny.files(graph_file), tiny.manifest(name="second"), BundleError
    if when == "manifest":
        manifest["task"]["labels"] = ["a"]
    elif when == "golden":
        files["golden/outputs.npz"] = b"nothing"
    elif when == "source":
        files["model.onnx"] = bundle_copy / "absent.onnx"
    elif when == "rename":
        rename = Path.rename

        def fail(self: Path, target: Path) -> Path:
            if self.name.endswith(".tmp"):
                raise OSError(28, "No space left on device")
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", fail)
    else:
        error = KeyboardInterrupt if when == "interrupt" else BundleError

        def stop(*_: Any) -> None:
            raise KeyboardInterrupt if when == "interrupt" else OSError(28, "No space left on device")

        monkeypatch.setattr(shutil, "copyfile", stop)
    with pytest.raises(error):
        write_bundle(bundle_copy, files=files, manifest=manifest, overwrite=True)
    monkeypatch.undo()
    assert snapshot(bundle_copy) == before
    assert [p.name for p in bundle_copy.parent.iterdir()] == [bundle_copy.name]


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "manifest.json", "a/../../evil"])
def test_nothing_is_written_outside(tmp_path: Path, graph_file: Path, name: str) -> None:
    files = {**tiny.files(graph_file), name: b"evil"}
    with pytest.raises(BundleError):
        write_bundle(tmp_path / "in" / "b", files=files, manifest=tiny.manifest())
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_that_is_no_json(tmp_path: Path, graph_file: Path) -> None:
    for bad in (float("nan"), {1, 2}, b"x"):
        with pytest.raises(BundleError):
            write_bundle(
                tmp_path / "b",
                files=tiny.files(graph_file),
                manifest=tiny.manifest(parity={"report": None, "figures": bad}),
            )
    assert list(tmp_path.iterdir()) == []


def test_folders_are_as_readable_as_others(bundle_path: Path) -> None:
    mask = os.umask(0o022)
    os.umask(mask)
    assert bundle_path.stat().st_mode & 0o777 == 0o777 & ~mask
