"""A built engine is checked in one order before it runs: hash, version, compute capability, OS, deserialising, I/O.

Deserialising, which needs a GPU, is the one thing that is ever faked.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from pathlib import Path
from typing import Any

import pytest
import tensorrt_rtx as trt

from mope_deploy.bundle import Bundle
from mope_deploy.engines.tensorrt import session as tensorrt_session
from mope_deploy.engines.tensorrt.backends import Backend
from mope_deploy.engines.tensorrt.device import Device, this_device
from mope_deploy.engines.tensorrt.session import _described, check_tensors, deserialise
from mope_deploy.engines.tensorrt.sidecar import (
    Sidecar,
)
from mope_deploy.errors import EngineError
from tests.device import tiny
from tests.engines.built import AMPERE, VERSION, check, files_of, refusal, rewrite


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
