"""Every graph of a bundle, each through its gate: the canonical one in fp32, those of lower precision, a fused one.

fp32 graphs compute what the eager model computes, to rounding (:mod:`export.gate.parity`). Graphs of lower precision
are made from the canonical one, judged by what they decide (:mod:`export.gate.measure`) and repaired where they fail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from export.gate import (
    THRESHOLDS,
    Evaluation,
    Final,
    ParityGate,
    ParityReport,
    PrecisionReport,
    Thresholds,
    hashes,
    measure_precision,
    require_parity,
)
from export.graph.exporter_config import MoPEExporterConfig, exporter_config
from export.graph.files import save
from export.graph.fused import attention_layers, fuse, routers
from export.graph.split import PartFile
from export.graph.static import to_static
from export.graph.to_onnx import drop_routing, trace
from export.options import Options
from export.precision import lowering
from export.precision.check import DYNAMIC_OPS, HALVES
from export.precision.half import write_emulated
from export.precision.repair import Lowered, lower_within_gate
from export.precision.samples import calibration_feeds
from export.rows import Rows, choose_rows
from mope_deploy.data import Sample
from mope_deploy.engines.onnxruntime.cpu import CpuSettings, cpu_settings
from mope_deploy.errors import ExportError
from mope_deploy.manifest import Cpu
from mope_deploy.model import MoPE

__all__ = ["Variant", "Work", "make_variants"]


@dataclass(frozen=True, kw_only=True)
class Work:
    """What an export works on and with.

    Attributes:
        model: the reference; stays as it is.
        options: what was asked for.
        folder: where files go.
        samples: of ``data``, for the parity gate and the golden samples.
        data: JSONL of real samples to compare on.
        calibration: JSONL of real samples that int8 reads its ranges from.
        on_step: called with a few words before each step.
        on_report: called with each report on fp32 and the last one on each lower precision, passed or not.
        on_notice: called with what a user should see as it happens, a line each.
    """

    model: MoPE
    options: Options
    folder: Path
    samples: Sequence[Sample]
    data: Path
    calibration: Path
    on_step: Callable[[str], None]
    on_report: Callable[[ParityReport | PrecisionReport], None]
    on_notice: Callable[[str], None] = lambda _: None
    told: list[str] = field(default_factory=list)  # of that

    @cached_property
    def cpu(self) -> CpuSettings:
        """How a device sets its sessions up; the gates and the timing do so too."""
        return cpu_settings(Cpu(threads=self.options.cpu_threads, arena=self.options.cpu_arena))

    @cached_property
    def parity(self) -> ParityGate:
        """The gate for fp32."""
        return ParityGate(
            self.model,
            self.final,
            self.samples,
            seed=self.options.seed,
            cpu=self.cpu,
            on_step=self.on_step,
            on_report=self.on_report,
        )

    @cached_property
    def evaluation(self) -> Evaluation:
        """What lower precisions are judged on."""
        return Evaluation(self.model, self.rows.judged, on_step=self.on_step, cpu=self.cpu)

    @cached_property
    def rows(self) -> Rows:
        """Rows of real samples for lower precisions."""
        options = self.options
        return choose_rows(
            self.model,
            self.data,
            self.calibration,
            judged=options.gate_samples,
            calibrated=options.calibration_samples if "int8" in options.precisions else 0,
            seed=options.seed,
            skip_bad=options.skip_bad,
        )

    def feeds(self) -> Iterator[dict[str, NDArray[Any]]]:
        """Input arrays to calibrate on, of no row that is judged; where nothing is calibrated, to rank layers on."""
        rows = self.rows
        if "int8" not in self.options.precisions:  # a ranking fits no number to them: judged rows serve as well
            rows = replace(rows, calibration=rows.judged[: self.options.calibration_samples])
        return calibration_feeds(
            self.model, rows, skip_bad=self.options.skip_bad, on_notice=self.notify, where=self.calibration
        )

    def notify(self, text: str) -> None:
        """``on_notice``, once for each text."""
        if text not in self.told:
            self.told.append(text)
            self.on_notice(text)

    def asked(self, precision: str) -> Thresholds:
        """What a graph of a lower precision has to reach."""
        return replace(THRESHOLDS[precision], **self.options.thresholds)

    @cached_property
    def routed(self) -> MoPEExporterConfig:
        """The graph as it is judged: which experts a file chooses cannot be seen without the output ``routing``."""
        return exporter_config(self.model)

    @cached_property
    def final(self) -> MoPEExporterConfig:
        """The graph as it was asked for."""
        return exporter_config(self.model, routing_output=self.options.routing)

    @property
    def hides_routing(self) -> bool:
        """Whether that output is dropped in the end."""
        return len(self.final.outputs) < len(self.routed.outputs)


@dataclass(frozen=True)
class Variant:
    """One graph of the bundle, judged.

    Attributes:
        name: ``"model"`` for fp32, ``"model-fused"``, ``"model-int8"``, …
        precision: of :data:`mope_deploy.manifest.PRECISIONS`.
        runs_on: ``"any"``, or the one engine that takes it.
        files: the ONNX file and, where they are apart, its weights.
        runnable: what ONNX Runtime's CPU provider computes as a device would: the file itself or, for fp16 and bf16, an
            emulation.
        judged: the precision gate's report; None where only fp32 was asked for and nothing else had to be judged.
        lowered: how a lower precision got through; None for fp32, which passed the parity gate.
        unfit: products that its precision cannot hold, and which therefore stayed fp32.
        parts: of a graph in several files those beside the main one, which ``files`` then are; ``runnable`` is whole.
        split_error: how far the files' outputs are from those of the whole graph, max|a − b| / max|b|; 0 for one file.
        compared: of fp32 the hashes of the files that passed the parity gate; empty where it is yet to judge.
        reference: of lower precisions the file that passed the gate, whole and with its output ``routing``.
        final: the judgement of these very files, made last (:mod:`export.final`).
    """

    name: str
    precision: str
    runs_on: str
    files: tuple[Path, ...]
    runnable: Path
    judged: PrecisionReport | None
    lowered: Lowered | None
    unfit: tuple[str, ...] = ()
    parts: tuple[PartFile, ...] = ()
    split_error: float = 0.0
    compared: Mapping[str, str] = field(default_factory=dict)
    reference: Path | None = None
    final: Final | None = None

    @property
    def all_files(self) -> tuple[Path, ...]:
        """With those of its parts."""
        return tuple(dict.fromkeys((*self.files, *(file for part in self.parts for file in part.files))))

    @property
    def part_files(self) -> tuple[Path, ...]:
        """The ONNX file of each part."""
        return tuple(part.files[0] for part in self.parts)

    @property
    def kept(self) -> tuple[str, ...]:
        """Everything of the encoders' layers that stayed fp32 although a lower precision was asked for."""
        return tuple(dict.fromkeys((*self.unfit, *(self.lowered.kept if self.lowered is not None else ()))))

    def explain(self) -> str:
        """What stayed fp32, and why, in one line; empty if nothing did."""
        parts = [self.lowered.explain()] if self.lowered is not None else []
        if self.unfit:
            parts.append(f"kept in fp32: {', '.join(self.unfit)}, whose weights {self.precision} cannot hold")
        return "; ".join(filter(None, parts))


def make_variants(work: Work) -> list[Variant]:
    """Make what was asked for, in the order of its precisions, the fused one last.

    What others are made of is judged here, and lower precisions; the files as they are packed by :mod:`export.final`.

    Raises:
        ExportError: a graph cannot be made.
        ParityError: a graph is not the model, and cannot be repaired.
    """
    options = work.options
    if options.precisions != ("fp32",):
        work.evaluation  # noqa: B018  # too few rows, or a label that is none, are said before anything is traced
    canonical, found = _canonical(work)
    made = [found if precision == "fp32" else _lowered(work, canonical, precision) for precision in options.precisions]
    return [*made, _fused(work, found)] if options.fuse else made


def _canonical(work: Work) -> tuple[Path, Variant]:
    """The graph that all others are made from, with its output ``routing``; and the fp32 one, maybe without."""
    work.on_step("rewriting the routing and tracing the graph")
    hidden, external = work.hides_routing, work.options.fuse
    graph = trace(to_static(work.model, fold=work.options.fold), work.routed, opset=work.options.opset)
    source = final = work.folder / ("model-with-routing.onnx" if hidden else "model.onnx")
    files = save(graph, source, external=external and not hidden)
    compared = hashes(files)
    require_parity(work.parity.compare(source.stem, source, work.routed))
    judged = None
    if "fp32" in work.options.precisions:
        if hidden:
            drop_routing(graph)
            final = work.folder / "model.onnx"
            files, compared = save(graph, final, external=external), {}
        if work.options.precisions != ("fp32",):
            judged = measure_precision(
                work.evaluation, source, work.routed, precision="fp32", thresholds=THRESHOLDS["fp32"]
            )
    return source, Variant("model", "fp32", "any", tuple(files), final, judged, None, compared=compared)


def _lowered(work: Work, source: Path, precision: str) -> Variant:
    """One lower precision, judged with its routing in sight; without that output afterwards if none was asked for."""
    folder, name = work.folder, f"model.{precision}.onnx"
    lower = lowering(
        source,
        precision,
        calibration=work.feeds() if precision == "int8" else None,
        method=work.options.calibration_method,
        on_step=work.on_step,
    )
    thresholds = work.asked(precision)

    def judge(file: Path) -> PrecisionReport:
        mark = lower.runtime_mark
        return measure_precision(
            work.evaluation, file, work.routed, precision=precision, thresholds=thresholds, mark=mark
        )

    work.on_step(f"lowering to {precision}")
    for kind in ("lowered", "judged", "runnable"):
        (folder / kind).mkdir(exist_ok=True)
    done = lower_within_gate(
        lower,
        judge,
        folder / "lowered",
        name,
        feeds=work.feeds,
        minutes=work.options.repair_minutes,
        on_step=work.on_step,
        on_notice=work.notify,
    )
    work.on_report(done.report)
    files, reference = done.files, done.files[0]
    if done.report.mark == "emulated":
        reference, *_ = copy = lower.write_runnable(folder / "judged" / name, keep=done.kept)
        if hashes(copy) != done.sha256:
            raise ExportError(f"{name} was written twice and differs", expected="the file that was judged")
    if work.hides_routing:
        files = tuple(_without_routing(files[0], folder / name, lower.runs_on))
    runnable = files[0]
    if precision in HALVES:
        runnable = write_emulated(files[0], precision, folder / "runnable" / name)
    return Variant(
        f"model-{precision}",
        precision,
        lower.runs_on,
        tuple(files),
        runnable,
        done.report,
        done,
        lower.unfit,
        reference=reference,
    )


def _without_routing(file: Path, path: Path, runs_on: str) -> list[Path]:
    """A saved graph without its output ``routing``, and without weights that nothing else reads, at ``path``."""
    graph = ir.from_proto(onnx.load(file))
    drop_routing(graph)
    return save(graph, path, extra_ops=DYNAMIC_OPS if runs_on == "onnxruntime" else ())


def _fused(work: Work, plain: Variant) -> Variant:
    """The fp32 graph in ONNX Runtime's own operators, which shares its weights."""
    work.on_step("fusing for ONNX Runtime")
    fused = work.folder / "model.fused.onnx"
    fuse(plain.files[0], fused, layers=attention_layers(work.model), routers=routers(work.model))
    return Variant("model-fused", "fp32", "onnxruntime", (fused, *plain.files[1:]), fused, plain.judged, None)
