"""``manifest.json``: its schema as types, and its strict reader."""

from mope_deploy.manifest.consistent import AGAIN
from mope_deploy.manifest.read import check_name, read_manifest
from mope_deploy.manifest.seal import DIGEST, digest_of
from mope_deploy.manifest.types import (
    FORMAT,
    MANIFEST,
    PRECISIONS,
    SCHEMA,
    Build,
    Cpu,
    FileEntry,
    Gate,
    Golden,
    Graph,
    Manifest,
    Parity,
    Part,
    Routing,
    TensorSpec,
    Tolerance,
    conditions_name,
    y_name,
)

__all__ = [
    "AGAIN",
    "DIGEST",
    "FORMAT",
    "MANIFEST",
    "PRECISIONS",
    "SCHEMA",
    "Build",
    "Cpu",
    "FileEntry",
    "Gate",
    "Golden",
    "Graph",
    "Manifest",
    "Parity",
    "Part",
    "Routing",
    "TensorSpec",
    "Tolerance",
    "check_name",
    "conditions_name",
    "digest_of",
    "read_manifest",
    "y_name",
]
