"""Files and folders that are whole or not there, and their hashes.

What is written goes to a hidden sibling first, reaches the disk, and is then renamed into place. Until that moment what
was there before stands; a failure or an interrupt leaves it as it was and the sibling is removed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mope_deploy.errors import MopeError

__all__ = ["json_bytes", "reason", "sha256", "whole_file", "whole_folder", "write_file"]

_BLOCK = 2**20  # bytes


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str], *, error: type[MopeError] = MopeError) -> Iterator[Path]:
    """A path to write to, whose file takes the place of ``path`` when the block ends without an exception.

    What is no ordinary file (a pipe, ``/dev/stdout`` wherever that leads) is handed out itself: it cannot be replaced.
    A link stays one: its target is replaced.

    Raises:
        MopeError: of class ``error``, where the system refuses.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if path.is_relative_to("/dev") or path.is_relative_to("/proc") or (path.exists() and not path.is_file()):
            yield path
            return
        path = path.resolve()
        temporary = _sibling(path, "tmp")
        try:
            yield temporary
            _sync(temporary)
            os.replace(temporary, path)
            _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as failure:
        raise error(f"{path} cannot be written", received=reason(failure)) from failure


def write_file(path: str | os.PathLike[str], data: bytes | str, *, error: type[MopeError] = MopeError) -> None:
    """Write a whole file; text as UTF-8. Raises as :func:`whole_file`."""
    with whole_file(path, error=error) as temporary:
        temporary.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)


def json_bytes(document: Mapping[str, Any]) -> bytes:
    """A document as this project's files have it: indented UTF-8 with a line's end, no NaN.

    Raises:
        ValueError: a value that is not JSON.
    """
    try:
        return (json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")
    except (TypeError, RecursionError) as error:
        raise ValueError(str(error)) from error


@contextlib.contextmanager
def whole_folder(
    target: str | os.PathLike[str], *, error: type[MopeError] = MopeError, sync: bool = True
) -> Iterator[Path]:
    """A new folder to fill, which takes the place of ``target`` when the block ends without an exception.

    Whether a folder that is there may be replaced is for the caller to ask first. The system renames one folder at a
    time: a process that is killed between the two leaves the old one beside ``target``, as ``.NAME.….old``.
    ``sync=False`` does not wait for the disk: for thousands of small files that can be made again, where that takes
    longer than to make them.

    Raises:
        MopeError: of class ``error``, where the system refuses; ``target`` is as it was.
    """
    target = Path(os.path.abspath(target))
    temporary = _sibling(target, "tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        for path in (*temporary.rglob("*"), temporary) if sync else ():
            _sync(path)
        _put_in_place(temporary, target)
    except OSError as failure:
        raise error(f"{target} cannot be written", received=reason(failure)) from failure
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone already where all went well


def sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes in hexadecimal digits. Raises :class:`OSError`."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def reason(error: BaseException) -> str:
    """What an exception says, short and in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:200] or type(error).__name__


def _sibling(path: Path, suffix: str) -> Path:
    return path.parent / f".{path.name}.{secrets.token_hex(4)}.{suffix}"


def _sync(path: Path) -> None:
    """Have a file or folder reach the disk; not every system can do that for folders."""
    with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _put_in_place(temporary: Path, target: Path) -> None:
    """``temporary`` under the name of ``target``; the old one is back if that fails."""
    if not os.path.lexists(target):
        temporary.rename(target)
    else:
        old = _sibling(target, "old")
        target.rename(old)
        try:
            temporary.rename(target)
        except BaseException:
            old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    _sync(target.parent)
