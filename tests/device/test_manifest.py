"""``manifest.json``: read exactly as documented, or refused with the field, what stands there and what should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mope_deploy import limits
from mope_deploy import manifest as schema
from mope_deploy.bundle import Bundle, write_bundle
from mope_deploy.errors import MopeError
from mope_deploy.manifest import consistent
from tests.device import tiny
from tests.device.damage import put, refused, rewrite

pytestmark = pytest.mark.device


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
        "build.profile.batch[1]; received 4.5; expected an integer from 1 to 2,147,483,648",
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


@pytest.mark.parametrize(
    ("version", "todo"),
    [
        (5, "written by a newer release: pip install --upgrade"),
        (999, "written by a newer release: pip install --upgrade"),
        (3, "written by an older release: export it again"),
        (2, "written by an older release: export it again"),
        (1, "written by an older release: export it again"),
        (0, "again"),
        (-1, "again"),
    ],
)
def test_unknown_schemas_say_what_to_do(bundle_copy: Path, version: int, todo: str) -> None:
    rewrite(bundle_copy, lambda document: document.update(schema=version))
    refused(bundle_copy, f"schema; received {version}", "expected 4, the one that this release reads", todo)


@pytest.mark.parametrize("version", ["1", 1.0, True, None, [1]])
def test_a_schema_is_an_integer(bundle_copy: Path, version: Any) -> None:
    rewrite(bundle_copy, lambda document: document.update(schema=version))
    refused(bundle_copy, "schema")


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
        (good.replace(b'"schema"', b'"schema": 4, "schema"', 1), "twice"),
        (good.replace(b'"schema": 4', b'"schema": ' + b"9" * 5000, 1), "5,000 digits"),
    ):
        file.write_bytes(bad)
        refused(bundle_copy, "manifest.json", words)
    with file.open("wb") as large:
        large.truncate(limits.MAX_MANIFEST_BYTES + 1)
    refused(bundle_copy, "manifest.json", "too large")


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


def test_a_tokenizer_and_labels_beyond_their_limits(bundle_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as small:
        small.setattr(consistent, "MAX_TOKENIZER_BYTES", 100)
        refused(bundle_copy, "manifest.json.files: the tokenizer is too large; expected 100 bytes at most")
    names = [str(i) for i in range(limits.MAX_LABELS + 1)]
    rewrite(bundle_copy, lambda document: put(document, "task.labels", names))
    refused(bundle_copy, "task.labels; received an array of 100001 items; expected an array of 1 to 100,000 items")
