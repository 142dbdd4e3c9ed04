"""The JSON beside an engine: what it was built from, with, on and for; and the record that it was proved on a device.

The engine file itself stays untouched TensorRT, so that ``trtexec`` and others read it. Format in docs/engines.md.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mope_deploy.bundle import ENGINES, Bundle
from mope_deploy.engines.tensorrt.backends import BACKENDS
from mope_deploy.engines.tensorrt.device import Device
from mope_deploy.engines.tensorrt.profiles import Sizes
from mope_deploy.errors import EngineError, UsageError
from mope_deploy.fields import Fields, parse_json, shown
from mope_deploy.manifest import FileEntry, Graph, TensorSpec, check_name

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
    "write_json",
]

FORMAT, PROOF_FORMAT, SCHEMA = "mope-engine", "mope-engine-proof", 1
ENVIRONMENT = "MOPE_ENGINES"
EXPORTED = f"{ENGINES}/exported"  # of the folder inside a bundle where engines that were exported with it live
MAX_SIDECAR_BYTES = 2**20
REBUILD = "build it again: mope build BUNDLE, or --rebuild"

_CC = re.compile(r"\d{1,2}\.\d")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Precision:
    """Types that the parsed network computes in.

    Args:
        declared: the graph's precision in the manifest.
        products: dtype → number of matrix products and convolutions that read it.
        quantised: number of QuantizeLinear and DequantizeLinear layers.
        tf32: whether float32 products may be rounded to TF32.
    """

    declared: str
    products: Mapping[str, int]
    quantised: int
    tf32: bool


@dataclass(frozen=True)
class Sidecar:
    """What is known of an engine. ``verified`` is false: proofs are kept per device, see :class:`Proof`.

    Args:
        created: UTC, ``2025-01-31T12:00:00Z``.
        backend, version: the library and all of its version.
        graph: name of the graph in the manifest.
        onnx: the files it was built from → SHA-256.
        engine: SHA-256 and size of the engine file.
        compute_capabilities: of the GPUs it runs on.
        built_on: the machine.
        profile: name of an axis → sizes.
        inputs, outputs: as the parsed network has them; axes by name.
        precision: as the parsed network has it.
        workspace: its limit in bytes; None for the library's own.
        seconds: that building took.
        peak_bytes: most main memory that the building process held.
    """

    created: str
    backend: str
    version: str
    graph: str
    onnx: Mapping[str, str]
    engine: FileEntry
    compute_capabilities: tuple[str, ...]
    built_on: Device
    profile: Mapping[str, Sizes]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    precision: Precision
    workspace: int | None
    seconds: float
    peak_bytes: int

    def to_dict(self) -> dict[str, Any]:
        made = {"format": FORMAT, "schema": SCHEMA, **dataclasses.asdict(self), "verified": False}
        made["profile"] = {axis: [s.min, s.opt, s.max] for axis, s in self.profile.items()}
        for kind, specs in (("inputs", self.inputs), ("outputs", self.outputs)):
            made[kind] = [{"name": s.name, "dtype": s.dtype, "shape": list(s.shape)} for s in specs]
        return made

    @classmethod
    def read(cls, path: Path) -> Sidecar:
        """Read a sidecar, strictly.

        Raises:
            EngineError: it is missing, damaged or not exactly of the documented form.
        """
        keys = [field.name for field in dataclasses.fields(cls)]
        read = _open(path, FORMAT, [*keys, "verified"])
        if read.boolean("verified"):
            raise read.fail("verified", "false: proofs are kept per device, in a file of their own")
        onnx = _object(read, "onnx", most=1000)
        profile = _object(read, "profile", most=8)
        profile_read = Fields(profile, f"{read.where}.profile", EngineError, required=list(profile))
        return cls(
            created=read.text("created", most=40),
            backend=read.choice("backend", tuple(BACKENDS)),
            version=read.text("version", most=60),
            graph=read.text("graph", most=64),
            onnx={_file(name, f"{read.where}.onnx"): _digest(onnx[name], f"{read.where}.onnx") for name in onnx},
            engine=_entry(read.value["engine"], f"{read.where}.engine"),
            compute_capabilities=read.array("compute_capabilities", _cc, least=1, most=32),
            built_on=_device(read.value["built_on"], f"{read.where}.built_on"),
            profile={axis: _sizes(profile_read, axis) for axis in profile},
            inputs=read.array("inputs", _tensor, least=1, most=64),
            outputs=read.array("outputs", _tensor, least=1, most=64),
            precision=_precision(read.value["precision"], f"{read.where}.precision"),
            workspace=None if read.value["workspace"] is None else read.integer("workspace", 1, 2**50),
            seconds=read.number("seconds", 0),
            peak_bytes=read.integer("peak_bytes", 0, 2**50),
        )


@dataclass(frozen=True)
class Proof:
    """The golden samples came out right: this engine, on this device, with this library and driver.

    Args:
        engine_sha256: of the engine file.
        bundle_sha256: of the manifest, whose golden samples they were.
        version: of the library.
        device: the machine.
        logits_error, routing_error: measured; see :class:`mope_deploy.engines.golden.Verification`.
        layers: dtype → number of the engine's matrix layers that compute in it, as its inspector reports them; empty
            where it does not tell.
        created: UTC.
    """

    engine_sha256: str
    bundle_sha256: str
    version: str
    device: Device
    logits_error: float
    routing_error: float | None
    layers: Mapping[str, int]
    created: str

    def covers(self, *, engine_sha256: str, bundle_sha256: str, version: str, device: Device) -> bool:
        """Whether it proves exactly this; on anything else the golden samples have to be run again."""
        return (self.engine_sha256, self.bundle_sha256, self.version, self.device) == (
            engine_sha256,
            bundle_sha256,
            version,
            device,
        )

    def to_dict(self) -> dict[str, Any]:
        return {"format": PROOF_FORMAT, "schema": SCHEMA, **dataclasses.asdict(self)}

    @classmethod
    def read(cls, path: Path) -> Proof | None:
        """The proof in a file; None if there is none, or none that can be read: then the samples are run again."""
        try:
            read = _open(path, PROOF_FORMAT, [field.name for field in dataclasses.fields(cls)])
            return cls(
                engine_sha256=_digest(read.value["engine_sha256"], read.where),
                bundle_sha256=_digest(read.value["bundle_sha256"], read.where),
                version=read.text("version", most=60),
                device=_device(read.value["device"], f"{read.where}.device"),
                logits_error=read.number("logits_error", 0),
                routing_error=None if read.value["routing_error"] is None else read.number("routing_error", 0),
                layers=_counts(read, "layers"),
                created=read.text("created", most=40),
            )
        except EngineError:
            return None


@dataclass(frozen=True)
class EngineFiles:
    """Where an engine, its sidecar and its proof are, or would be.

    Args:
        engine, sidecar: of one folder.
        proof: never among the files that a bundle's manifest lists.
        exported: whether the engine came with the bundle, listed in its manifest and never replaced.
    """

    engine: Path
    sidecar: Path
    proof: Path
    exported: bool = False


def engine_files(bundle: Bundle, graph: Graph, backend: str, *, folder: Path | None = None) -> EngineFiles:
    """Paths for the engine of a graph that is built here.

    Args:
        bundle: the graph's.
        graph: of the bundle's manifest.
        backend: name of the library.
        folder: where; by default ``BUNDLE/engines/``, or ``$MOPE_ENGINES/<manifest's SHA-256>/`` if that is set.

    Raises:
        UsageError: the folder is a link, which could lead anywhere.
    """
    folder = folder or _folder(bundle)
    if folder.is_symlink():
        raise UsageError(
            f"{folder} is a symbolic link", expected="a folder", todo=f"set {ENVIRONMENT} to keep engines elsewhere"
        )
    stem = _stem(graph, backend)
    return EngineFiles(folder / f"{stem}.engine", folder / f"{stem}.json", folder / f"{stem}.proof.json")


def exported_names(graph: Graph, backend: str) -> tuple[str, str]:
    """Names, inside a bundle, of the engine of a graph that is exported with it, and of its sidecar."""
    stem = f"{EXPORTED}/{_stem(graph, backend)}"
    return f"{stem}.engine", f"{stem}.json"


def exported_files(bundle: Bundle, graph: Graph, backend: str) -> EngineFiles | None:
    """Paths of the engine that came with the bundle; None if the manifest lists none. Its proof is the device's."""
    names = exported_names(graph, backend)
    if not set(names) <= set(bundle.manifest.files):
        return None
    engine, sidecar = (bundle.file(name) for name in names)
    proof = _folder(bundle) / f"{_stem(graph, backend)}.exported.proof.json"
    return EngineFiles(engine, sidecar, proof, exported=True)


def find_engines(bundle: Bundle, graph: Graph) -> list[tuple[str, EngineFiles]]:
    """Every engine of a graph, good or not, with its library: those built here, then those that came with the bundle.

    Raises:
        UsageError: the folder of engines is a link.
    """
    here = [(name, engine_files(bundle, graph, name)) for name in BACKENDS]
    found = [(name, files) for name, files in here if files.engine.exists() or files.sidecar.exists()]
    came = [(name, exported_files(bundle, graph, name)) for name in BACKENDS]
    return found + [(name, files) for name, files in came if files is not None]


def _folder(bundle: Bundle) -> Path:
    elsewhere = os.environ.get(ENVIRONMENT)
    return Path(elsewhere) / bundle.sha256[:16] if elsewhere else bundle.path / ENGINES


def _stem(graph: Graph, backend: str) -> str:
    return f"{graph.name}.{backend}"


def onnx_files(bundle: Bundle, graph: Graph) -> dict[str, str]:
    """The files of a graph → SHA-256, as the manifest has them."""
    return {name: bundle.manifest.files[name].sha256 for name in (graph.file, *graph.data)}


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all. Raises :class:`OSError`."""
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    try:
        temporary.write_text(
            json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
        )
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _open(path: Path, form: str, keys: Sequence[str]) -> Fields:
    """The file's JSON object with exactly ``keys`` and the right format and schema."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_SIDECAR_BYTES + 1)
        if len(data) > MAX_SIDECAR_BYTES:
            raise EngineError(f"{path} is too large", expected=f"at most {MAX_SIDECAR_BYTES:,} bytes", todo=REBUILD)
        document = parse_json(data.decode("utf-8"))
    except OSError as error:
        raise EngineError(f"{path} cannot be read", received=error.strerror, todo=REBUILD) from error
    except ValueError as error:
        raise EngineError(f"{path} is damaged", received=str(error)[:200], expected="JSON", todo=REBUILD) from error
    if not isinstance(document, dict) or document.get("format") != form or document.get("schema") != SCHEMA:
        found = (
            f"{shown(document.get('format'))}, schema {shown(document.get('schema'))}"
            if isinstance(document, dict)
            else shown(document)
        )
        raise EngineError(f"{path}", received=found, expected=f"{form!r}, schema {SCHEMA}", todo=REBUILD)
    return Fields(document, str(path), EngineError, required=("format", "schema", *keys))


def _object(read: Fields, key: str, *, most: int) -> dict[str, Any]:
    found = read.value[key]
    if not isinstance(found, dict) or not 1 <= len(found) <= most:
        raise read.fail(key, f"an object of 1 to {most} keys")
    return found


def _file(name: str, where: str) -> str:
    try:
        return check_name(name, where)
    except Exception as error:
        raise EngineError(str(error)) from error


def _digest(value: object, where: str) -> str:
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise EngineError(where, received=shown(value), expected="64 hexadecimal digits in lower case")
    return value


def _entry(value: object, where: str) -> FileEntry:
    read = Fields(value, where, EngineError, required=("sha256", "bytes"))
    return FileEntry(_digest(read.value["sha256"], f"{where}.sha256"), read.integer("bytes", 1, 2**40))


def _cc(value: object, where: str) -> str:
    if not isinstance(value, str) or not _CC.fullmatch(value):
        raise EngineError(where, received=shown(value), expected="a compute capability like '8.7'")
    return value


def _device(value: object, where: str) -> Device:
    keys = [field.name for field in dataclasses.fields(Device)]
    read = Fields(value, where, EngineError, required=keys)
    known: dict[str, Any] = {
        key: None if key != "os" and read.value[key] is None else read.text(key, most=500) for key in keys
    }
    return Device(**known)


def _sizes(read: Fields, axis: str) -> Sizes:
    found = read.numbers(axis, 3, 1, 2**31)
    if list(found) != sorted(found) or any(size != int(size) for size in found):
        raise read.fail(axis, "[least, best, greatest]")
    return Sizes(*(int(size) for size in found))


def _tensor(value: object, where: str) -> TensorSpec:
    read = Fields(value, where, EngineError, required=("name", "dtype", "shape"))
    return TensorSpec(read.text("name", most=128), read.text("dtype", most=16), read.array("shape", _axis, most=8))


def _axis(value: object, where: str) -> int | str:
    whole = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 2**31
    if whole or (isinstance(value, str) and 1 <= len(value) <= 63):
        return value  # type: ignore[return-value]
    raise EngineError(where, received=shown(value), expected="a size or the name of an axis")


def _precision(value: object, where: str) -> Precision:
    read = Fields(value, where, EngineError, required=("declared", "products", "quantised", "tf32"))
    return Precision(
        declared=read.text("declared", most=32),
        products=_counts(read, "products"),
        quantised=read.integer("quantised", 0, 10**9),
        tf32=read.boolean("tf32"),
    )


def _counts(read: Fields, key: str) -> dict[str, int]:
    """An object of dtype → number."""
    found = read.value[key]
    if not isinstance(found, dict) or len(found) > 16:
        raise read.fail(key, "an object of at most 16 dtypes")
    counts = Fields(found, f"{read.where}.{key}", EngineError, required=list(found))
    return {name: counts.integer(name, 0, 10**9) for name in found}
