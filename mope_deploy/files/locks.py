"""Who may work where: locks that the system takes back when a process dies, however it dies.

All are ``flock`` on a file or folder itself. A forked child closes its copies, so that a worker that outlives its
parent for a moment keeps nothing locked.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mope_deploy.errors import MopeError, UsageError
from mope_deploy.files.content import reason

__all__ = ["Lock", "claim", "locked", "take"]

_held: set[int] = set()  # descriptors


def _forget() -> None:
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget)


@dataclass(frozen=True)
class Lock:
    """A lock that this process holds until :meth:`release`.

    Attributes:
        descriptor: of the locked file or folder; None where the file system has no locks.
        refusal: why there is none.
    """

    descriptor: int | None
    refusal: str | None = None
    owner: int = field(default_factory=os.getpid)

    @property
    def ours(self) -> bool:
        """Whether this is the process that took it, no child that was forked since."""
        return self.owner == os.getpid()

    def write(self, text: str) -> None:
        """Make ``text`` the content of a locked file; of use to people only, so that a full disk does not matter."""
        if self.descriptor is not None:
            with contextlib.suppress(OSError):
                os.truncate(self.descriptor, 0)
                os.write(self.descriptor, text.encode())

    def release(self) -> None:
        """Give it back."""
        if self.descriptor is not None and self.ours:
            _held.discard(self.descriptor)
            os.close(self.descriptor)


def take(path: Path, *, create: bool = False) -> Lock | None:
    """Lock a file or folder; None where another process has it, or where it is gone.

    Args:
        path: no link is followed, and nothing waits for the other end of a pipe.
        create: make a file that is not there.

    Raises:
        OSError: it cannot be opened.
    """
    flags = os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(path, os.O_RDWR | flags | (os.O_CREAT if create else 0), 0o666)
    except IsADirectoryError:
        descriptor = os.open(path, os.O_RDONLY | flags)
    except FileNotFoundError:
        if create:
            raise
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        there = os.stat(path, follow_symlinks=False)
        if not os.path.samestat(os.fstat(descriptor), there):  # replaced before it was locked
            os.close(descriptor)
            return None
    except (BlockingIOError, FileNotFoundError):
        os.close(descriptor)
        return None
    except OSError as error:  # NFS has none for folders, some systems none at all
        os.close(descriptor)
        return Lock(None, reason(error))
    except BaseException:
        os.close(descriptor)
        raise
    _held.add(descriptor)
    return Lock(descriptor)


@contextlib.contextmanager
def claim(folder: str | os.PathLike[str], *, error: type[MopeError] = UsageError) -> Iterator[Path]:
    """A folder that is this process's alone while the block runs: of two that claim it, one is refused.

    It is made, with its parents. An empty folder that no living process has claimed is taken as it is, such as one
    that a killed process left. The block may fill it, or have :func:`mope_deploy.files.whole_folder` replace it; where
    it does neither, a folder that was made here is removed.

    Raises:
        MopeError: of class ``error``: it is taken, no folder, or cannot be made.
    """
    folder = Path(os.path.abspath(folder))
    try:
        lock, made = _claimed(folder)
    except OSError as failure:
        raise error(f"{folder} cannot be made", received=reason(failure), todo="choose another name") from failure
    if lock is None:
        raise error(f"{folder} is being made by another process", todo="choose another name, or wait until it ends")
    try:
        if not made and any(folder.iterdir()):
            raise error(f"{folder} exists and is not empty", todo="choose another name")
        if not made and lock.descriptor is None:
            raise error(f"{folder} exists, and nothing can tell whether another process is using it: {lock.refusal}")
        yield folder
    finally:
        if made and lock.ours:
            with contextlib.suppress(OSError):  # filled
                folder.rmdir()
        lock.release()


def _claimed(folder: Path) -> tuple[Lock | None, bool]:
    """The lock on a folder, None where another process has it, and whether it was made for that."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError:  # as Python has it of a file
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None
    while True:
        try:
            folder.mkdir()
            made = True
        except FileExistsError:
            if not folder.is_dir() and os.path.lexists(folder):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None
            made = False
        if (lock := take(folder.resolve())) is not None or os.path.lexists(folder):
            return lock, made


@contextlib.contextmanager
def locked(
    folder: str | os.PathLike[str], *, name: str = ".lock", error: type[MopeError] = UsageError
) -> Iterator[None]:
    """Only one process works in ``folder`` while the block runs; another is refused, and told which one does.

    The lock is the file ``name`` in it, which goes when the block ends and locks nothing once its process is dead.
    Where none can be made (a read-only disk, a file system without locks) a warning says so and the block runs.

    Raises:
        MopeError: of class ``error``: another process works there.
    """
    path = Path(folder) / name
    try:
        while (lock := take(path, create=True)) is None:
            if os.path.lexists(path):
                raise error(
                    f"{folder} is in use by {_holder(path)}", todo="wait until it ends, or stop it, then try again"
                )
    except OSError as failure:
        lock = Lock(None, reason(failure))
    if lock.refusal is not None:
        from mope_deploy.console import err  # brings the command line's libraries

        err.print(
            f"warning: {folder} cannot be locked ({lock.refusal}): see to it that no other process works in it",
            markup=False,
        )
    lock.write(f"{os.getpid()}\n")
    try:
        yield
    finally:
        if lock.descriptor is not None and lock.ours:
            path.unlink(missing_ok=True)
        lock.release()


def _holder(path: Path) -> str:
    try:
        number = path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        number = ""
    return f"process {number}" if number.isdigit() else "another process"
