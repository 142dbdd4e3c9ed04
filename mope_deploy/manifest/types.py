"""``manifest.json``: its schema as types, and the strict reader of every schema ever released.

docs/bundle.md describes each field. Pure text in, :class:`Manifest` out: files are mope_deploy.bundle's business.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from mope_deploy.errors import BundleError, ConfigError
from mope_deploy.fields import Fields, parse_json, shown
from mope_deploy.preprocess import (
    MODALITIES,
    AudioSpec,
    ImageSpec,
    Tensors,
    TextSpec,
    VideoSpec,
    tensors_of,
)

__all__ = [
    "FORMAT",
    "MANIFEST",
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
    "Task",
    "TensorSpec",
    "Tolerance",
    "check_name",
    "conditions_name",
    "read_manifest",
    "y_name",
]

Spec = TypeVar("Spec", ImageSpec, TextSpec, AudioSpec, VideoSpec)

FORMAT = "mope-bundle"
SCHEMA = 3
MANIFEST = "manifest.json"

DTYPES = ("float32", "float16", "int64", "int32", "int8", "uint8", "bool")
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int8-dynamic")
RUNS_ON = ("any", "onnxruntime", "tensorrt")
MARKS = ("", "CPU", "emulated")
TASKS = ("single-label", "multi-label")

MAX_FILE_BYTES = 2**40
MAX_TOKENIZER_BYTES = 256 * 2**20
MAX_FILES = 10_000
MAX_LABELS = 100_000
MAX_THREADS = 512  # far beyond any use; thousands take minutes to start

_SAFE_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,127}")  # a name on every file system; never "." or ".."
_AXIS = re.compile(r"[a-z][a-z0-9_]{0,62}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
AGAIN = "copy or export the bundle again"  # what to do about a damaged one


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a graph.

    Args:
        name: as in the graph.
        dtype: numpy's name, one of :data:`DTYPES`.
        shape: sizes, or names of axes that vary: ``("batch", 3, 224, 224)``.
        range: least and greatest value that occurs, if that is known.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    range: tuple[float, float] | None = None

    @property
    def form(self) -> str:
        """Dtype and shape as messages show them: ``float32 (batch, 3, 224, 224)``."""
        return f"{self.dtype} ({', '.join(map(str, self.shape))})"


@dataclass(frozen=True)
class Tolerance:
    """What golden samples may differ by.

    Args:
        logits: allowed ``max|a - b| / max|b|`` over all golden logits b.
        routing: allowed ``max|a - b|`` over all golden routing weights, which lie between 0 and 1.
    """

    logits: float
    routing: float


@dataclass(frozen=True)
class Gate:
    """How a graph of lower precision was compared with the eager float32 model before it was let into the bundle.

    Args:
        samples: real samples it was judged on.
        mark: what the comparison did not show: ``"emulated"`` arithmetic (bf16), ``"CPU"`` arithmetic that a device
            does otherwise (fp16), or ``""``.
        kept: encoder layers, or linear layers of them, that stayed in float32 because the gate failed without them.
        thresholds: what it had to reach, by name, as shares of 1.
        figures: what it did reach.
    """

    samples: int
    mark: str
    kept: tuple[str, ...]
    thresholds: Mapping[str, float]
    figures: Mapping[str, float | str | bool]


@dataclass(frozen=True)
class Cpu:
    """How a session on the CPU is set up unless the device says otherwise.

    Args:
        threads: of one operator; None for as many as the process may use cores.
        arena: whether the session keeps the memory it once had, in an arena, for its next run.
    """

    threads: int | None = None
    arena: bool = True


@dataclass(frozen=True)
class Build:
    """What engines should be built with, and sessions opened with, where nothing else is asked for.

    Args:
        target: name of the device preset that the export was made for (mope_deploy/targets.py), or None.
        profile: name of an axis → its least, best and greatest size.
        workspace: limit of the builder's scratch memory in MiB, or None.
        cpu: of sessions on the CPU.
    """

    target: str | None = None
    profile: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)
    workspace: int | None = None
    cpu: Cpu = Cpu()


@dataclass(frozen=True)
class Part:
    """The file that encodes one complementary modality of a split graph.

    Args:
        modality: what it encodes; it reads nothing else.
        file: the ONNX file.
        data: the external-data files it reads.
        inputs: those that preprocessing makes of the modality.
        outputs: its pooled feature :func:`y_name` (B, D_y) and, for the main file, :func:`conditions_name` (B, F):
            all that depends on this modality alone, side by side in one row for each sample.
    """

    modality: str
    file: str
    data: tuple[str, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class Graph:
    """What computes the model: one file, or a main file and a part for each complementary modality.

    Args:
        name: distinguishes the graphs of a bundle: ``"model"``, ``"model-int8"``, ``"model-fused"``.
        file: the ONNX file; of a split graph the main one, which runs after its parts.
        data: the external-data files it reads.
        precision: of its weights and arithmetic, one of :data:`PRECISIONS`.
        opset, ir_version: of the file, for those who must know whether their engine reads it.
        runs_on: ``"any"``, or the one engine that takes it; ``"tensorrt"`` stands for all TensorRT libraries.
        inputs, outputs: of ``file``, in its order; a split graph's main file reads the parts' conditions as well.
        tolerance: how far its outputs on the golden samples may be from the golden ones.
        gate: how a precision below fp32 was judged; None for fp32, which passed the parity gate.
        parts: of a split graph one for each complementary modality, in the manifest's order; else empty.
    """

    name: str
    file: str
    data: tuple[str, ...]
    precision: str
    opset: int
    ir_version: int
    runs_on: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    tolerance: Tolerance
    gate: Gate | None
    parts: tuple[Part, ...] = ()

    @property
    def raw_inputs(self) -> tuple[TensorSpec, ...]:
        """What preprocessing makes for the whole graph: the main file's share, then each part's."""
        conditions = {conditions_name(part.modality) for part in self.parts}
        own = tuple(spec for spec in self.inputs if spec.name not in conditions)
        return own + tuple(spec for part in self.parts for spec in part.inputs)

    @property
    def files(self) -> tuple[str, ...]:
        """Every file it is made of."""
        return (self.file, *self.data, *(name for part in self.parts for name in (part.file, *part.data)))

    def takes(self, engine: str) -> bool:
        """Whether ``engine`` (``"onnxruntime"``, ``"tensorrt"``, ``"tensorrt_rtx"``) may run this graph."""
        return self.runs_on == "any" or engine.startswith(self.runs_on)


@dataclass(frozen=True)
class Task:
    """What the logits mean: softmax over ``labels``, or a sigmoid each with ``threshold`` for multi-label tasks."""

    type: str
    labels: tuple[str, ...]
    threshold: float | None

    @property
    def multi_label(self) -> bool:
        return self.type == "multi-label"

    @property
    def several(self) -> bool:
        return self.multi_label

    def encode(self, labels: Any) -> Any:
        from mope_deploy.task import TASKS

        return TASKS[self.type](labels=self.labels).encode(labels)


@dataclass(frozen=True)
class Routing:
    """Shape of the ``routing`` output (B, layers, experts); ``top_k`` is None for dense routing."""

    layers: int
    experts: int
    top_k: int | None


@dataclass(frozen=True)
class Golden:
    """Inputs whose outputs are known.

    Args:
        samples: JSONL as mope_deploy.data reads it; the files it names are in the bundle too: PNG, FLAC, .npz.
        inputs: .npz, the same samples as one batch of input arrays.
        outputs: .npz, ``logits`` and, where the graph has it, ``routing``; the eager float32 model's.
    """

    samples: str
    inputs: str
    outputs: str


@dataclass(frozen=True)
class Parity:
    """Result of the export gate: the file of its report, and the figures worth showing."""

    report: str | None
    figures: Mapping[str, float | str | bool]


@dataclass(frozen=True)
class FileEntry:
    """What one file of a bundle must be."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """``manifest.json``, checked. Field by field in docs/bundle.md."""

    schema: int
    name: str
    created: str
    versions: Mapping[str, str]
    task: Task
    main: str
    complementary: tuple[str, ...]
    image: ImageSpec | None
    text: TextSpec | None
    tokenizer: str | None
    graphs: tuple[Graph, ...]
    routing: Routing | None
    golden: Golden
    parity: Parity
    build: Build
    files: Mapping[str, FileEntry]
    audio: AudioSpec | None = None
    video: VideoSpec | None = None
    missing: tuple[str, ...] = ()

    @property
    def tensors(self) -> Tensors:
        """What preprocessing makes for the graphs: name → dtype and axes."""
        specs = {name: getattr(self, name) for name in MODALITIES}
        return tensors_of({name: spec for name, spec in specs.items() if spec is not None}, self.missing)

    def tensors_of(self, modality: str) -> Tensors:
        """What preprocessing makes of one modality that the model reads: name → dtype and axes."""
        return tensors_of({modality: getattr(self, modality)}, self.missing)


def y_name(modality: str) -> str:
    """The output of a part that is its modality's pooled feature: float32 (B, D_y)."""
    return f"y_{modality}"


def conditions_name(modality: str) -> str:
    """What a part hands to the main file: float32 (B, F)."""
    return f"conditions_{modality}"


def read_manifest(text: str, where: str) -> Manifest:
    """The text of a manifest, of any schema that this release knows, as today's :class:`Manifest`.

    Args:
        text: the whole file.
        where: what error messages call it.

    Raises:
        BundleError: damaged JSON, an unknown schema, a field missing, unknown, mistyped, out of range or at odds with
        another.
    """
    try:
        document = parse_json(text)
    except ValueError as error:
        raise BundleError(f"{where} is damaged", received=str(error), expected="JSON", todo=AGAIN) from error
    if not isinstance(document, dict):
        raise BundleError(where, received=shown(document), expected="a JSON object")
    if document.get("format") != FORMAT:
        raise BundleError(f"{where}.format", received=shown(document.get("format")), expected=repr(FORMAT))
    schema = document.get("schema")
    reader = _READERS.get(schema) if isinstance(schema, int) and not isinstance(schema, bool) else None
    if reader is None:
        newer = isinstance(schema, int) and schema > SCHEMA
        raise BundleError(
            f"{where}.schema",
            received=shown(schema),
            expected=f"one that this release reads: {', '.join(map(str, sorted(_READERS)))}",
            todo="the bundle was written by a newer release: pip install --upgrade mope-deploy" if newer else AGAIN,
        )
    return reader(document, where)


def _read_schema_1(document: dict[str, Any], where: str) -> Manifest:
    """Schema 1 had one tolerance for all graphs, beside the golden files, and only fp32."""
    golden = Fields(
        document.get("golden"), f"{where}.golden", BundleError, required=("samples", "inputs", "outputs", "tolerance")
    )
    tolerance = _tolerance(golden.value["tolerance"], f"{where}.golden.tolerance")
    return _read(
        {**document, "golden": {k: v for k, v in golden.value.items() if k != "tolerance"}, "build": None},
        where,
        schema=1,
        graph=lambda value, at: _graph_of_schema_1(value, at, tolerance),
        build=_build,
    )


def _read_schema_2(document: dict[str, Any], where: str) -> Manifest:
    """Schema 2 had one file for each graph, and said nothing about sessions on the CPU."""
    return _read(document, where, schema=2, graph=_graph_of_schema_2, build=_build_of_schema_2)


def _read_schema_3(document: dict[str, Any], where: str) -> Manifest:
    return _read(document, where, schema=3, graph=_graph, build=_build)


def _read(
    document: dict[str, Any],
    where: str,
    *,
    schema: int,
    graph: Callable[[object, str], Graph],
    build: Callable[[object, str], Build],
) -> Manifest:
    keys = "format schema name created versions task modalities preprocess graphs routing golden parity build files"
    read = Fields(document, where, BundleError, required=keys.split())
    modalities = Fields(document["modalities"], f"{where}.modalities", BundleError, required=("main", "complementary"))
    known, more = (("image", "text"), ()) if schema == 1 else (MODALITIES, ("audio", "video", "missing"))
    preprocess = Fields(
        document["preprocess"],
        f"{where}.preprocess",
        BundleError,
        required=("image", "text", "tokenizer"),
        optional=more,
    )
    manifest = Manifest(
        schema=schema,
        name=read.text("name", most=200),
        created=_time(read),
        versions=_versions(document["versions"], f"{where}.versions"),
        task=_task(document["task"], f"{where}.task"),
        main=modalities.choice("main", known),
        complementary=modalities.texts("complementary", most=8, each=32, distinct=True),
        image=preprocess.maybe("image", _spec(ImageSpec)),
        text=preprocess.maybe("text", _spec(TextSpec)),
        tokenizer=preprocess.maybe("tokenizer", check_name),
        graphs=read.array("graphs", graph, least=1, most=64),
        routing=read.maybe("routing", _routing),
        golden=_golden(document["golden"], f"{where}.golden"),
        parity=_parity(document["parity"], f"{where}.parity"),
        build=read.maybe("build", build) or Build(),
        files=_files(document["files"], f"{where}.files"),
        audio=preprocess.maybe("audio", _spec(AudioSpec)),
        video=preprocess.maybe("video", _spec(VideoSpec)),
        missing=preprocess.maybe("missing", lambda _, __: _missing(preprocess)) or (),
    )
    _check_consistent(manifest, where)
    return manifest


# Every schema ever released keeps its reader, which returns today's Manifest.
_READERS = {1: _read_schema_1, 2: _read_schema_2, 3: _read_schema_3}


def _time(read: Fields) -> str:
    text = read.text("created", most=40)
    try:
        datetime.datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ")
    except ValueError:
        raise read.fail("created", "a time in UTC like 2025-01-31T12:00:00Z") from None
    return text


def _spec(cls: type[Spec]) -> Callable[[object, str], Spec]:
    """Reads one modality's preparation."""

    def read(value: object, where: str) -> Spec:
        try:
            return cls.from_dict(value, where=where)
        except ConfigError as error:
            raise BundleError(str(error)) from error

    return read


def _missing(preprocess: Fields) -> tuple[str, ...]:
    found = preprocess.texts("missing", least=1, most=len(MODALITIES), distinct=True)
    if not set(found) <= set(MODALITIES):
        raise preprocess.fail("missing", f"an array of {', '.join(MODALITIES)}")
    return found


def _versions(value: object, where: str) -> dict[str, str]:
    if not isinstance(value, dict) or len(value) > 100:
        raise BundleError(where, received=shown(value), expected="an object of at most 100 package versions")
    read = Fields(value, where, BundleError, required=list(value))
    for key in value:
        if len(key) > 100:
            raise BundleError(where, received=shown(key), expected="names of at most 100 characters")
    return {key: read.text(key, most=100) for key in value}


def _task(value: object, where: str) -> Task:
    read = Fields(value, where, BundleError, required=("type", "labels", "threshold"))
    kind = read.choice("type", TASKS)
    labels = read.texts("labels", least=1 if kind == "multi-label" else 2, most=MAX_LABELS, each=256, distinct=True)
    if kind == "multi-label":
        return Task(kind, labels, read.number("threshold", 0.0, 1.0))
    if read.value["threshold"] is not None:
        raise read.fail("threshold", "null for a single-label task")
    return Task(kind, labels, None)


def _graph_of_schema_1(value: object, where: str, tolerance: Tolerance) -> Graph:
    keys = ("name", "file", "data", "precision", "opset", "ir_version", "runs_on", "inputs", "outputs")
    read = Fields(value, where, BundleError, required=keys)
    limits = {"logits": tolerance.logits, "routing": tolerance.routing}
    return _graph({**read.value, "tolerance": limits, "gate": None, "parts": []}, where)


def _graph_of_schema_2(value: object, where: str) -> Graph:
    keys = "name file data precision opset ir_version runs_on inputs outputs tolerance gate"
    read = Fields(value, where, BundleError, required=keys.split())
    return _graph({**read.value, "parts": []}, where)


def _graph(value: object, where: str) -> Graph:
    keys = "name file data precision opset ir_version runs_on inputs outputs tolerance gate parts"
    read = Fields(value, where, BundleError, required=keys.split())
    return Graph(
        name=read.text("name", most=64),
        file=_name(read, "file"),
        data=read.array("data", check_name, most=1000),
        precision=read.choice("precision", PRECISIONS),
        opset=read.integer("opset", 1, 1000),
        ir_version=read.integer("ir_version", 1, 1000),
        runs_on=read.choice("runs_on", RUNS_ON),
        inputs=read.array("inputs", _tensor, least=1, most=64),
        outputs=read.array("outputs", _tensor, least=1, most=64),
        tolerance=_tolerance(read.value["tolerance"], f"{where}.tolerance"),
        gate=read.maybe("gate", _gate),
        parts=read.array("parts", _part, most=len(MODALITIES)),
    )


def _part(value: object, where: str) -> Part:
    read = Fields(value, where, BundleError, required=("modality", "file", "data", "inputs", "outputs"))
    return Part(
        modality=read.choice("modality", MODALITIES),
        file=_name(read, "file"),
        data=read.array("data", check_name, most=1000),
        inputs=read.array("inputs", _tensor, least=1, most=64),
        outputs=read.array("outputs", _tensor, least=2, most=2),
    )


def _tolerance(value: object, where: str) -> Tolerance:
    read = Fields(value, where, BundleError, required=("logits", "routing"))
    return Tolerance(logits=read.number("logits", 0.0, 1.0), routing=read.number("routing", 0.0, 1.0))


def _gate(value: object, where: str) -> Gate:
    read = Fields(value, where, BundleError, required=("samples", "mark", "kept", "thresholds", "figures"))
    limits = read.value["thresholds"]
    if not isinstance(limits, dict) or len(limits) > 20:
        raise read.fail("thresholds", "an object of at most 20 numbers")
    thresholds = Fields(limits, f"{where}.thresholds", BundleError, required=list(limits))
    return Gate(
        samples=read.integer("samples", 1, 2**40),
        mark=read.choice("mark", MARKS),
        kept=read.texts("kept", most=10_000, each=256, distinct=True),
        thresholds={name: thresholds.number(name, 0.0, 1.0) for name in limits},
        figures=_figures(read),
    )


def _build_of_schema_2(value: object, where: str) -> Build:
    read = Fields(value, where, BundleError, required=("target", "profile", "workspace"))
    return _build({**read.value, "cpu": {"threads": None, "arena": True}}, where)


def _build(value: object, where: str) -> Build:
    read = Fields(value, where, BundleError, required=("target", "profile", "workspace", "cpu"))
    axes = read.value["profile"]
    if not isinstance(axes, dict) or len(axes) > 8:
        raise read.fail("profile", "an object of at most 8 axes")
    profile = Fields(axes, f"{where}.profile", BundleError, required=list(axes))
    return Build(
        target=None if read.value["target"] is None else read.text("target", most=32),
        profile={axis: _sizes(profile, axis) for axis in axes},
        workspace=None if read.value["workspace"] is None else read.integer("workspace", 1, 2**20),
        cpu=_cpu(read.value["cpu"], f"{where}.cpu"),
    )


def _cpu(value: object, where: str) -> Cpu:
    read = Fields(value, where, BundleError, required=("threads", "arena"))
    threads = None if read.value["threads"] is None else read.integer("threads", 1, MAX_THREADS)
    return Cpu(threads=threads, arena=read.boolean("arena"))


def _sizes(read: Fields, axis: str) -> tuple[int, int, int]:
    least, best, greatest = (int(size) for size in read.numbers(axis, 3, 1, 2**31))
    if not _AXIS.fullmatch(axis) or [least, best, greatest] != read.value[axis] or not least <= best <= greatest:
        raise read.fail(axis, "the name of an axis and its [least, best, greatest] size")
    return least, best, greatest


def _tensor(value: object, where: str) -> TensorSpec:
    read = Fields(value, where, BundleError, required=("name", "dtype", "shape", "range"))
    return TensorSpec(
        name=read.text("name", most=128),
        dtype=read.choice("dtype", DTYPES),
        shape=read.array("shape", _axis, most=8),
        range=read.maybe("range", lambda _, __: _range(read)),
    )


def _axis(value: object, where: str) -> int | str:
    if isinstance(value, str) and _AXIS.fullmatch(value):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 2**31:
        return value
    raise BundleError(where, received=shown(value), expected="a size of at least 1 or the name of an axis")


def _range(read: Fields) -> tuple[float, float]:
    low, high = read.numbers("range", 2)
    if low > high:
        raise read.fail("range", "[least, greatest]")
    return low, high


def _routing(value: object, where: str) -> Routing:
    read = Fields(value, where, BundleError, required=("layers", "experts", "top_k"))
    experts = read.integer("experts", 1, 1_000_000)
    top_k = None if read.value["top_k"] is None else read.integer("top_k", 1, experts)
    return Routing(layers=read.integer("layers", 1, 10_000), experts=experts, top_k=top_k)


def _golden(value: object, where: str) -> Golden:
    read = Fields(value, where, BundleError, required=("samples", "inputs", "outputs"))
    return Golden(samples=_name(read, "samples"), inputs=_name(read, "inputs"), outputs=_name(read, "outputs"))


def _parity(value: object, where: str) -> Parity:
    read = Fields(value, where, BundleError, required=("report", "figures"))
    return Parity(report=read.maybe("report", check_name), figures=_figures(read))


def _figures(read: Fields) -> dict[str, float | str | bool]:
    figures = read.value["figures"]
    if not isinstance(figures, dict) or len(figures) > 200:
        raise read.fail("figures", "an object of at most 200 figures")
    for key, figure in figures.items():
        plain = isinstance(figure, bool | int | float) or (isinstance(figure, str) and len(figure) <= 1000)
        if len(key) > 100 or not plain:
            raise BundleError(
                f"{read.where}.figures[{shown(key)}]",
                received=shown(figure),
                expected="a number, true, false or a short string",
            )
    return figures


def _files(value: object, where: str) -> dict[str, FileEntry]:
    if not isinstance(value, dict) or not 1 <= len(value) <= MAX_FILES:
        raise BundleError(where, received=shown(value), expected=f"an object of 1 to {MAX_FILES:,} files")
    entries: dict[str, FileEntry] = {}
    for name, item in value.items():
        check_name(name, where)
        read = Fields(item, f"{where}[{name!r}]", BundleError, required=("sha256", "bytes"))
        digest = read.value["sha256"]
        if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
            raise read.fail("sha256", "64 hexadecimal digits in lower case")
        entries[name] = FileEntry(sha256=digest, bytes=read.integer("bytes", 0, MAX_FILE_BYTES))
    return entries


def _name(read: Fields, key: str) -> str:
    return check_name(read.value[key], f"{read.where}.{key}")


def check_name(name: object, where: str) -> str:
    """A file's name in a bundle: a relative path, in ``/`` notation, that stays inside the folder on every system.

    Raises:
        BundleError: absolute, with ``..``, with characters that some file system does not take, too long, the
        manifest's own.
    """
    parts = name.split("/") if isinstance(name, str) and len(name) <= 512 else []
    if not 1 <= len(parts) <= 8 or not all(_SAFE_PART.fullmatch(part) for part in parts) or name == MANIFEST:
        raise BundleError(
            where,
            received=shown(name),
            expected="the relative path of a file inside the bundle (letters, digits, _ . + -)",
        )
    return str(name)


def _check_consistent(manifest: Manifest, where: str) -> None:
    """What no single field can say: that the parts fit each other."""
    if (manifest.text is None) != (manifest.tokenizer is None):
        raise BundleError(f"{where}.preprocess", received="text or tokenizer alone", expected="both, or null for both")
    modalities = (manifest.main, *manifest.complementary)
    prepared = [name for name in MODALITIES if getattr(manifest, name) is not None]
    if sorted(modalities) != sorted(prepared):
        raise BundleError(
            f"{where}.modalities",
            received=", ".join(modalities),
            expected=f"those that preprocess prepares, once each: {', '.join(prepared) or 'none'}",
        )
    if not set(manifest.missing) <= set(manifest.complementary):
        raise BundleError(
            f"{where}.preprocess.missing",
            received=", ".join(manifest.missing),
            expected=f"some of the complementary modalities: {', '.join(manifest.complementary) or 'none'}",
        )
    names = [graph.name for graph in manifest.graphs]
    if len(set(names)) != len(names):
        raise BundleError(f"{where}.graphs", received="one name twice", expected="every graph's own name")
    for i, graph in enumerate(manifest.graphs):
        _check_graph(graph, manifest, f"{where}.graphs[{i}]")
    golden = manifest.golden
    named = [golden.samples, golden.inputs, golden.outputs]
    named += [name for graph in manifest.graphs for name in graph.files]
    named += [name for name in (manifest.tokenizer, manifest.parity.report) if name is not None]
    for name in named:
        if name not in manifest.files:
            raise BundleError(f"{where}.files: {name!r} is used and not listed", todo=AGAIN)
    if manifest.tokenizer is not None and manifest.files[manifest.tokenizer].bytes > MAX_TOKENIZER_BYTES:
        raise BundleError(
            f"{where}.files: the tokenizer is too large", expected=f"{MAX_TOKENIZER_BYTES:,} bytes at most"
        )


def _check_graph(graph: Graph, manifest: Manifest, where: str) -> None:
    """A graph reads what preprocessing makes, and says what the task and the routing promise."""
    promised: Tensors = {"logits": ("float32", ("batch", len(manifest.task.labels)))}
    if manifest.routing is not None:
        promised["routing"] = ("float32", ("batch", manifest.routing.layers, manifest.routing.experts))
    if graph.parts:
        _check_parts(graph, manifest, where)
    else:
        _check_tensors(graph.inputs, manifest.tensors, f"{where}.inputs")
    _check_tensors(graph.outputs, promised, f"{where}.outputs")
    missing = sorted(set(promised) - {tensor.name for tensor in graph.outputs})
    if missing:
        raise BundleError(f"{where}.outputs", received=f"no {missing[0]}", expected=", ".join(promised))


def _check_parts(graph: Graph, manifest: Manifest, where: str) -> None:
    """One part for each complementary modality, which reads that alone; the main file reads the rest and their rows."""
    modalities = tuple(part.modality for part in graph.parts)
    if modalities != manifest.complementary:
        raise BundleError(
            f"{where}.parts", received=", ".join(modalities), expected=f"{', '.join(manifest.complementary)}, or none"
        )
    if graph.runs_on != "onnxruntime":
        raise BundleError(f"{where}.runs_on", received=graph.runs_on, expected="onnxruntime for a graph in parts")
    files = [graph.file, *(part.file for part in graph.parts)]
    if len(set(files)) != len(files):
        raise BundleError(f"{where}.parts", received="one file twice", expected="a file of its own for each")
    read = manifest.tensors_of(manifest.main)
    for i, part in enumerate(graph.parts):
        at = f"{where}.parts[{i}]"
        _check_tensors(part.inputs, manifest.tensors_of(part.modality), f"{at}.inputs")
        widths = {spec.name: spec.shape[-1] for spec in part.outputs}
        names = (y_name(part.modality), conditions_name(part.modality))
        if tuple(spec.name for spec in part.outputs) != names:
            raise BundleError(f"{at}.outputs", received=", ".join(widths), expected=" and ".join(names))
        for spec in part.outputs:
            if (
                len(spec.shape) != 2
                or spec.shape[0] != "batch"
                or spec.dtype != "float32"
                or isinstance(spec.shape[1], str)
            ):
                raise BundleError(f"{at}.outputs: {spec.name}", received=spec.form, expected="float32 (batch, a size)")
        read |= {names[1]: ("float32", ("batch", widths[names[1]]))}
    _check_tensors(graph.inputs, read, f"{where}.inputs")
    unread = sorted({conditions_name(name) for name in modalities} - {spec.name for spec in graph.inputs})
    if unread:
        raise BundleError(f"{where}.inputs", received=f"no {unread[0]}", expected=", ".join(read))


def _check_tensors(tensors: tuple[TensorSpec, ...], known: Tensors, where: str) -> None:
    names = [tensor.name for tensor in tensors]
    if len(set(names)) != len(names):
        raise BundleError(where, received="one name twice", expected="every name once")
    for tensor in tensors:
        if tensor.name not in known:
            raise BundleError(where, received=shown(tensor.name), expected=", ".join(known))
        dtype, shape = known[tensor.name]
        if (tensor.dtype, tensor.shape) != (dtype, shape):
            raise BundleError(
                f"{where}: {tensor.name}",
                received=tensor.form,
                expected=TensorSpec(tensor.name, dtype, shape).form,
            )
