"""What a deployed model is on disk: one folder, one manifest, a SHA-256 for every file.

docs/bundle.md describes the format for those who read it without this library. A bundle is either exactly what its
manifest says or refused: nothing here repairs, guesses or ignores. Writing assembles a temporary folder beside the
target, opens it as a reader would, and only then renames it.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import secrets
import shutil
import stat
import zipfile
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mope_deploy.errors import BundleError, ConfigError, UsageError
from mope_deploy.fields import nearest
from mope_deploy.manifest import (
    AGAIN,
    FORMAT,
    MANIFEST,
    SCHEMA,
    FileEntry,
    Graph,
    Manifest,
    check_name,
    read_manifest,
)
from mope_deploy.preprocess import Preprocessing

__all__ = ["Bundle", "check_target", "write_bundle"]

MAX_MANIFEST_BYTES = 16 * 2**20
MAX_GOLDEN_BYTES = 2**30  # of one .npz once unpacked
ENGINES = "engines"  # of the folder inside a bundle where engines built on the device live
_COPY = "copy the bundle with its links resolved: cp -rL"


class Bundle:
    """A bundle on disk, read and checked; make one with :meth:`open`.

    Attributes:
        path: the folder.
        manifest: its manifest.
        sha256: of ``manifest.json`` itself, which covers every other file: the identity of the bundle.
    """

    def __init__(self, path: Path, manifest: Manifest, sha256: str) -> None:
        self.path, self.manifest, self.sha256 = path, manifest, sha256

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: bool = True) -> Bundle:
        """Read and check a bundle.

        Args:
            path: the folder.
            verify: compare every file's SHA-256 (about a second per GB); sizes are compared in any case.

        Raises:
            UsageError: ``path`` is something else than a bundle: no folder, a checkpoint, a run.
            BundleError: unknown schema, a manifest that breaks the format, a file missing, altered or outside the
            folder.
        """
        path = Path(path)
        _check_is_bundle(path)
        text, sha256 = _read_manifest_file(path)
        manifest = read_manifest(text, str(path / MANIFEST))
        for name, entry in manifest.files.items():
            _check_file(path, name, entry, verify=verify)
        return cls(path, manifest, sha256)

    def file(self, name: str) -> Path:
        """Path of a file that the manifest lists.

        Raises:
            BundleError: it does not list ``name``.
        """
        if name not in self.manifest.files:
            raise BundleError(f"{self.path}: the manifest lists no file {name!r}")
        return self.path / name

    def graph(self, name: str | None = None, *, engine: str = "onnxruntime") -> Graph:
        """The graph called ``name``, or the first that ``engine`` runs.

        The exporter puts the canonical graph first and fused ones last: older releases of an engine may lack, or
        compute otherwise, what a newer one fuses.

        Raises:
            UsageError: no graph has that name, or none is made for ``engine``.
        """
        graphs = self.manifest.graphs
        if name is None:
            for graph in graphs:
                if graph.takes(engine):
                    return graph
            made = ", ".join(f"{graph.name} ({graph.precision}, for {graph.runs_on})" for graph in graphs)
            raise UsageError(f"{self.path}: no graph for {engine}", received=made, todo=_advice(graphs, engine))
        names = [g.name for g in graphs]
        if name not in names:
            hint = nearest(name, names)
            raise UsageError(
                f"{self.path}: no graph {name!r}",
                expected=f"one of {', '.join(names)}",
                todo=f"did you mean {hint!r}?" if hint else None,
            )
        found = graphs[names.index(name)]
        if not found.takes(engine):
            raise UsageError(
                f"{self.path}: graph {name!r}",
                received=f"engine {engine}",
                expected=found.runs_on,
                todo=_advice([found], engine),
            )
        return found

    @cached_property
    def preprocessing(self) -> Preprocessing:
        """What turns raw inputs into the graph's.

        Raises:
            BundleError: the tokenizer cannot be read.
        """
        tokenizer = self.manifest.tokenizer
        try:
            text = None if tokenizer is None else self.file(tokenizer).read_bytes().decode("utf-8")
            made = Preprocessing(
                image=self.manifest.image,
                text=self.manifest.text,
                tokenizer=text,
                audio=self.manifest.audio,
                video=self.manifest.video,
                missing=self.manifest.missing,
            )
            made.check_tokenizer()
        except (ConfigError, UnicodeDecodeError) as error:
            raise BundleError(f"{self.path / (tokenizer or MANIFEST)}: {error}") from error
        return made

    def golden(self) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
        """Input arrays of the golden samples and the outputs known for them, both by name.

        Raises:
            BundleError: an array is missing, or has another dtype, shape or number of samples than the graph.
        """
        golden, graph = self.manifest.golden, self.manifest.graphs[0]
        inputs, outputs = _read_npz(self.file(golden.inputs)), _read_npz(self.file(golden.outputs))
        batch = {array.shape[:1] for array in (*inputs.values(), *outputs.values())}
        if len(batch) != 1 or batch == {(0,)}:
            raise BundleError(f"{self.path}: golden arrays", received="several sizes, or none", expected="one batch")
        if not all(np.isfinite(array).all() for array in outputs.values() if array.dtype.kind == "f"):
            raise BundleError(f"{self.path / golden.outputs}", received="NaN or infinity", expected="finite values")
        for name, arrays, specs in (
            (golden.inputs, inputs, graph.raw_inputs),
            (golden.outputs, outputs, graph.outputs),
        ):
            received = {key: f"{array.dtype} of {array.ndim} axes" for key, array in sorted(arrays.items())}
            expected = {spec.name: f"{spec.dtype} of {len(spec.shape)} axes" for spec in specs}
            if received != expected:
                raise BundleError(f"{self.path / name}", received=received, expected=expected)
        return inputs, outputs

    def unlisted(self) -> tuple[str, ...]:
        """Files in the folder that the manifest does not know; nothing reads them.

        Engines built on this device (``engines/``) are not among them: each has its own record and hashes.
        """
        found = (p.relative_to(self.path).as_posix() for p in self.path.rglob("*") if not p.is_dir() or p.is_symlink())
        known = {MANIFEST, *self.manifest.files}
        return tuple(sorted(name for name in found if name not in known and not name.startswith(f"{ENGINES}/")))


def write_bundle(
    target: str | os.PathLike[str],
    *,
    files: Mapping[str, Path | bytes],
    manifest: Mapping[str, Any],
    overwrite: bool = False,
) -> Bundle:
    """Write a bundle, or nothing.

    Everything goes to a temporary folder beside ``target``, which is opened and checked in full like any other bundle
    and then renamed. A failure, or an interrupt, leaves what was at ``target`` as it was.

    Args:
        target: the folder to make.
        files: name inside the bundle → a file to copy, or its bytes.
        manifest: as in docs/bundle.md, without ``files`` and, if you like, without ``format``, ``schema`` and
        ``created``.
        overwrite: replace a bundle that is there. Anything else than a bundle is never replaced.

    Raises:
        UsageError: ``target`` exists and may not be replaced.
        BundleError: the manifest and the files are not a valid bundle, or cannot be written.
    """
    target = Path(os.path.abspath(target))
    check_target(target, overwrite=overwrite)
    for name in files:
        check_name(name, "files")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.parent / f".{target.name}.{secrets.token_hex(4)}.tmp"
        temporary.mkdir()
    except OSError as error:
        raise BundleError(f"{target} cannot be written", received=_reason(error)) from error
    try:
        entries = {name: _put(temporary / name, source) for name, source in files.items()}
        document = {
            "format": FORMAT,
            "schema": SCHEMA,
            "created": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            **manifest,
            "files": entries,
        }
        (temporary / MANIFEST).write_text(_dump(document), encoding="utf-8")
        bundle = Bundle.open(temporary)
        _ = bundle.preprocessing
        bundle.golden()
        _replace(temporary, target)
    except OSError as error:
        raise BundleError(f"{target} cannot be written", received=_reason(error)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone already where all went well
    return Bundle(target, bundle.manifest, bundle.sha256)


def _advice(graphs: Sequence[Graph], engine: str) -> str | None:
    """What to do where none of ``graphs`` is for ``engine`` because they are split."""
    if engine != "onnxruntime" and any(graph.parts for graph in graphs):
        return "a split graph runs in ONNX Runtime alone: export again without --split"
    return None


def _check_is_bundle(path: Path) -> None:
    """Say what ``path`` is instead, where it is no bundle."""
    if (path / MANIFEST).is_file() or (path / MANIFEST).is_symlink():
        return
    expected, todo = f"a bundle: a folder with {MANIFEST}", None
    if not path.exists():
        received = "nothing there"
    elif path.is_file():
        received = "a file"
        if path.name == MANIFEST or (path.parent / MANIFEST).is_file():
            todo = f"give the folder: {path.parent}"
    elif (path / "run.json").is_file():
        received, todo = "a training run", f"export it first: mope-export {path} --format onnx"
    elif (path / "model.safetensors").is_file():
        received, todo = "a checkpoint", "export the run it belongs to first: mope-export RUN --format onnx"
    else:
        received = f"a folder without {MANIFEST}"
        inside = sorted(p.parent for p in path.glob(f"*/{MANIFEST}"))
        if inside:
            todo = f"did you mean {inside[0]}?"
    raise UsageError(f"{path} is not a bundle", received=received, expected=expected, todo=todo)


def _read_manifest_file(path: Path) -> tuple[str, str]:
    """Text of the manifest and its SHA-256."""
    file = path / MANIFEST
    try:
        if file.is_symlink():
            raise BundleError(f"{file} is a symbolic link", expected="a file inside the bundle", todo=_COPY)
        size = file.stat().st_size
        if size > MAX_MANIFEST_BYTES:
            raise BundleError(f"{file} is too large", received=f"{size:,} bytes", expected=f"{MAX_MANIFEST_BYTES:,}")
        data = file.read_bytes()
        return data.decode("utf-8"), hashlib.sha256(data).hexdigest()
    except OSError as error:
        raise BundleError(f"{file} cannot be read", received=_reason(error)) from error
    except UnicodeDecodeError as error:
        raise BundleError(f"{file} is damaged", received=f"no UTF-8 at byte {error.start:,}", todo=AGAIN) from error


def _check_file(folder: Path, name: str, entry: FileEntry, *, verify: bool) -> None:
    """``name`` is a regular file inside ``folder`` and, as far as asked, what the manifest says."""
    path = folder
    try:
        for part in name.split("/"):
            path = path / part
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                raise BundleError(f"{path} is a symbolic link", expected="a file inside the bundle", todo=_COPY)
        if not stat.S_ISREG(mode):
            raise BundleError(f"{path} is not a file")
        size = path.stat().st_size
        if size != entry.bytes:
            raise BundleError(
                f"{path} was altered", received=f"{size:,} bytes", expected=f"{entry.bytes:,}", todo=AGAIN
            )
        if verify and (found := _sha256(path)) != entry.sha256:
            raise BundleError(
                f"{path} was altered",
                received=f"SHA-256 {found[:12]}…",
                expected=f"{entry.sha256[:12]}…",
                todo=AGAIN,
            )
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BundleError(f"{path} is missing", expected=f"{entry.bytes:,} bytes", todo=AGAIN) from error
    except OSError as error:
        raise BundleError(f"{path} cannot be read", received=_reason(error)) from error


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _read_npz(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(item.file_size for item in archive.infolist())
        if unpacked > MAX_GOLDEN_BYTES:
            raise BundleError(f"{path} is too large", received=f"{unpacked:,} bytes", expected=f"{MAX_GOLDEN_BYTES:,}")
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except BundleError:
        raise
    except Exception as error:  # numpy and zipfile raise whatever a damaged file makes them stumble over
        raise BundleError(
            f"{path} is damaged", received=_reason(error), expected="arrays in .npz", todo=AGAIN
        ) from error


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
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(source, bytes):
        path.write_bytes(source)
    else:
        shutil.copyfile(source, path)
    return {"sha256": _sha256(path), "bytes": path.stat().st_size}


def _dump(document: Mapping[str, Any]) -> str:
    try:
        return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise BundleError("the manifest cannot be written as JSON", received=_reason(error)) from error


def _replace(temporary: Path, target: Path) -> None:
    """Put ``temporary`` in the place of ``target``; the old one is back if that fails."""
    if not target.exists():
        temporary.rename(target)
        return
    old = target.parent / f".{target.name}.{secrets.token_hex(4)}.old"
    target.rename(old)
    try:
        temporary.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:200] or type(error).__name__
