"""Files and folders that are the old one or the new one, whatever happens and whenever.

What is written goes to a hidden sibling first, ``.NAME.….tmp``, reaches the disk, and is then put into place in one
operation of the system. Until that moment what was there before stands; a failure or an interrupt leaves it as it was
and the sibling is removed. A process that is killed leaves its sibling behind: the next one that writes the same name
removes it. It knows that nobody works on it any more by the lock that a living writer holds on it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

from mope_deploy.errors import MopeError
from mope_deploy.files.content import reason
from mope_deploy.files.locks import Lock, take
from mope_deploy.files.place import flush, put_in_place, remove

__all__ = ["recover", "whole_file", "whole_folder", "write_file"]


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str], *, error: type[MopeError] = MopeError) -> Iterator[Path]:
    """An empty file to write to, which takes the place of ``path`` when the block ends without an exception.

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
        with _staged(path, lambda new: new.touch(exist_ok=False)) as temporary:
            yield temporary
            flush(temporary)
            os.replace(temporary, path)
            flush(path.parent)
    except OSError as failure:
        raise error(f"{path} cannot be written", received=reason(failure)) from failure


def write_file(path: str | os.PathLike[str], data: bytes | str, *, error: type[MopeError] = MopeError) -> None:
    """Write a whole file; text as UTF-8. Raises as :func:`whole_file`."""
    with whole_file(path, error=error) as temporary:
        temporary.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)


@contextlib.contextmanager
def whole_folder(
    target: str | os.PathLike[str], *, error: type[MopeError] = MopeError, sync: bool = True
) -> Iterator[Path]:
    """A new folder to fill, which takes the place of ``target`` when the block ends without an exception.

    Whether a folder that is there may be replaced is for the caller to ask first. Where the system cannot exchange two
    folders (Linux can) they are renamed one after the other: a process that is killed in between leaves the old one as
    ``.NAME.….old``, which the next writer puts back, or :func:`recover`.
    ``sync=False`` does not wait for the disk: for thousands of small files that can be made again, where that takes
    longer than to make them.

    Raises:
        MopeError: of class ``error``, where the system refuses; ``target`` is as it was.
    """
    target = Path(os.path.abspath(target))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _staged(target, Path.mkdir) as temporary:
            yield temporary
            for path in (*temporary.rglob("*"), temporary) if sync else ():
                flush(path)
            put_in_place(temporary, target, old=_sibling(target, "old"))
    except OSError as failure:
        raise error(f"{target} cannot be written", received=reason(failure)) from failure


def recover(target: str | os.PathLike[str]) -> None:
    """Before a folder is opened: put it back where a writer was killed between taking it away and replacing it."""
    target = Path(os.path.abspath(target))
    if not os.path.lexists(target):
        _sweep(target)


@contextlib.contextmanager
def _staged(target: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    """A locked sibling of ``target`` while the block runs; what is left of it is removed."""
    _sweep(target)
    lock: Lock | None = None
    temporary = _sibling(target, "tmp")
    try:
        while lock is None:  # a sweeper may have come between making and locking
            temporary = _sibling(target, "tmp")
            make(temporary)
            lock = take(temporary)
        yield temporary
    finally:
        try:
            if lock is None or lock.ours:
                remove(temporary)
        finally:
            if lock is not None:
                lock.release()


def _sweep(target: Path) -> None:
    """Remove what dead writers of ``target`` left beside it, and put an old folder back where there is none."""
    ours = re.compile(re.escape(f".{target.name}.") + r"[0-9a-f]{8}\.(tmp|old)")
    try:
        with os.scandir(target.parent) as entries:
            left = sorted(entry.name for entry in entries if ours.fullmatch(entry.name))
    except OSError:
        return  # it will be said where something is written
    for name in left:
        path = target.parent / name
        with contextlib.suppress(OSError):
            if (lock := take(path)) is None or lock.descriptor is None:
                continue  # a living writer's, or nobody can tell
            try:
                if name.endswith(".old") and not os.path.lexists(target):
                    path.rename(target)
                else:
                    remove(path)
            finally:
                lock.release()


def _sibling(path: Path, suffix: str) -> Path:
    return path.parent / f".{path.name}.{secrets.token_hex(4)}.{suffix}"
