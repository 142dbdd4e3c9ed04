"""The text of a manifest → :class:`Manifest`: today's schema, exactly as docs/bundle.md has it, or an error."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated

from mope_deploy.errors import BundleError
from mope_deploy.fields import FieldError, check_distinct, choice, decode, length, parse_json, shown, text
from mope_deploy.limits import MAX_LABEL_CHARS, MAX_LABELS
from mope_deploy.manifest.consistent import AGAIN, check_consistent
from mope_deploy.manifest.seal import digest_of
from mope_deploy.manifest.types import (
    FORMAT,
    SCHEMA,
    Build,
    Digest,
    FileEntry,
    FileName,
    Golden,
    Graph,
    Key,
    Manifest,
    Modality,
    Parity,
    Routing,
    Share,
)
from mope_deploy.preprocess import Specs
from mope_deploy.task import TASKS

__all__ = ["check_name", "read_manifest"]


def read_manifest(content: str, where: str) -> Manifest:
    """The manifest of a bundle.

    Args:
        content: the whole file.
        where: what error messages call it.

    Raises:
        BundleError: damaged JSON, another schema, a field missing, unknown, mistyped, out of range or at odds with
        another, or anything altered since its digest was taken.
    """
    try:
        document = parse_json(content)
    except ValueError as error:
        raise BundleError(f"{where} is damaged", received=str(error), expected="JSON", todo=AGAIN) from error
    if not isinstance(document, dict):
        raise BundleError(where, received=shown(document), expected="a JSON object")
    if document.get("format") != FORMAT:
        raise BundleError(f"{where}.format", received=shown(document.get("format")), expected=repr(FORMAT))
    _check_schema(document.get("schema"), where)
    read = decode(document, _Document, where, BundleError)
    parts = (read, read.modalities, read.preprocess)
    found = {one.name: getattr(part, one.name) for part in parts for one in fields(part)} | {
        "task": TASKS[read.task.type](labels=read.task.labels, threshold=read.task.threshold),  # type: ignore[arg-type]
        "missing": read.preprocess.missing or (),
        "build": read.build or Build(),
    }
    manifest = Manifest(**{one.name: found[one.name] for one in fields(Manifest)})
    check_consistent(manifest, where)
    if (digest := digest_of(document)) != read.digest:
        received, expected = f"SHA-256 {digest[:12]}…", f"{read.digest[:12]}…"
        raise BundleError(f"{where} was altered", received=received, expected=expected, todo=AGAIN)
    return manifest


def check_name(name: object, where: str) -> str:
    """A file's name in a bundle: a relative path, in ``/`` notation, that stays inside the folder on every system.

    Raises:
        BundleError: absolute, with ``..``, with characters that some file system does not take, too long, the
        manifest's own.
    """
    return decode(name, FileName, where, BundleError)


def _check_schema(schema: object, where: str) -> None:
    if schema == SCHEMA and type(schema) is int:
        return
    todo = AGAIN
    if isinstance(schema, int) and schema > SCHEMA:
        todo = "the bundle was written by a newer release: pip install --upgrade mope-deploy"
    elif isinstance(schema, int) and schema > 0:
        todo = "the bundle was written by an older release: export it again"
    expected = f"{SCHEMA}, the one that this release reads"
    raise BundleError(f"{where}.schema", received=shown(schema), expected=expected, todo=todo)


# What the file nests and :class:`Manifest` does not.


@dataclass(frozen=True)
class _Task:
    type: Annotated[str, choice(*TASKS)]
    labels: Annotated[tuple[Annotated[str, text(MAX_LABEL_CHARS)], ...], length(1, MAX_LABELS)]
    threshold: Share | None

    def __post_init__(self) -> None:
        kind = TASKS[self.type]
        if len(self.labels) < kind.fewest_labels:
            raise FieldError("labels", received=len(self.labels), expected=f"{kind.fewest_labels} or more")
        check_distinct("labels", self.labels)
        if (self.threshold is None) != (kind().threshold is None):
            expected = f"null for a {self.type} task" if self.threshold is not None else "a number from 0 to 1"
            raise FieldError("threshold", received=self.threshold, expected=expected)


@dataclass(frozen=True)
class _Modalities:
    main: Modality
    complementary: Annotated[tuple[Modality, ...], length(0, 8)]

    def __post_init__(self) -> None:
        check_distinct("complementary", self.complementary)


@dataclass(frozen=True, kw_only=True)
class _Preprocess(Specs):
    tokenizer: FileName | None


@dataclass(frozen=True)
class _Document:
    format: str
    schema: int
    name: Annotated[str, text(200)]
    created: Annotated[str, text(40)]
    versions: Annotated[Mapping[Key, Annotated[str, text(100)]], length(0, 100)]
    task: _Task
    modalities: _Modalities
    preprocess: _Preprocess
    graphs: Annotated[tuple[Graph, ...], length(1, 64)]
    routing: Routing | None
    golden: Golden
    parity: Parity
    build: Build | None
    files: Annotated[Mapping[FileName, FileEntry], length(1, 10_000)]
    digest: Digest

    def __post_init__(self) -> None:
        try:
            datetime.datetime.strptime(self.created, "%Y-%m-%dT%H:%M:%SZ")
        except ValueError:
            expected = "a time in UTC like 2025-01-31T12:00:00Z"
            raise FieldError("created", received=shown(self.created), expected=expected) from None
