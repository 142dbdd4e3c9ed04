"""What is refused before an engine opens a file. The files are made of the format's bytes: no device has onnx."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import pytest

from mope_deploy.bundle import Bundle, write_bundle
from mope_deploy.engines import graph_file as module
from mope_deploy.engines import open_session
from mope_deploy.engines.graph_file import check_graph_file
from mope_deploy.errors import EngineError
from mope_deploy.manifest import Graph
from tests.device import tiny

pytestmark = pytest.mark.device

MODEL_GRAPH, NODE, INITIALIZER, VALUE_INFO = 7, 1, 5, 13  # numbers of fields in onnx.proto


def number(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def field(which: int, payload: bytes | str) -> bytes:
    data = payload.encode() if isinstance(payload, str) else payload
    return number(which << 3 | 2) + number(len(data)) + data


def node(operator: str, *, domain: str = "", attribute: bytes = b"") -> bytes:
    parts = [field(1, "logits"), field(2, "unused"), field(4, operator), field(7, domain)]
    return field(NODE, b"".join(parts) + (field(5, field(1, "a") + attribute) if attribute else b""))


def weights_in(location: str, *, extra: bytes = b"") -> bytes:
    """A tensor of 4 bytes outside the file."""
    places = field(13, field(1, "location") + field(2, location)) + extra
    return b"\x08\x01" + b"\x10\x01" + field(8, "w") + places + b"\x70\x01"


def nested(depth: int) -> bytes:
    kind = b""
    for _ in range(depth):  # a sequence of a sequence of …
        kind = field(4, field(1, kind))
    return kind


GRAPHS = {  # what is added to the graph → words of the refusal
    "a loop": (node("Loop", attribute=field(6, field(2, "body"))), "graphs inside its graph, which is control flow"),
    "branches": (node("If", attribute=field(11, field(2, "body"))), "control flow"),
    "a loop without a body": (node("Loop"), "operator 'Loop'"),
    "another domain": (node("Add", domain="evil"), "operator 'evil.Add'"),
    "a function's domain": (node("Gather", domain="local"), "local.Gather"),
    "a file for a provider": (node("EPContext", domain="com.microsoft"), "com.microsoft.EPContext"),
    "noise": (node("RandomNormal"), "RandomNormal"),
    "a terminal's escape": (node("\x1b[2J"), r"operator '\x1b[2J'"),
    "no operator": (field(NODE, field(3, "nothing")), "operator ''"),
    "weights above": (field(INITIALIZER, weights_in("../secret.bin")), "weights in '../secret.bin'"),
    "weights anywhere": (field(INITIALIZER, weights_in("/etc/passwd")), "/etc/passwd"),
    "weights below": (field(INITIALIZER, weights_in("sub/w.data")), "sub/w.data"),
    "weights in memory": (field(INITIALIZER, weights_in("*/_ORT_MEM_ADDR_/*")), "_ORT_MEM_ADDR_"),
    "weights unlisted": (field(INITIALIZER, weights_in("other.data")), "which the manifest does not list"),
    "weights said twice": (
        field(INITIALIZER, weights_in("w.data", extra=field(13, field(2, "b") + field(1, "location")))),
        "weights in 'b'",
    ),
    "weights of a constant": (node("Constant", attribute=field(5, weights_in("b"))), "weights in 'b'"),
    "weights in a list": (node("Constant", attribute=field(10, weights_in("b"))), "weights in 'b'"),
    "sparse weights": (field(15, field(1, weights_in("b"))), "sparse weights"),
    "a sparse constant": (node("Constant", attribute=field(22, b"")), "sparse weights"),
    "nested types": (field(VALUE_INFO, field(1, "v") + field(2, nested(20_000))), "no tensors"),
    "an unknown field": (field(99, b""), "field 99 of a graph"),
}
FILES = {  # what is added to the file
    "functions": (field(25, field(1, "f")), "functions of its own"),
    "training": (field(20, b""), "a training graph"),
    "an unknown field": (field(31, b""), "field 31 of a model"),
    "a number for a graph": (b"\x38\x01", "field 7 of a model"),
    "a group": (b"\x3b" * 50_000, "wire type 3"),
    "a longer field than the file": (number(MODEL_GRAPH << 3 | 2) + b"\x7f\x00", "a field ends at byte"),
    "a number without an end": (b"\xff" * 50, "a number without an end"),
    "a length without an end": (number(MODEL_GRAPH << 3 | 2) + b"\xff" * 9 + b"\x01", "a field ends at byte"),
    "an end in a number": (b"\x08\xff", "cut short"),
    "field 0": (b"\x00", "no field begins"),
}
ADDED = {name: (field(MODEL_GRAPH, data), words) for name, (data, words) in GRAPHS.items()}
ADDED |= {f"file: {name}": found for name, found in FILES.items()}


@pytest.fixture(scope="module")
def graph(bundle_path: Path) -> Graph:
    return replace(Bundle.open(bundle_path).graph(), data=("w.data", "sub/w.data"))


@pytest.mark.parametrize("name", ADDED)
def test_what_no_export_writes_is_refused_in_one_line(
    name: str, graph: Graph, graph_file: Path, tmp_path: Path
) -> None:
    data, words = ADDED[name]
    path = tmp_path / "model.onnx"
    path.write_bytes(graph_file.read_bytes() + data)
    with pytest.raises(EngineError) as caught:
        check_graph_file(path, graph)
    assert words in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 700


def test_what_exports_write_passes(graph: Graph, graph_file: Path, tmp_path: Path) -> None:
    """Weights in a listed file, ONNX Runtime's own attention, and metadata."""
    path, listed = tmp_path / "model.onnx", field(INITIALIZER, weights_in("w.data"))
    own = node("MultiHeadAttention", domain="com.microsoft") + node("Add", domain="ai.onnx")
    path.write_bytes(graph_file.read_bytes() + field(MODEL_GRAPH, listed + own) + field(14, field(1, "key")))
    check_graph_file(path, graph)
    in_a_folder = replace(graph, file="sub/model.onnx", data=("sub/w.data",))
    check_graph_file(path, in_a_folder)
    with pytest.raises(EngineError, match=r"all weights in itself"):
        check_graph_file(path, replace(graph, data=("sub/w.data",)))  # another folder's


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_files_cut_short(share: float, graph: Graph, graph_file: Path, tmp_path: Path) -> None:
    path, data = tmp_path / "model.onnx", graph_file.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(EngineError, match="is no ONNX file, or damaged"):
        check_graph_file(path, graph)


def test_every_flipped_byte_is_read_or_refused(graph: Graph, graph_file: Path, tmp_path: Path) -> None:
    path, data = tmp_path / "model.onnx", graph_file.read_bytes()
    for at in range(0, len(data), max(1, len(data) // 300)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
        with contextlib.suppress(EngineError):
            check_graph_file(path, graph)


def test_time_is_bounded(graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_GRAPH_FIELDS", 1000)
    path = tmp_path / "model.onnx"
    path.write_bytes(b"\x08\x08" * 1001)
    with pytest.raises(EngineError, match="too many fields"):
        check_graph_file(path, graph)
    path.write_bytes(b"\x08\x08" * 1000)
    with pytest.raises(EngineError, match="there is no graph in it"):
        check_graph_file(path, graph)


def test_sessions_look_first(graph_file: Path, tmp_path: Path) -> None:
    """A bundle whose hashes are right and whose graph would run for ever, or reads a file that nobody listed."""
    for name in ("a loop", "weights unlisted"):
        path = tmp_path / name
        path.write_bytes(graph_file.read_bytes() + ADDED[name][0])
        bundle = write_bundle(tmp_path / f"{name}.b", files=tiny.files(path), manifest=tiny.manifest())
        (bundle.path / "other.data").write_bytes(b"\x00" * 4)
        with pytest.raises(EngineError, match="no export writes such a file"):
            open_session(bundle, threads=1)
