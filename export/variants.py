"""Every graph of a bundle, each through its gate: the canonical one in fp32, a fused one, those of lower precision.

fp32 graphs compute what the eager model computes, to rounding (export.gate.parity). Graphs of lower precision are made from
the canonical one, judged by what they decide (export.gate) and repaired where they fail (export.precision.repair).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from export.gate import (
    THRESHOLDS,
    Evaluation,
    PrecisionReport,
    Thresholds,
    measure_precision,
    require_precision,
)
from export.gate.cases import Case, generated_cases, sample_cases
from export.gate.parity import measure
from export.gate.parity_report import ParityReport, require_parity
from export.gate.reference import Reference, largest_difference
from export.gate.session import cpu_session, run_graph
from export.graph.exporter_config import MoPEExporterConfig, exporter_config
from export.graph.files import save
from export.graph.fused import attention_layers, fuse, routers
from export.graph.split import PartFile, SplitGraph, part_inputs, split
from export.graph.static import to_static
from export.graph.to_onnx import drop_routing, trace
from export.options import Options
from export.precision import Lowering, lowering
from export.precision.check import DYNAMIC_OPS
from export.precision.repair import Lowered, lower_within_gate
from mope_deploy.data import Sample
from mope_deploy.model import MoPE

__all__ = ["ParityGate", "Variant", "judge_again", "make_variants"]

Feeds = Mapping[str, NDArray[Any]]


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


class ParityGate:
    """The gate for fp32, with its batches and the model's own outputs for them, which every graph is compared with.

    Args:
        model: the reference.
        config: of the canonical graph.
        samples: real ones to compare on, beside generated batches.
        seed: of the generated batches.
        on_step: called with a few words before each batch.
        on_report: called with each report, passed or not.

    Attributes:
        reports: what was found, by the graph's name.
    """

    def __init__(
        self,
        model: MoPE,
        config: MoPEExporterConfig,
        samples: Sequence[Sample],
        *,
        seed: int,
        on_step: Callable[[str], None],
        on_report: Callable[[ParityReport], None] = lambda _: None,
    ) -> None:
        self.reference = Reference(model)
        self.cases = [*generated_cases(config.graph, seed=seed), *sample_cases(model.preprocessing, samples)]
        self.on_step, self.on_report = on_step, on_report
        self.reports: dict[str, ParityReport] = {}

    def compare(self, name: str, file: Path, config: MoPEExporterConfig, parts: Sequence[Path] = ()) -> ParityReport:
        """Compare one file, or the ``parts`` and the main file of a graph, with the model and keep the report."""
        shown = self._shown(file.name)
        report = measure(self.reference.model, file, config, shown, reference=self.reference, parts=parts)
        self.reports[name] = report
        self.on_report(report)
        return report

    def _shown(self, name: str) -> Iterator[Case]:
        for i, case in enumerate(self.cases, 1):
            self.on_step(f"comparing {name} with the model (batch {i} of {len(self.cases)})")
            yield case


def make_variants(
    model: MoPE,
    options: Options,
    folder: Path,
    gate: ParityGate,
    *,
    evaluation: Evaluation | None,
    calibration: Callable[[], Iterator[Feeds]],
    on_step: Callable[[str], None],
    on_report: Callable[[PrecisionReport], None],
) -> list[Variant]:
    """Make and judge what ``options`` ask for, in the order of ``options.precisions``, the fused one last.

    Args:
        model: the reference; stays as it is.
        options: which graphs.
        folder: where the files go.
        gate: for fp32.
        evaluation: what lower precisions are judged on; None if fp32 is all that was asked for.
        calibration: gives input arrays of real samples, for the ranges of int8's activations.
        on_step: called with a few words before each step.
        on_report: called with the last report on each lower precision, passed or not.

    Raises:
        ExportError: a graph cannot be made.
        ParityError: a graph is not the model, and cannot be repaired.
    """
    routed = exporter_config(model)
    config = exporter_config(model, routing_output=options.routing)
    # Which experts a file chooses cannot be seen without that output: judged first, then dropped.
    hidden = len(config.outputs) < len(routed.outputs)
    on_step("rewriting the routing and tracing the graph")
    graph = trace(to_static(model, fold=options.fold), routed, opset=options.opset)
    source = folder / ("model-with-routing.onnx" if hidden else "model.onnx")
    files = save(graph, source, external=options.fuse and not hidden)
    require_parity(gate.compare(source.stem, source, routed))
    made: dict[str, Variant] = {}
    if "fp32" in options.precisions:
        if hidden:
            drop_routing(graph)
            files = save(graph, folder / "model.onnx", external=options.fuse)
            require_parity(gate.compare("model", folder / "model.onnx", config))
        judged = None
        if evaluation is not None:
            judged = measure_precision(evaluation, source, routed, precision="fp32", thresholds=THRESHOLDS["fp32"])
        made["fp32"] = Variant("model", "fp32", "any", tuple(files), files[0], judged, None)
    for precision in options.precisions:
        if precision == "fp32":
            continue
        assert evaluation is not None
        lower = lowering(
            source,
            precision,
            calibration=calibration() if precision == "int8" else None,
            method=options.calibration_method,
            on_step=on_step,
        )
        made[precision] = _lowered(
            lower,
            folder,
            evaluation,
            routed,
            thresholds=replace(THRESHOLDS[precision], **options.thresholds),
            hidden=hidden,
            on_step=on_step,
            on_report=on_report,
        )
    ordered = [made[precision] for precision in options.precisions]
    if options.fuse:
        on_step("fusing for ONNX Runtime")
        fused = folder / "model.fused.onnx"
        fuse(folder / "model.onnx", fused, layers=attention_layers(model), routers=routers(model))
        require_parity(gate.compare("model-fused", fused, config))
        shared = made["fp32"].files[1:]
        ordered.append(
            Variant("model-fused", "fp32", "onnxruntime", (fused, *shared), fused, made["fp32"].judged, None)
        )
    return _in_parts(model, options, ordered, gate, config, evaluation, on_step) if options.split else ordered


def _in_parts(
    model: MoPE,
    options: Options,
    variants: Sequence[Variant],
    gate: ParityGate,
    config: MoPEExporterConfig,
    evaluation: Evaluation | None,
    on_step: Callable[[str], None],
) -> list[Variant]:
    """Every graph as a part for each complementary modality and a main file, which together compute the same.

    fp32 passes the parity gate anew. Lower precisions give the whole graph's outputs to the last bit, or else pass
    their own gate anew.
    """
    probes = [case.inputs for case in gate.cases if case.source == "generated"][:3]  # two text lengths in any case
    cuts: dict[str, SplitGraph] = {}
    for variant in variants:
        on_step(f"cutting {variant.files[0].name}")
        whole = variant.files[0]
        cuts[variant.name] = split(
            whole,
            whole.parent / "split",
            part_inputs(model),
            probes,
            external=options.fuse and variant.name == "model",
            extra_ops=DYNAMIC_OPS if variant.precision == "int8-dynamic" else (),
            weights_of=(whole.with_name("model.onnx"), cuts["model"]) if variant.name == "model-fused" else None,
        )
    found = []
    for variant in variants:
        cut = cuts[variant.name]
        error = _difference(variant, cut, gate.cases, config)
        changes: dict[str, Any] = {}
        if variant.lowered is None:
            require_parity(gate.compare(variant.name, cut.main[0], config, cut.part_files))
        elif error > 0:
            assert evaluation is not None
            report = judge_again(
                evaluation,
                cut.main[0],
                config,
                precision=variant.precision,
                thresholds=replace(THRESHOLDS[variant.precision], **options.thresholds),
                parts=cut.part_files,
            )
            require_precision(report)
            changes = {"judged": report, "lowered": replace(variant.lowered, report=report)}
        found.append(
            replace(variant, files=cut.main, parts=cut.parts, runs_on="onnxruntime", split_error=error, **changes)
        )
    return found


def judge_again(
    evaluation: Evaluation,
    file: Path,
    config: MoPEExporterConfig,
    *,
    precision: str,
    thresholds: Thresholds,
    parts: Sequence[Path],
) -> PrecisionReport:
    """The precision gate on a final graph, whose routing may be out of sight."""
    return measure_precision(
        evaluation,
        file,
        config,
        precision=precision,
        thresholds=thresholds if "routing" in config.outputs else replace(thresholds, routing=None),
        mark="CPU" if precision == "fp16" else "",
        parts=parts,
    )


def _difference(variant: Variant, cut: SplitGraph, cases: Sequence[Case], config: MoPEExporterConfig) -> float:
    """max|a − b| / max|b| between a graph in parts and the whole one, over all batches and the worst output."""
    whole, parts = cpu_session(variant.files[0]), cpu_session(cut.main[0], cut.part_files)
    names = list(config.outputs)
    errors, scales = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for case in cases:
        sides = [
            run_graph(session, case.inputs, names, config=config, precision=variant.precision)
            for session in (parts, whole)
        ]
        for name in names:
            a, b = (side[name] for side in sides)
            errors[name] = max(errors[name], largest_difference(a, b))
            scales[name] = max(scales[name], float(np.abs(b).max(initial=0.0)))
    return max(errors[name] / scales[name] if scales[name] > 0 else errors[name] for name in names)


def _lowered(
    lower: Lowering,
    folder: Path,
    evaluation: Evaluation,
    routed: MoPEExporterConfig,
    *,
    thresholds: Thresholds,
    hidden: bool,
    on_step: Callable[[str], None],
    on_report: Callable[[PrecisionReport], None],
) -> Variant:
    """One lower precision, judged with its routing in sight; without that output afterwards if none was asked for."""
    precision = lower.precision

    def judge(file: Path, limit: int | None) -> PrecisionReport:
        return measure_precision(
            evaluation,
            file,
            routed,
            precision=precision,
            thresholds=thresholds,
            mark=lower.runtime_mark,
            limit=limit,
        )

    name = f"model.{precision}.onnx"
    on_step(f"lowering to {precision}")
    done = lower_within_gate(lower, judge, folder, name, on_step=on_step)
    on_report(done.report)
    files, runnable = list(done.files), done.files[0]
    if done.report.mark == "emulated":
        runnable = lower.write_runnable(folder / f"model.{precision}.runnable.onnx", keep=done.kept)[0]
    if hidden:
        files = _without_routing(files[0], lower.runs_on)
        runnable = _without_routing(runnable, lower.runs_on)[0] if runnable != files[0] else runnable
    return Variant(
        f"model-{precision}", precision, lower.runs_on, tuple(files), runnable, done.report, done, lower.unfit
    )


def _without_routing(file: Path, runs_on: str) -> list[Path]:
    """Take the output ``routing`` off a saved graph, and its weights that nothing else reads."""
    graph = ir.from_proto(onnx.load(file))
    drop_routing(graph)
    for path in file.parent.glob(f"{file.name}*"):
        path.unlink()
    return save(graph, file, extra_ops=DYNAMIC_OPS if runs_on == "onnxruntime" else ())
