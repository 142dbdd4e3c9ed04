"""From a trained model to a verified bundle: rewritten and traced → lowered → judged → packed.

Nothing is written to the target before every graph has passed its gate.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from export.checks import check_device, check_sizes, check_split, check_target
from export.final import judge_final
from export.gate import ParityReport, PrecisionReport, check_judged
from export.gate.cases import rows_needed
from export.limits import CALIBRATION_SAMPLES, DEFAULT_OPSET, GATE_SAMPLES
from export.options import Options
from export.pack.contents import contents_of
from export.pack.engines import EngineOptions, ExportedEngine, check_engine_options, export_engines
from export.pack.golden import pick_samples
from export.pack.place import claimed, place
from export.pack.summary import Row, summarise
from export.parts import in_parts
from export.source import find_source
from export.variants import Variant, Work, make_variants
from mope_deploy.bundle import Bundle, write_bundle
from mope_deploy.errors import UsageError
from mope_deploy.model import MoPE
from mope_deploy.targets import get_target

__all__ = ["Exported", "export_bundle", "export_model"]


@dataclass(frozen=True)
class Exported:
    """A finished export.

    Attributes:
        bundle: as written and opened again.
        reports: the parity gate's report on each fp32 graph, by the graph's name.
        rows: what can be said of each graph and each engine in one line.
    """

    bundle: Bundle
    reports: dict[str, ParityReport]
    rows: tuple[Row, ...]


def export_bundle(
    model: MoPE | str | Path,
    target: str | Path,
    *,
    data: str | Path | None = None,
    name: str | None = None,
    precisions: Sequence[str] = ("fp32",),
    opset: int = DEFAULT_OPSET,
    fold: str = "auto",
    fuse: bool = False,
    routing: bool = True,
    samples: int | None = None,
    gate_samples: int = GATE_SAMPLES,
    calibration: str | Path | None = None,
    calibration_samples: int = CALIBRATION_SAMPLES,
    overwrite: bool = False,
    seed: int = 0,
    split: bool = False,
    cpu_threads: int | None = None,
    cpu_arena: bool = True,
) -> Path:
    """Export a trained model to a bundle of ONNX graphs, or to nothing: what ``mope-export`` does, from Python.

    Args:
        model: a model, a run folder, a checkpoint folder or a hub id. It stays as it is.
        target: the folder to make.
        data: JSONL of real samples; a run folder brings its own.
        name: what the bundle calls itself; default: the run's name.
        calibration: JSONL of real samples that int8 reads its ranges from; default: the run's training split.
        precisions, opset, …: as :class:`export.options.Options` describes them.

    Returns:
        The bundle's folder.

    Raises:
        UsageError: an argument cannot be used, or there is no data.
        DataError: a sample cannot be used.
        CheckpointError: the model cannot be loaded.
        ExportError: the model cannot be exported.
        ParityError: the exported file does not compute what the model computes.
        BundleError: the bundle cannot be written.
    """
    options = Options(
        name=name or "mope",
        opset=opset,
        fold=fold,
        fuse=fuse,
        routing=routing,
        samples=samples,
        overwrite=overwrite,
        seed=seed,
        precisions=tuple(precisions),
        gate_samples=gate_samples,
        calibration_samples=calibration_samples,
        split=split,
        cpu_threads=cpu_threads,
        cpu_arena=cpu_arena,
    )
    if isinstance(model, MoPE):
        if data is None:
            raise UsageError("a model comes without data to check the export on", todo="give data=…, a JSONL file")
        ranges = calibration or data
    else:
        source = find_source(model, data=data)
        options = replace(options, name=name or source.name, skip_bad=source.skip_bad)
        model, data, ranges = source.load(), source.data, calibration or source.calibration
    return export_model(model, Path(target), data=Path(data), calibration=Path(ranges), options=options).bundle.path


def export_model(
    model: MoPE,
    target: Path,
    *,
    data: Path,
    calibration: Path,
    options: Options,
    on_step: Callable[[str], None] = lambda _: None,
    on_report: Callable[[ParityReport | PrecisionReport], None] = lambda _: None,
    on_notice: Callable[[str], None] = lambda _: None,
    engines: EngineOptions | None = None,
) -> Exported:
    """:func:`export_bundle` on a loaded model.

    Args:
        model, target, data, calibration: as there.
        options: how to export.
        on_step: called with a few words before each step.
        on_report: called with each report of a gate, passed or not.
        on_notice: called with what a user should see as it happens, a line each.
        engines: how to build TensorRT engines into the bundle; None for a bundle without.
    """
    check_target(target, overwrite=options.overwrite)
    if engines is not None:
        device = get_target(options.target) if options.target is not None else None
        engines = check_engine_options(engines, options.precisions, device)
    check_sizes(model, options)
    check_split(model, options, engines=engines is not None)
    with claimed(target, overwrite=options.overwrite), tempfile.TemporaryDirectory(prefix="mope-export-") as folder:
        on_step("reading samples")
        samples = pick_samples(data, model, options.samples or rows_needed(len(model.task.labels)), seed=options.seed)
        work = Work(
            model=model,
            options=options,
            folder=Path(folder),
            samples=samples,
            data=data,
            calibration=calibration,
            on_step=on_step,
            on_report=on_report,
            on_notice=on_notice,
        )
        variants = make_variants(work)
        if options.split:
            variants = in_parts(work, variants)
        variants = [judge_final(work, variant) for variant in variants]
        check_device(options, [(variant.precision, (variant.files[0], *variant.part_files)) for variant in variants])
        return _pack(work, variants, target, engines)


def _pack(work: Work, variants: Sequence[Variant], target: Path, engines: EngineOptions | None) -> Exported:
    """Golden samples, reports, manifest, engines: everything in one folder, whole or not at all."""
    work.on_step("choosing golden samples")
    contents = contents_of(work, variants)
    files, manifest = contents.files, contents.manifest
    for variant in variants:
        check_judged(variant.final, variant.all_files)
    built: list[ExportedEngine] = []
    if engines is not None:
        without = write_bundle(work.folder / "bundle", files=files, manifest=manifest)
        built = export_engines(without, work.folder / "engines", engines, on_step=work.on_step)
        files |= {name: path for engine in built for name, path in engine.files.items()}
    work.on_step("timing each graph")
    rows = summarise(work, variants, built, contents.golden.inputs)
    work.on_step("writing the bundle")
    bundle = place(target, files=files, manifest=manifest, overwrite=work.options.overwrite)
    return Exported(bundle, work.parity.reports, tuple(rows))
