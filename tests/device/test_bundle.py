"""Bundles: opened exactly as documented or refused."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mope_deploy import manifest as schema
from mope_deploy.bundle import Bundle, write_bundle
from mope_deploy.bundle import open as module
from mope_deploy.errors import BundleError, UsageError
from tests.device import tiny
from tests.device.damage import exchange, put, refused, rewrite

pytestmark = pytest.mark.device


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
