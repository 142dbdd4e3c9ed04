"""One file or folder in the place of another, in one operation where the system has it."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

from mope_deploy.files.locks import take

__all__ = ["flush", "put_in_place", "remove"]

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
_UNKNOWN = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP}  # the kernel or this file system cannot


def put_in_place(new: Path, target: Path, *, old: Path) -> None:
    """A folder under the name of ``target``; what stood there is removed afterwards, and is back if this fails.

    Args:
        new: the folder.
        target: beside it.
        old: what the old one may be called meanwhile.
    """
    if not os.path.lexists(target):
        new.rename(target)
        flush(target.parent)
    elif _exchange(new, target):
        flush(target.parent)
        remove(new)  # which is the old one now
    else:
        lock = take(target.resolve())  # or one that comes by would put it back in between
        try:
            target.rename(old)
            try:
                new.rename(target)
            except BaseException:
                if not os.path.lexists(target):
                    old.rename(target)
                raise
            flush(target.parent)
            remove(old)
        finally:
            if lock is not None:
                lock.release()


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all in it, as far as the system allows."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def flush(path: Path) -> None:
    """Have a file or folder reach the disk; not every system can do that for folders, and links are none of ours."""
    if path.is_symlink():
        return
    with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names at once; False where the system cannot."""
    call = _renameat2()
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNKNOWN:
        return False
    raise OSError(number, os.strerror(number), str(other))


@lru_cache(maxsize=1)
def _renameat2() -> Any:
    """The C library's function, or None."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is not None:
        call.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    return call
