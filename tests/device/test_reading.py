"""Files that strangers wrote: regular ones alone, never more of them than is stated, and never what a header claims."""

from __future__ import annotations

import io
import os
import socket
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mope_deploy import reading
from mope_deploy.bundle import Bundle
from mope_deploy.engines.tensorrt.sidecar import Sidecar
from mope_deploy.errors import EngineError
from mope_deploy.limits import MAX_RECORD_BYTES
from mope_deploy.reading import read_json, read_npz, read_regular
from tests.device import tiny
from tests.device.damage import refused

pytestmark = pytest.mark.device


def bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        before = Path.cwd()
        os.chdir(path.parent)  # a socket's whole path may have 108 bytes
        try:
            listening.bind(path.name)
        finally:
            os.chdir(before)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, bind, lambda path: path.symlink_to("/dev/zero")])
def test_only_regular_files_are_read(tmp_path: Path, make: Callable[[Path], object]) -> None:
    """None of them hangs, and a device does not give without end."""
    make(tmp_path / "odd")
    for read in (lambda path: read_regular(path, 100), lambda path: read_npz(path, 100), read_json):
        with pytest.raises(OSError, match=r"not a regular file|No such device|Is a directory"):
            read(tmp_path / "odd")
    with pytest.raises(EngineError, match="cannot be read"):
        Sidecar.read(tmp_path / "odd")


@pytest.mark.parametrize("name", ["manifest.json", "tokenizer.json", "model.onnx", "golden/inputs.npz"])
def test_a_pipe_in_a_bundle_hangs_nobody(bundle_copy: Path, name: str) -> None:
    opened = Bundle.open(bundle_copy)
    (bundle_copy / name).unlink()
    os.mkfifo(bundle_copy / name)
    if name == "manifest.json":
        with pytest.raises(Exception, match="is not a bundle"):
            Bundle.open(bundle_copy)
        return
    refused(bundle_copy, "is not a file")
    with pytest.raises(Exception, match="not a regular file"):
        opened.read(name)


def test_no_more_than_is_stated(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * 100)
    assert read_regular(file, 100) == b"x" * 100
    with pytest.raises(OSError, match="too large: 100 bytes, at most 99"):
        read_regular(file, 99)
    with file.open("wb") as sparse:
        sparse.truncate(2**40)
    with pytest.raises(OSError, match="too large"):
        read_regular(file, 2**20)


def npy(shape: str, data: bytes = b"\0" * 8, dtype: str = "<f8") -> bytes:
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def archive(*members: tuple[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as made:
        for name, data in members:
            made.writestr(name, data)
    return file.getvalue()


def test_arrays() -> None:
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.asfortranarray(np.arange(6, dtype=np.int64).reshape(2, 3)),
        "c": np.float16(3),
        "d": np.zeros((0, 4), np.uint8),
        "e": np.array([True, False]),
    }
    found = read_npz(tiny.npz(arrays), 1000_000)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        assert np.array_equal(found[name], array)
        assert found[name].shape == array.shape
    assert list(read_npz(tiny.npz(arrays), 1000_000, ("b",))) == ["b"]
    with pytest.raises(KeyError):
        read_npz(tiny.npz(arrays), 1000_000, ("z",))


@pytest.mark.parametrize(
    "bad",
    [
        *(
            archive(("a.npy", npy(shape)))
            for shape in ("(9000000000,)", "(10**20,)", "(2,)", "(-1,)", "(-1, -1)", "()x")
        ),
        archive(("a.npy", npy(f"({2**62}, {2**62})"))),
        archive(("a.npy", npy("(1,)", dtype="|O"))),
        archive(("a.npy", npy("(1,)", dtype="|V0"))),
        archive(("a.npy", npy("(1,)") + b"x")),
        archive(("a.npy", b"")),
        archive(("a.npy", b"\x93NUMPY\x03\x00" + b"\0" * 20)),
        archive(("a.npy", b"\x93NUMPY\x01\x00\xff\xff")),
        archive(*((f"{i}.npy", npy("(1,)")) for i in range(1001)), compression=zipfile.ZIP_STORED),
        tiny.npz({"a": np.array([{}], dtype=object)}),
        tiny.npz({"a": np.zeros(2000)}),
        b"",
        b"PK\x03\x04",
    ],
)
def test_arrays_that_are_not_what_they_claim(bad: bytes) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        read_npz(bad, 12_000 if len(bad) < 100_000 else 10**9)


def test_a_bomb_is_not_unpacked() -> None:
    """Its directory says how much that would be, or lies: then no more is unpacked than it says."""
    bomb = archive(("a.npy", npy("(2000000,)", b"\0" * 16_000_000)))
    assert len(bomb) < 20_000
    with pytest.raises(ValueError, match="too large: 16,0"):
        read_npz(bomb, 10**6)
    size = struct.pack("<I", len(npy("(2000000,)", b"\0" * 16_000_000)))
    lying = bomb.replace(size, struct.pack("<I", 1000))
    assert lying != bomb
    with pytest.raises(ValueError, match=r"\S"):
        read_npz(lying, 10**6)


def test_no_more_arrays_than_an_archive_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    data = archive(*((f"{name}.npy", npy("()")) for name in "abc"))
    assert len(read_npz(data, 10_000)) == 3
    monkeypatch.setattr(reading, "MAX_ARRAYS", 2)
    with pytest.raises(ValueError, match=r"^too large: 3 arrays, at most 2$"):
        read_npz(data, 10_000)


def test_no_more_json_than_a_record_may_have(tmp_path: Path) -> None:
    with (tmp_path / "record.json").open("wb") as sparse:
        sparse.truncate(MAX_RECORD_BYTES + 1)
    with pytest.raises(OSError, match="too large: 67,108,865 bytes, at most 67,108,864"):
        read_json(tmp_path / "record.json")
