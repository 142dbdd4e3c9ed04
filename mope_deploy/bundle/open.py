"""Reading a bundle: what its manifest says is compared with what is there."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import stat
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mope_deploy.arguments import check_path
from mope_deploy.bundle.unchanged import Seen
from mope_deploy.data import Samples, open_samples
from mope_deploy.errors import BundleError, ConfigError, DataError, UsageError
from mope_deploy.fields import did_you_mean
from mope_deploy.files import reason, sha256
from mope_deploy.limits import MAX_GOLDEN_BYTES, MAX_MANIFEST_BYTES
from mope_deploy.manifest import AGAIN, MANIFEST, FileEntry, Graph, Manifest, read_manifest
from mope_deploy.preprocess import MODALITIES, Preprocessing
from mope_deploy.reading import read_npz, read_regular

__all__ = ["ENGINES", "Bundle"]

ENGINES = "engines"  # of the folder inside a bundle where engines built on the device live
_TRIES = 3  # of opening what is being replaced
_COPY = "copy the bundle with its links resolved: cp -rL"


class Bundle:
    """A bundle on disk, read and checked; make one with :meth:`open`.

    Attributes:
        path: the folder.
        manifest: its manifest.
        sha256: of ``manifest.json`` itself, which covers every other file: the identity of the bundle.
    """

    def __init__(self, path: Path, manifest: Manifest, sha256: str, seen: Seen | None = None) -> None:
        self.path, self.manifest, self.sha256, self._seen = path, manifest, sha256, seen

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
        path = check_path("the bundle", path, expected="the path of its folder")
        for _ in range(_TRIES - 1):
            with contextlib.suppress(_Changed):
                return cls._open(path, verify=verify)
        return cls._open(path, verify=verify)

    @classmethod
    def _open(cls, path: Path, *, verify: bool) -> Bundle:
        """One try; :class:`_Changed` where another bundle took the place of this one meanwhile."""
        _check_is_bundle(path)
        if (real := Path(os.path.realpath(path))) != Path(os.path.abspath(path)):
            path = real  # a link may lead elsewhere a moment later
        text, digest = _read_manifest_file(path)
        manifest = read_manifest(text, str(path / MANIFEST))
        made = None
        with contextlib.suppress(OSError):  # a file that is missing is found below
            made = cls(path, manifest, digest, _look(path, manifest))
            if _read_manifest_file(path)[1] != digest:
                raise _Changed(path)
        for name, entry in manifest.files.items():
            _check_file(path, name, entry, verify=verify)
        if made is None:  # and one that was missing for a moment is not
            raise _Changed(path)
        made.check_unchanged()
        return made

    def check_unchanged(self) -> None:
        """What was opened, and checked, is what is still there: call it after reading files by their path.

        Raises:
            BundleError: a file or folder was changed, replaced or renamed since.
        """
        if self._seen is None:
            return
        try:
            same = self._seen.is_still(_look(self.path, self.manifest))
        except OSError:
            same = False
        if not same:
            raise _Changed(self.path)

    def read(self, name: str) -> bytes:
        """Bytes of a file that the manifest lists, hashed as they were read.

        Raises:
            BundleError: it does not list ``name``, or the file is another one.
        """
        path, entry = self.file(name), self.manifest.files[name]
        try:
            data = read_regular(path, entry.bytes)
        except OSError as error:
            raise BundleError(f"{path} cannot be read", received=reason(error)) from error
        if (found := hashlib.sha256(data).hexdigest()) != entry.sha256:
            raise _altered(path, f"SHA-256 {found[:12]}…", f"{entry.sha256[:12]}…")
        return data

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
        named = {graph.name: graph for graph in graphs}
        if (found := named.get(name)) is None:
            expected = f"one of {', '.join(named)}"
            raise UsageError(f"{self.path}: no graph {name!r}", expected=expected, todo=did_you_mean(name, named))
        if not found.takes(engine):
            what, todo = f"{self.path}: graph {name!r}", _advice([found], engine)
            raise UsageError(what, received=f"engine {engine}", expected=found.runs_on, todo=todo)
        return found

    @cached_property
    def preprocessing(self) -> Preprocessing:
        """What turns raw inputs into the graph's.

        Raises:
            BundleError: the tokenizer cannot be read.
        """
        tokenizer = self.manifest.tokenizer
        try:
            text = None if tokenizer is None else self.read(tokenizer).decode("utf-8")
            specs: dict[str, Any] = {name: getattr(self.manifest, name) for name in (*MODALITIES, "missing")}
            made = Preprocessing(**specs, tokenizer=text)
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
        inputs, outputs = self._arrays(golden.inputs), self._arrays(golden.outputs)
        batch = {array.shape[:1] for array in (*inputs.values(), *outputs.values())}
        if len(batch) != 1 or batch == {(0,)}:
            raise BundleError(f"{self.path}: golden arrays", received="several sizes, or none", expected="one batch")
        if not all(np.isfinite(array).all() for array in outputs.values() if array.dtype.kind == "f"):
            raise BundleError(f"{self.path / golden.outputs}", received="NaN or infinity", expected="finite values")
        stored = ((golden.inputs, inputs, graph.raw_inputs), (golden.outputs, outputs, graph.outputs))
        for name, arrays, specs in stored:
            received = {key: f"{array.dtype} of {array.ndim} axes" for key, array in sorted(arrays.items())}
            expected = {spec.name: f"{spec.dtype} of {len(spec.shape)} axes" for spec in specs}
            if received != expected:
                raise BundleError(f"{self.path / name}", received=received, expected=expected)
        return inputs, outputs

    def golden_samples(self) -> Samples:
        """The golden samples as they were before preprocessing, with or without labels.

        Raises:
            BundleError: one of them cannot be used, or names a file that the manifest does not list.
        """
        manifest = self.manifest
        samples = open_samples(
            self.file(manifest.golden.samples),
            task=dataclasses.replace(manifest.task, labels=()),
            require_label=False,
            modalities=manifest.modalities,
            optional=manifest.missing,
        )
        known = {os.path.normpath(self.path / name) for name in manifest.files}
        try:
            for sample in samples:
                for path in (sample.image, sample.audio, sample.video):
                    if path is not None and os.path.normpath(path) not in known:
                        raise BundleError(f"{sample.where}: {path} is no file of the bundle", todo=AGAIN)
        except DataError as error:
            raise BundleError(f"golden samples: {error}") from error
        return samples

    def _arrays(self, name: str) -> dict[str, NDArray[Any]]:
        data, what = self.read(name), self.path / name
        try:
            return read_npz(data, MAX_GOLDEN_BYTES)
        except ValueError as error:
            received = reason(error)
            raise BundleError(f"{what} is damaged", received=received, expected="arrays in .npz", todo=AGAIN) from error

    def unlisted(self) -> tuple[str, ...]:
        """Files in the folder that the manifest does not know; nothing reads them.

        Engines built on this device (``engines/``) are not among them: each has its own record and hashes.
        """
        found = (p.relative_to(self.path).as_posix() for p in self.path.rglob("*") if not p.is_dir() or p.is_symlink())
        known = {MANIFEST, *self.manifest.files}
        return tuple(sorted(name for name in found if name not in known and not name.startswith(f"{ENGINES}/")))


class _Changed(BundleError):
    """A bundle that is another one by now."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"{path} was changed while it was being read", todo="do not change a bundle in use; try again")


def _look(path: Path, manifest: Manifest) -> Seen:
    return Seen.of(path, (MANIFEST, *manifest.files), may_appear=ENGINES)


def _altered(path: Path, received: str, expected: str) -> BundleError:
    return BundleError(f"{path} was altered", received=received, expected=expected, todo=AGAIN)


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
        data = read_regular(file, MAX_MANIFEST_BYTES)
        return data.decode("utf-8"), hashlib.sha256(data).hexdigest()
    except OSError as error:
        raise BundleError(f"{file} cannot be read", received=reason(error)) from error
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
            altered = f"{size:,} bytes", f"{entry.bytes:,}"
        elif verify and (found := sha256(path)) != entry.sha256:
            altered = f"SHA-256 {found[:12]}…", f"{entry.sha256[:12]}…"
        else:
            return
        raise _altered(path, *altered)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BundleError(f"{path} is missing", expected=f"{entry.bytes:,} bytes", todo=AGAIN) from error
    except OSError as error:
        raise BundleError(f"{path} cannot be read", received=reason(error)) from error
