"""What the operating system refuses, in one line with what to do about it."""

from __future__ import annotations

import errno
import os

__all__ = ["of_output", "of_system", "out_of_memory"]

_TODO = {
    errno.ENOSPC: "free space there, or name another place",
    errno.EDQUOT: "free space there, or name another place",
    errno.EACCES: "change its permissions, or name another place",
    errno.EPERM: "change its permissions, or name another place",
    errno.EROFS: "name a place that can be written",
    errno.ENAMETOOLONG: "use a shorter name",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "end other programs",
    errno.ENOMEM: "end other programs, or use a smaller --batch-size",
}


_OF_OUTPUT = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EBADF, errno.EFBIG, errno.ENXIO}


def of_output(error: OSError) -> bool:
    """Whether it may be one of writing to a file that is open, which has no path any more: standard output, mostly."""
    return error.filename is None and error.errno in _OF_OUTPUT


def of_system(error: OSError) -> str:
    """An error of the system: the path, the reason, what to do."""
    where = " and ".join(
        os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)
    )
    reason = error.strerror or str(error) or type(error).__name__
    todo = _TODO.get(error.errno or 0)
    where = where or ("standard output, or another open file" if of_output(error) else "")
    return (f"{where}: {reason}" if where else reason) + (f"; {todo}" if todo else "")


def out_of_memory(error: Exception) -> str | None:
    """A line for what Python, PyTorch, CUDA or ONNX Runtime raise where memory does not do; None for anything else."""
    text = str(error)
    signs = ("out of memory", "can't allocate memory", "bad allocation", "bad_alloc", "Failed to allocate memory")
    if not isinstance(error, MemoryError) and not any(sign in text for sign in signs):
        return None
    said = " ".join(text.split())[:200]
    return f"out of memory{f': {said}' if said else ''}; end other programs, or use smaller batches"
