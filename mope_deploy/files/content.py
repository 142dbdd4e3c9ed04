"""What is in files: documents as bytes, hashes, and why a file could not be read or written, in one line."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

__all__ = ["json_bytes", "reason", "sha256"]

_BLOCK = 2**20  # bytes


def json_bytes(document: Mapping[str, Any]) -> bytes:
    """A document as this project's files have it: indented UTF-8 with a line's end, no NaN.

    Raises:
        ValueError: a value that is not JSON.
    """
    try:
        return (json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")
    except (TypeError, RecursionError) as error:
        raise ValueError(str(error)) from error


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
