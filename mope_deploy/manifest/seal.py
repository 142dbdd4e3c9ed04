"""A manifest's digest of itself: what no hash of a file covers (labels, means, sizes) cannot change unseen either."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

__all__ = ["DIGEST", "digest_of"]

DIGEST = "digest"  # the manifest's key


def digest_of(document: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest without its digest: JSON with sorted keys, no blanks, and all but ASCII as ``\\u`` escapes.

    Raises:
        ValueError, TypeError: a value that is not JSON.
    """
    rest = {key: value for key, value in document.items() if key != DIGEST}
    canonical = json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()
