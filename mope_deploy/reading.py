"""Reading files that strangers wrote: regular files alone, and never more than a stated number of bytes.

A pipe, a socket or a device under the name of a file would hang a reader for ever or give without end; a header may
claim any size. Both are looked at before anything is read or allocated.
"""

from __future__ import annotations

import io
import os
import stat
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from mope_deploy.fields import parse_json
from mope_deploy.limits import MAX_ARRAYS, MAX_RECORD_BYTES

__all__ = ["open_regular", "read_json", "read_npz", "read_regular"]


def open_regular(path: str | os.PathLike[str]) -> IO[bytes]:
    """A file to read from.

    Raises:
        OSError: it cannot be opened, or is a folder, a pipe, a socket or a device.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(0, "not a regular file", str(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: str | os.PathLike[str], most: int) -> bytes:
    """All bytes of a file.

    Args:
        most: bytes that it may have.

    Raises:
        OSError: as :func:`open_regular`; or it is larger.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        data = b"" if size > most else file.read(most + 1)
    if max(size, len(data)) > most:
        raise OSError(0, f"too large: {max(size, len(data)):,} bytes, at most {most:,}", str(path))
    return data


def read_json(path: str | os.PathLike[str], most: int = MAX_RECORD_BYTES) -> Any:
    """What a file says as JSON, by the rules of :func:`mope_deploy.fields.parse_json`.

    Raises:
        OSError: as :func:`read_regular`.
        ValueError: not UTF-8, not JSON.
    """
    return parse_json(read_regular(path, most).decode("utf-8"))


def read_npz(source: Path | bytes, most: int, names: Collection[str] | None = None) -> dict[str, NDArray[Any]]:
    """Arrays of an ``.npz``, without pickles.

    Args:
        source: the file or its bytes.
        most: bytes that all of its members together may unpack to.
        names: of the arrays that are wanted; by default all.

    Raises:
        ValueError: no such archive, larger than ``most`` once unpacked, or a header that claims another size than its
            array has.
        OSError: it cannot be read.
        KeyError: one of ``names`` is not there.
    """
    with io.BytesIO(source) if isinstance(source, bytes) else open_regular(source) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                if (total := sum(item.file_size for item in members)) > most:
                    raise ValueError(f"too large: {total:,} bytes once unpacked, at most {most:,}")
                if len(members) > MAX_ARRAYS:
                    raise ValueError(f"too large: {len(members):,} arrays, at most {MAX_ARRAYS}")
                named = {item.filename.removesuffix(".npy"): item for item in members}
                return {name: _array(_unpacked(archive, named[name])) for name in (named if names is None else names)}
        except (OSError, ValueError, KeyError):
            raise
        except Exception as error:  # zipfile raises whatever a damaged archive makes it stumble over
            raise ValueError(f"damaged: {error or type(error).__name__}") from error


def _unpacked(archive: zipfile.ZipFile, item: zipfile.ZipInfo) -> bytes:
    with archive.open(item) as member:
        return member.read(item.file_size)  # as many bytes as it claims: read() unpacks 2 GiB before it looks


def _array(data: bytes) -> NDArray[Any]:
    """The array in the bytes of an ``.npy``; numpy itself would allocate what a header claims."""
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version} of .npy")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, columns_first, dtype = read(file)
    count = 1
    for size in shape:  # Python's integers: numpy's would overflow
        count *= size
    rest = len(data) - file.tell()
    if dtype.hasobject or dtype.itemsize == 0 or count < 0 or count * dtype.itemsize != rest:
        raise ValueError(f"an array of {dtype} {shape} that has {rest:,} bytes")
    flat = np.frombuffer(data, dtype, count, file.tell()).copy()  # writable, and not the whole file
    return flat.reshape(shape[::-1]).T if columns_first else flat.reshape(shape)
