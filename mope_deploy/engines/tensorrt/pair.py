"""An engine and its sidecar take their places together, although the system replaces one file at a time.

The new sidecar lies beside the old one first, as ``.NAME.next``; then the engine is replaced, then the sidecar. A
process that is killed before the engine is leaves the old pair; killed after it, a new engine whose sidecar is found
by the engine's hash and put into its place by whoever looks next.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mope_deploy.engines.tensorrt.sidecar import EngineFiles, Sidecar
from mope_deploy.errors import EngineError, UsageError
from mope_deploy.files import locked, sha256, whole_file, write_file

__all__ = ["building", "put_sidecar", "settle"]


@contextmanager
def building(files: EngineFiles) -> Iterator[Path]:
    """A path for a new engine while the block runs; one process at a time builds this engine.

    The block ends with :func:`put_sidecar`; its sidecar is in place when it is left without an exception.

    Raises:
        UsageError: another process is building it.
        EngineError: the folder cannot be written.
    """
    with locked(files.engine.parent, name=f".{files.engine.name}.lock", error=UsageError):
        settle(files)
        _next(files).unlink(missing_ok=True)  # of a build that was killed before its engine was in place
        try:
            with whole_file(files.engine, error=EngineError) as staged:
                yield staged
        finally:
            settle(files)  # also where it failed, or was interrupted, after the engine took its place
            _next(files).unlink(missing_ok=True)


def put_sidecar(files: EngineFiles, document: bytes) -> None:
    """Lay the sidecar of the engine that is being built beside its place. Raises :class:`EngineError`."""
    files.proof.unlink(missing_ok=True)
    write_file(_next(files), document, error=EngineError)


def settle(files: EngineFiles) -> None:
    """Put a sidecar into its place whose engine is in its own already; anything else stays as it is."""
    waiting = _next(files)
    if not waiting.is_file():
        return
    try:
        entry = Sidecar.read(waiting).engine
        if files.engine.stat().st_size == entry.bytes and sha256(files.engine) == entry.sha256:
            files.proof.unlink(missing_ok=True)
            os.replace(waiting, files.sidecar)
    except (OSError, EngineError):
        return  # said where the pair is opened


def _next(files: EngineFiles) -> Path:
    return files.sidecar.with_name(f".{files.sidecar.name}.next")
