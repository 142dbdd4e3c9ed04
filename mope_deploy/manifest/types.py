"""``manifest.json``: its schema as types, limits included. docs/bundle.md describes each field.

:mod:`mope_deploy.manifest.read` makes them of a file's text; ``consistent.py`` checks what no type can say.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from msgspec import Meta

from mope_deploy.fields import FieldError, Number, between, check_distinct, choice, form, length, line, shown, text
from mope_deploy.limits import MAX_FILE_BYTES, MAX_THREADS
from mope_deploy.preprocess import MODALITIES, AudioSpec, ImageSpec, Tensors, TextSpec, VideoSpec, tensors_of
from mope_deploy.task import MultiLabel, SingleLabel

FORMAT = "mope-bundle"
SCHEMA = 4
MANIFEST = "manifest.json"

DTYPES = ("float32", "float16", "int64", "int32", "int8", "uint8", "bool")
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int8-dynamic")

# A relative path in "/" notation, at most 8 folders deep, that stays inside the folder on every file system: no part is
# "." or "..". The manifest itself is none of its files.
_PART = r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,127}"
_PATH = rf"(?!{re.escape(MANIFEST)}\Z)(?=.{{1,512}}\Z){_PART}(?:/{_PART}){{0,7}}"

FileName = Annotated[str, form(_PATH, "the relative path of a file inside the bundle (letters, digits, _ . + -)")]
Digest = Annotated[str, form("[0-9a-f]{64}", "64 hexadecimal digits in lower case")]
Key = Annotated[str, line(100)]
Share = Annotated[float, between(0, 1)]
Size = Annotated[int, between(1, 2**31)]
AxisName = Annotated[str, form(r"[a-z][a-z0-9_]{0,62}", "the name of an axis")]
Axis = Annotated[Size | AxisName, Meta(description="a size of at least 1 or the name of an axis")]
Modality = Annotated[str, choice(*MODALITIES)]
Figure = Annotated[
    bool | int | float | Annotated[str, line(1000)], Meta(description="a number, true, false or a short string")
]
Figures = Annotated[Mapping[Key, Figure], length(0, 200)]


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a graph.

    Args:
        name: as in the graph.
        dtype: numpy's name, one of :data:`DTYPES`.
        shape: sizes, or names of axes that vary: ``("batch", 3, 224, 224)``.
        range: least and greatest value that occurs, if that is known.
    """

    name: Annotated[str, text(128)]
    dtype: Annotated[str, choice(*DTYPES)]
    shape: Annotated[tuple[Axis, ...], length(0, 8)]
    range: tuple[Number, Number] | None = None

    def __post_init__(self) -> None:
        if self.range is not None and self.range[0] > self.range[1]:
            raise FieldError("range", received=list(self.range), expected="[least, greatest]")

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

    logits: Share
    routing: Share


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

    samples: Annotated[int, between(1, 2**40)]
    mark: Annotated[str, choice("", "CPU", "emulated")]
    kept: Annotated[tuple[Annotated[str, text(256)], ...], length(0, 10_000)]
    thresholds: Annotated[Mapping[str, Share], length(0, 20)]
    figures: Figures

    def __post_init__(self) -> None:
        check_distinct("kept", self.kept)


@dataclass(frozen=True)
class Cpu:
    """How a session on the CPU is set up unless the device says otherwise.

    Args:
        threads: of one operator; None for as many as the process may use cores.
        arena: whether the session keeps the memory it once had, in an arena, for its next run.
    """

    threads: Annotated[int, between(1, MAX_THREADS)] | None = None
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

    target: Annotated[str, text(32)] | None = None
    profile: Annotated[Mapping[AxisName, tuple[Size, Size, Size]], length(0, 8)] = field(default_factory=dict)
    workspace: Annotated[int, between(1, 2**20)] | None = None
    cpu: Cpu = Cpu()

    def __post_init__(self) -> None:
        for axis, sizes in self.profile.items():
            if list(sizes) != sorted(sizes):
                raise FieldError(f"profile.{axis}", received=list(sizes), expected="[least, best, greatest]")


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

    modality: Modality
    file: FileName
    data: Annotated[tuple[FileName, ...], length(0, 1000)]
    inputs: Annotated[tuple[TensorSpec, ...], length(1, 64)]
    outputs: Annotated[tuple[TensorSpec, ...], length(2, 2)]


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

    name: Annotated[str, text(64)]
    file: FileName
    data: Annotated[tuple[FileName, ...], length(0, 1000)]
    precision: Annotated[str, choice(*PRECISIONS)]
    opset: Annotated[int, between(1, 1000)]
    ir_version: Annotated[int, between(1, 1000)]
    runs_on: Annotated[str, choice("any", "onnxruntime", "tensorrt")]
    inputs: Annotated[tuple[TensorSpec, ...], length(1, 64)]
    outputs: Annotated[tuple[TensorSpec, ...], length(1, 64)]
    tolerance: Tolerance
    gate: Gate | None
    parts: Annotated[tuple[Part, ...], length(0, len(MODALITIES))] = ()

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
class Routing:
    """Shape of the ``routing`` output (B, layers, experts); ``top_k`` is None for dense routing."""

    layers: Annotated[int, between(1, 10_000)]
    experts: Annotated[int, between(1, 1_000_000)]
    top_k: int | None

    def __post_init__(self) -> None:
        if self.top_k is not None and not 1 <= self.top_k <= self.experts:
            raise FieldError("top_k", received=shown(self.top_k), expected=f"an integer from 1 to {self.experts:,}")


@dataclass(frozen=True)
class Golden:
    """Inputs whose outputs are known.

    Args:
        samples: JSONL as mope_deploy.data reads it; the files it names are in the bundle too: PNG, FLAC, .npz.
        inputs: .npz, the same samples as one batch of input arrays.
        outputs: .npz, ``logits`` and, where the graph has it, ``routing``; the eager float32 model's.
    """

    samples: FileName
    inputs: FileName
    outputs: FileName


@dataclass(frozen=True)
class Parity:
    """Result of the export gate: the file of its report, and the figures worth showing."""

    report: FileName | None
    figures: Figures


@dataclass(frozen=True)
class FileEntry:
    """What one file of a bundle must be."""

    sha256: Digest
    bytes: Annotated[int, between(0, MAX_FILE_BYTES)]


@dataclass(frozen=True)
class Manifest:
    """``manifest.json``, checked. Field by field in docs/bundle.md."""

    schema: int
    name: str
    created: str
    versions: Mapping[str, str]
    task: SingleLabel | MultiLabel
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
    def modalities(self) -> tuple[str, ...]:
        """What the model reads, the main modality first."""
        return (self.main, *self.complementary)

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
