"""The JSON beside an engine: what it was built from, with, on and for; and the record that it was proved on a device.

The engine file itself stays untouched TensorRT, so that ``trtexec`` and others read it. Format in docs/engines.md.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from msgspec import Meta

from mope_deploy.bundle import ENGINES, Bundle
from mope_deploy.engines.tensorrt.backends import BACKENDS
from mope_deploy.engines.tensorrt.device import Device
from mope_deploy.engines.tensorrt.profiles import Sizes
from mope_deploy.errors import EngineError, UsageError
from mope_deploy.fields import FieldError, between, choice, decode, form, length, shown, text
from mope_deploy.limits import MAX_SIDECAR_BYTES
from mope_deploy.manifest import FileEntry, Graph, TensorSpec
from mope_deploy.manifest.types import Digest, FileName
from mope_deploy.reading import read_json

__all__ = [
    "EngineFiles",
    "Precision",
    "Proof",
    "Sidecar",
    "engine_files",
    "exported_files",
    "exported_names",
    "find_engines",
    "onnx_files",
    "plain",
    "proof_file",
]

FORMAT, PROOF_FORMAT, SCHEMA = "mope-engine", "mope-engine-proof", 1
ENVIRONMENT = "MOPE_ENGINES"
EXPORTED = f"{ENGINES}/exported"  # of the folder inside a bundle where engines that were exported with it live
REBUILD = "build it again: mope build BUNDLE, or --rebuild"

T = TypeVar("T")
_Counts = Annotated[Mapping[str, Annotated[int, between(0, 10**9)]], length(0, 16)]
_Size = Annotated[int, between(1, 2**31)]
_Axis = Annotated[
    _Size | Annotated[str, length(1, 63)], Meta(description="a size of at least 1 or the name of an axis")
]
_Capability = Annotated[str, form(r"[0-9]{1,2}\.[0-9]", "a compute capability like '8.7'")]


@dataclass(frozen=True)
class Precision:
    """Types that the parsed network computes in."""

    declared: Annotated[str, text(32)]  # the graph's precision in the manifest
    products: _Counts  # dtype → number of matrix products and convolutions that read it
    quantised: Annotated[int, between(0, 10**9)]  # QuantizeLinear and DequantizeLinear layers
    tf32: bool  # whether float32 products may be rounded to TF32


@dataclass(frozen=True)
class Sidecar:
    """What is known of an engine; tensors and precision as the parsed network has them.

    ``verified`` is false: proofs are kept per device, see :class:`Proof`.
    """

    created: Annotated[str, text(40)]  # UTC, 2025-01-31T12:00:00Z
    backend: Annotated[str, choice(*BACKENDS)]
    version: Annotated[str, text(60)]  # of the library, all of it
    graph: Annotated[str, text(64)]  # its name in the manifest
    onnx: Annotated[Mapping[FileName, Digest], length(1, 1000)]  # the files it was built from → SHA-256
    engine: FileEntry
    compute_capabilities: Annotated[tuple[_Capability, ...], length(1, 32)]  # of the GPUs it runs on
    built_on: Device
    profile: Mapping[str, Sizes]  # by axis
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    precision: Precision
    workspace: Annotated[int, between(1, 2**50)] | None  # its limit in bytes; None for the library's own
    seconds: Annotated[float, between(0)]  # that building took
    peak_bytes: Annotated[int, between(0, 2**50)]  # most main memory that the building process held

    def to_dict(self) -> dict[str, Any]:
        made = {"format": FORMAT, "schema": SCHEMA, **dataclasses.asdict(self), "verified": False}
        made["profile"] = {axis: [s.min, s.opt, s.max] for axis, s in self.profile.items()}
        return made | {"inputs": plain(self.inputs), "outputs": plain(self.outputs)}

    @classmethod
    def read(cls, path: Path) -> Sidecar:
        """The sidecar in a file; :class:`EngineError` if missing, damaged or not exactly of the documented form."""
        read = _read(path, FORMAT, _Document)
        known: dict[str, Any] = {field.name: getattr(read, field.name) for field in dataclasses.fields(cls)}
        known["profile"] = {axis: Sizes(*sizes) for axis, sizes in read.profile.items()}
        known |= {kind: tuple(one.spec for one in getattr(read, kind)) for kind in ("inputs", "outputs")}
        return cls(**known)


@dataclass(frozen=True)
class _Tensor:
    name: Annotated[str, text(128)]
    dtype: Annotated[str, text(16)]
    shape: Annotated[tuple[_Axis, ...], length(0, 8)]

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.name, self.dtype, self.shape)


@dataclass(frozen=True)
class _Document(Sidecar):
    """A sidecar as its file has it."""

    profile: Annotated[Mapping[str, tuple[_Size, _Size, _Size]], length(1, 8)]  # type: ignore[assignment]
    inputs: Annotated[tuple[_Tensor, ...], length(1, 64)]  # type: ignore[assignment]
    outputs: Annotated[tuple[_Tensor, ...], length(1, 64)]  # type: ignore[assignment]
    verified: bool

    def __post_init__(self) -> None:
        if self.engine.bytes < 1:
            raise FieldError("engine.bytes", received=self.engine.bytes, expected="an integer from 1")
        for axis, sizes in self.profile.items():
            if list(sizes) != sorted(sizes):
                raise FieldError(f"profile.{axis}", received=list(sizes), expected="[least, best, greatest]")
        if self.verified:
            expected = "false: proofs are kept per device, in a file of their own"
            raise FieldError("verified", received=True, expected=expected)


@dataclass(frozen=True)
class Proof:
    """The golden samples came out right: this engine, on this device, with this library and driver.

    Errors as in :class:`mope_deploy.engines.golden.Verification`.
    """

    engine_sha256: Digest
    bundle_sha256: Digest  # of the manifest, whose golden samples they were
    version: Annotated[str, text(60)]  # of the library
    device: Device
    logits_error: Annotated[float, between(0)]
    routing_error: Annotated[float, between(0)] | None
    layers: _Counts  # dtype → matrix layers that compute in it, as the engine's inspector tells; empty if it does not
    created: Annotated[str, text(40)]  # UTC

    def covers(self, *, engine_sha256: str, bundle_sha256: str, version: str, device: Device) -> bool:
        """Whether it proves exactly this; on anything else the golden samples have to be run again."""
        asked = (engine_sha256, bundle_sha256, version, device)
        return (self.engine_sha256, self.bundle_sha256, self.version, self.device) == asked

    def to_dict(self) -> dict[str, Any]:
        return {"format": PROOF_FORMAT, "schema": SCHEMA, **dataclasses.asdict(self)}

    @classmethod
    def read(cls, path: Path) -> Proof | None:
        """The proof in a file; None if there is none, or none that can be read: then the samples are run again."""
        try:
            return _read(path, PROOF_FORMAT, cls)
        except EngineError:
            return None


@dataclass(frozen=True)
class EngineFiles:
    """Where an engine, its sidecar and its proof are, or would be."""

    engine: Path
    sidecar: Path  # in the same folder
    proof: Path  # never among the files that a bundle's manifest lists
    exported: bool = False  # whether it came with the bundle, listed in its manifest and never replaced


def engine_files(bundle: Bundle, graph: Graph, backend: str, *, folder: Path | None = None) -> EngineFiles:
    """Paths for the engine of a graph that is built here, with the library called ``backend``.

    Args:
        folder: where; by default ``BUNDLE/engines/``, or ``$MOPE_ENGINES/<manifest's SHA-256>/`` if that is set.

    Raises:
        UsageError: the folder is a link, which could lead anywhere.
    """
    folder = folder or _folder(bundle)
    if folder.is_symlink():
        raise UsageError(
            f"{folder} is a symbolic link", expected="a folder", todo=f"set {ENVIRONMENT} to keep engines elsewhere"
        )
    engine, sidecar, proof = (folder / f"{graph.name}.{backend}.{end}" for end in ("engine", "json", "proof.json"))
    return EngineFiles(engine, sidecar, proof)


def proof_file(bundle: Bundle, graph: Graph, engine: str) -> Path:
    """Where the proof of an engine lies that is not built: a provider of ONNX Runtime's."""
    return _folder(bundle) / f"{graph.name}.{engine}.proof.json"


def exported_names(graph: Graph, backend: str) -> tuple[str, str]:
    """Names, inside a bundle, of the engine of a graph that is exported with it, and of its sidecar."""
    stem = f"{EXPORTED}/{graph.name}.{backend}"
    return f"{stem}.engine", f"{stem}.json"


def exported_files(bundle: Bundle, graph: Graph, backend: str) -> EngineFiles | None:
    """Paths of the engine that came with the bundle; None if the manifest lists none. Its proof is the device's."""
    names = exported_names(graph, backend)
    if not set(names) <= set(bundle.manifest.files):
        return None
    engine, sidecar = (bundle.file(name) for name in names)
    return EngineFiles(engine, sidecar, _folder(bundle) / f"{engine.stem}.exported.proof.json", exported=True)


def find_engines(bundle: Bundle, graph: Graph) -> list[tuple[str, EngineFiles]]:
    """Every engine of a graph, good or not, with its library: those built here, then those that came with the bundle.

    Raises as :func:`engine_files`.
    """
    here = [(name, engine_files(bundle, graph, name)) for name in BACKENDS]
    found = [(name, files) for name, files in here if files.engine.exists() or files.sidecar.exists()]
    came = [(name, exported_files(bundle, graph, name)) for name in BACKENDS]
    return found + [(name, files) for name, files in came if files is not None]


def _folder(bundle: Bundle) -> Path:
    elsewhere = os.environ.get(ENVIRONMENT)
    return Path(elsewhere) / bundle.sha256[:16] if elsewhere else bundle.path / ENGINES


def onnx_files(bundle: Bundle, graph: Graph) -> dict[str, str]:
    """The files of a graph → SHA-256, as the manifest has them."""
    return {name: bundle.manifest.files[name].sha256 for name in (graph.file, *graph.data)}


def plain(specs: Iterable[TensorSpec]) -> list[dict[str, Any]]:
    """Tensors as a sidecar's JSON has them."""
    return [{"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape)} for spec in specs]


def _read(path: Path, format: str, kind: type[T]) -> T:
    """The file's JSON object of the right format and schema, without these two keys."""
    try:
        document = read_json(path, MAX_SIDECAR_BYTES)
    except OSError as error:
        raise EngineError(f"{path} cannot be read", received=error.strerror, todo=REBUILD) from error
    except ValueError as error:
        raise EngineError(f"{path} is damaged", received=str(error)[:200], expected="JSON", todo=REBUILD) from error
    found = shown(document)
    if isinstance(document, dict):
        known = document.pop("format", None), document.pop("schema", None)
        if known == (format, SCHEMA):
            return decode(document, kind, str(path), EngineError)
        found = f"{shown(known[0])}, schema {shown(known[1])}"
    raise EngineError(f"{path}", received=found, expected=f"{format!r}, schema {SCHEMA}", todo=REBUILD)
