"""The JSON beside an engine: read strictly, written whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mope_deploy.engines.tensorrt import sidecar
from mope_deploy.engines.tensorrt.device import Device, _driver, _l4t, available_memory, this_device
from mope_deploy.engines.tensorrt.profiles import Sizes
from mope_deploy.engines.tensorrt.sidecar import Precision, Proof, Sidecar
from mope_deploy.errors import EngineError
from mope_deploy.files import json_bytes, write_file
from mope_deploy.manifest import FileEntry, TensorSpec
from tests.device.sensors import lay

pytestmark = pytest.mark.device

ORIN = Device(os="Linux aarch64", gpu="Orin", compute_capability="8.7", driver="540.4.0", cuda="12.6", l4t="36.4.3")
SIDECAR = Sidecar(
    created="2025-01-31T12:00:00Z",
    backend="tensorrt",
    version="10.3.0.30",
    graph="model",
    onnx={"model.onnx": "a" * 64, "model.onnx.data": "b" * 64},
    engine=FileEntry("c" * 64, 1234),
    compute_capabilities=("8.7",),
    built_on=ORIN,
    profile={"batch": Sizes(1, 4, 16)},
    inputs=(TensorSpec("pixel_values", "float32", ("batch", 3, 8, 8)),),
    outputs=(TensorSpec("logits", "float32", ("batch", 3)),),
    precision=Precision("fp16", {"float16": 4, "float32": 1}, 0, False),
    workspace=2**30,
    seconds=12.5,
    peak_bytes=2**31,
)
PROOF = Proof("c" * 64, "d" * 64, "10.3.0.30", ORIN, 1e-4, None, {"float16": 4}, "2025-01-31T12:00:00Z")


def test_round_trip(tmp_path: Path) -> None:
    write_file(tmp_path / "e.json", json_bytes(SIDECAR.to_dict()))
    assert Sidecar.read(tmp_path / "e.json") == SIDECAR
    assert json.loads((tmp_path / "e.json").read_text())["verified"] is False
    write_file(tmp_path / "p.json", json_bytes(PROOF.to_dict()))
    assert Proof.read(tmp_path / "p.json") == PROOF
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e.json", "p.json"]


def put(*keys: Any) -> Callable[[dict[str, Any]], None]:
    *path, last, value = keys

    def change(document: dict[str, Any]) -> None:
        for key in path:
            document = document[key]
        document[last] = value

    return change


BAD: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (put("format", "mope-bundle"), "expected 'mope-engine', schema 1"),
    (put("schema", 2), "schema 2; expected 'mope-engine', schema 1"),
    (lambda d: d.pop("version"), "version missing"),
    (put("versoin", "1"), "did you mean 'version'"),
    (put("verified", True), "proofs are kept per device"),
    (put("verified", 0), "true or false"),
    (put("backend", "tensorflow"), "one of tensorrt, tensorrt_rtx"),
    (put("onnx", {}), "an object of 1 to"),
    (put("onnx", {"../model.onnx": "a" * 64}), "inside the bundle"),
    (put("onnx", "model.onnx", "A" * 64), "64 hexadecimal digits"),
    (put("engine", "bytes", 0), "an integer from 1"),
    (put("engine", "sha256", None), "64 hexadecimal digits"),
    (put("compute_capabilities", []), "an array of 1 to"),
    (put("compute_capabilities", [8.7]), "a compute capability like '8.7'"),
    (put("built_on", "os", None), "built_on.os"),
    (put("built_on", "gpu", 3), "built_on.gpu"),
    (put("built_on", {}), "missing"),
    (put("profile", "batch", [4, 1, 16]), "[least, best, greatest]"),
    (put("profile", "batch", [1, 4]), "profile.batch; received an array of 2 items; expected an array of 3 integers"),
    (put("profile", "batch", [1.5, 4, 16]), "profile.batch[0]; received 1.5; expected an integer from 1 to"),
    (put("inputs", 0, "shape", ["batch", 0]), "a size of at least 1 or the name of an axis"),
    (put("inputs", 0, "shape", [True]), "a size of at least 1 or the name of an axis"),
    (put("outputs", []), "an array of 1 to"),
    (put("precision", "products", "float16", "four"), "an integer from 0"),
    (put("precision", "tf32", "no"), "true or false"),
    (put("workspace", 0), "an integer from 1"),
    (put("seconds", -1), "seconds"),
    (put("peak_bytes", None), "peak_bytes"),
]


@pytest.mark.parametrize(("change", "words"), BAD, ids=[f"{i}-{words}" for i, (_, words) in enumerate(BAD)])
def test_strict(tmp_path: Path, change: Callable[[dict[str, Any]], Any], words: str) -> None:
    document = json.loads(json.dumps(SIDECAR.to_dict()))
    change(document)
    (tmp_path / "e.json").write_text(json.dumps(document))
    with pytest.raises(EngineError) as caught:
        Sidecar.read(tmp_path / "e.json")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff\xfe", b'{"a": NaN}', b" " * (2**20 + 1)])
def test_damaged(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "e.json").write_bytes(data)
    with pytest.raises(EngineError, match=r"e\.json.*mope build"):
        Sidecar.read(tmp_path / "e.json")
    assert Proof.read(tmp_path / "e.json") is None


def test_a_record_without_end_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_file(tmp_path / "e.json", json_bytes(SIDECAR.to_dict()))
    monkeypatch.setattr(sidecar, "MAX_SIDECAR_BYTES", 100)
    with pytest.raises(EngineError, match=r"e\.json cannot be read; received too large: .* at most 100; .*mope build"):
        Sidecar.read(tmp_path / "e.json")


def test_a_proof_that_is_not_exactly_one_is_none(tmp_path: Path) -> None:
    assert Proof.read(tmp_path / "none.json") is None
    bad = [("engine_sha256", "c"), ("device", None), ("logits_error", -1), ("layers", {"float16": -1}), ("created", 5)]
    for key, value in bad:
        write_file(tmp_path / "p.json", json_bytes(PROOF.to_dict() | {key: value}))
        assert Proof.read(tmp_path / "p.json") is None


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    write_file(tmp_path / "e.json", json_bytes({"a": 1}))
    with pytest.raises(ValueError, match="JSON compliant"):
        write_file(tmp_path / "e.json", json_bytes({"a": float("nan")}))
    assert json.loads((tmp_path / "e.json").read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["e.json"]


def test_this_device_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    device = this_device()
    assert device.gpu is device.compute_capability is device.cuda is None
    assert device.no_gpu
    assert device.os.startswith("Linux ")
    free = available_memory()
    assert free is not None
    assert 2**20 < free < 2**50


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 4096),
        ({"memory.max": "max", "memory.current": "9"}, 4096),
        ({"memory.max": "3000", "memory.current": "2000", "memory.stat": "file 5\ninactive_file 500"}, 1500),
        ({"memory/memory.limit_in_bytes": "3000", "memory/memory.usage_in_bytes": "2900"}, 100),
        ({"memory/memory.limit_in_bytes": "9223372036854771712", "memory/memory.usage_in_bytes": "2900"}, 4096),
    ],
)
def test_memory_within_a_containers_limit(files: dict[str, str], free: int, tmp_path: Path) -> None:
    laid = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    assert available_memory(lay(tmp_path, {"proc/meminfo": "MemAvailable:  4 kB\n", **laid})) == free


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\nGCC: 12.3",
            "535.104.05",
        ),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs)\n", "580.65.06"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  540.4.0  Release Build\n", "540.4.0"),
        ("", None),
        ("GCC version: 12.3.0\n", None),
    ],
)
def test_version_of_the_driver(text: str, version: str | None) -> None:
    assert _driver(text) == version


def test_release_of_jetson_linux() -> None:
    line = "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8 2025"
    assert _l4t(line) == "36.4.3"
    assert _l4t("") is None
