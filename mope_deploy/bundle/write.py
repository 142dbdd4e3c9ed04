"""Writing a bundle: a hidden folder beside the target is filled, opened as any reader would, and only then renamed."""

from __future__ import annotations

import datetime
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mope_deploy.bundle.open import Bundle
from mope_deploy.errors import BundleError, UsageError
from mope_deploy.files import json_bytes, reason, sha256, whole_folder
from mope_deploy.manifest import DIGEST, FORMAT, MANIFEST, SCHEMA, check_name, digest_of

__all__ = ["check_target", "write_bundle"]


def write_bundle(
    target: str | os.PathLike[str],
    *,
    files: Mapping[str, Path | bytes],
    manifest: Mapping[str, Any],
    overwrite: bool = False,
) -> Bundle:
    """Write a bundle, or nothing: a failure, or an interrupt, leaves what was at ``target`` as it was.

    Args:
        target: the folder to make.
        files: name inside the bundle → a file to copy, or its bytes.
        manifest: see docs/bundle.md, without ``files`` and ``digest`` and, if you like, without ``format``, ``schema``
            and ``created``.
        overwrite: replace a bundle that is there. Anything else than a bundle is never replaced.

    Raises:
        UsageError: ``target`` exists and may not be replaced.
        BundleError: the manifest and the files are not a valid bundle, or cannot be written.
    """
    target = Path(os.path.abspath(target))
    check_target(target, overwrite=overwrite)
    for name in files:
        check_name(name, "files")
    with whole_folder(target, error=BundleError) as folder:
        document: dict[str, Any] = {
            "format": FORMAT,
            "schema": SCHEMA,
            "created": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            **manifest,
            "files": {name: _put(folder / name, source) for name, source in files.items()},
        }
        try:
            document[DIGEST] = digest_of(document)
            (folder / MANIFEST).write_bytes(json_bytes(document))
        except (ValueError, TypeError, RecursionError) as error:
            raise BundleError("the manifest cannot be written as JSON", received=reason(error)) from error
        bundle = Bundle.open(folder)
        _ = bundle.preprocessing
        bundle.golden()
        bundle.golden_samples()
    return Bundle(target, bundle.manifest, bundle.sha256)


def check_target(target: Path, *, overwrite: bool) -> None:
    """Refuse a target before any work is done for it; :func:`write_bundle` asks again.

    Raises:
        UsageError: something is there that may not be replaced.
    """
    if not os.path.lexists(target):
        return
    if target.is_symlink() or not (target / MANIFEST).is_file():
        raise UsageError(f"{target} exists and is not a bundle, so it is not replaced", todo="choose another name")
    if not overwrite:
        raise UsageError(f"{target} exists", todo="choose another name, or ask for it to be overwritten")


def _put(path: Path, source: Path | bytes) -> dict[str, Any]:
    """Copy one file, and say what the manifest has to say of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(source, bytes):
        path.write_bytes(source)
    else:
        shutil.copyfile(source, path)
    return {"sha256": sha256(path), "bytes": path.stat().st_size}
