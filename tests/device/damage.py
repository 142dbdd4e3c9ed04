"""A bundle made worse, and what is said about it."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mope_deploy.bundle import Bundle
from mope_deploy.errors import BundleError, MopeError
from mope_deploy.manifest import digest_of


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Alter the manifest of a bundle in place."""
    document = json.loads((path / "manifest.json").read_text())
    change(document)
    reseal(path, document)


def reseal(path: Path, document: dict[str, Any]) -> None:
    """Write a manifest with the digest that whoever alters one on purpose gives it."""
    with contextlib.suppress(ValueError):  # NaN has no digest
        document["digest"] = digest_of(document)
    (path / "manifest.json").write_text(json.dumps(document))


def put(document: dict[str, Any], place: str, value: Any) -> None:
    head, _, rest = place.partition(".")
    if head == "files" and rest:
        document["files"][rest] = value
        return
    *path, last = place.split(".")
    target: Any = document
    for key in path:
        target = target[int(key) if key.isdigit() else key]
    target[last] = value


def exchange(path: Path, name: str, data: bytes) -> None:
    """Put other bytes into a file and their hash into the manifest."""
    (path / name).write_bytes(data)
    entry = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    rewrite(path, lambda document: document["files"].update({name: entry}))


def refused(path: Path, *words: str, kind: type[MopeError] = BundleError, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        Bundle.open(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700
    for word in words:
        assert word in message
    return message
