"""Where a finished bundle goes: a place that is taken before an hour of work, and another one if that did not hold."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mope_deploy.bundle import Bundle, write_bundle
from mope_deploy.errors import BundleError, UsageError
from mope_deploy.files import claim

__all__ = ["claimed", "place"]


@contextmanager
def claimed(target: Path, *, overwrite: bool) -> Iterator[None]:
    """Nothing else of ours takes ``target`` while the block runs; a bundle that is to be replaced stands until then.

    Raises:
        UsageError: another process has taken it, or it cannot be made.
    """
    if overwrite and os.path.lexists(target):
        yield
        return
    with claim(target):
        yield


def place(target: Path, *, files: Mapping[str, Path | bytes], manifest: Mapping[str, Any], overwrite: bool) -> Bundle:
    """Write a finished bundle to ``target``, which was :func:`claimed`; beside it where something stands in the way.

    Raises:
        UsageError, BundleError: ``target`` cannot be written; the message says where the bundle is kept, if it is.
    """
    try:
        return write_bundle(target, files=files, manifest=manifest, overwrite=overwrite, claimed=True)
    except (UsageError, BundleError) as error:
        names = (target.with_name(f"{target.name}-{number}") for number in itertools.count(1))
        kept = next(name for name in names if not os.path.lexists(name))
        try:
            write_bundle(kept, files=files, manifest=manifest)
        except (UsageError, BundleError):
            raise error from None
        todo = f"the finished bundle is kept as {kept}"
        raise type(error)(error.what, received=error.received, expected=error.expected, todo=todo) from error
