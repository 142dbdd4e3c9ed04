"""``mope-export RUN``: from a trained model to a bundle."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from export.checks import check_sizes, check_split, check_target
from export.cli.options import Data, GateSamples, Report, Run, Samples, Seed, Version, check_report, new_app, unset
from export.cli.plan import print_plan
from export.cli.show import load, print_rows, size, steps, write_report
from export.limits import (
    CALIBRATION_SAMPLES,
    DEFAULT_OPSET,
    FOLDS,
    FORMATS,
    GATE_SAMPLES,
    METHODS,
    OPSETS,
    REPAIR_MINUTES,
)
from export.options import Options, parse_list, parse_thresholds
from export.packages import require_packages
from export.source import Source, find_source
from mope_deploy.console import err, out
from mope_deploy.errors import UsageError
from mope_deploy.manifest import MANIFEST, PRECISIONS
from mope_deploy.targets import TARGETS, get_target

if TYPE_CHECKING:
    from export.gate import ParityReport, PrecisionReport
    from mope_deploy.bundle import Bundle

__all__ = ["export_app"]

BUNDLES = Path("bundles")

_HELP = """Export a trained model to a bundle that runs without PyTorch.

RUN is a run folder of python -m train, one of its checkpoints (RUN/best), or a checkpoint folder or hub id with --data.
The saved graph is compared with the trained model on generated and on real samples; if it does not compute the same,
there is no bundle and the exit code is 1.

\b
    mope-export runs/mine --format onnx --out bundles/mine
    mope-export runs/mine --format onnx,trt --precision fp32,fp16,int8
    mope-export check runs/mine bundles/mine

The last one repeats the comparison on a bundle's own files. A run folder that is called check is written ./check.
"""

export_app = new_app()


@export_app.command(help=_HELP)
def export(
    run: Run,
    format: Annotated[
        str,
        typer.Option(
            "--format",
            help="onnx; trt: also TensorRT engines, in the same bundle; triton: also a model repository for NVIDIA's "
            "Triton server, beside it. A list: onnx,trt.",
        ),
    ] = "onnx",
    precision: Annotated[
        str | None,
        unset(help=f"A list of: {', '.join(PRECISIONS)}. The first runs by default. Default: fp32, or the target's."),
    ] = None,
    device: Annotated[
        str | None, unset("--target", help=f"What it is for: {', '.join(TARGETS)}. Checks and presets.")
    ] = None,
    target: Annotated[
        Path | None,
        typer.Option("--out", metavar="BUNDLE", help="Folder to make; default: bundles/ and the run's name."),
    ] = None,
    data: Data = None,
    opset: Annotated[
        int | None,
        unset(help=f"Version of the ONNX operators, {OPSETS.start} to {OPSETS.stop - 1}. Default: {DEFAULT_OPSET}."),
    ] = None,
    fold: Annotated[
        str,
        typer.Option(
            metavar="HOW",
            help=f"How prompts enter the layers: {', '.join(FOLDS)}. auto counts what is cheapest (docs/numerics.md).",
        ),
    ] = FOLDS[0],
    fuse: Annotated[
        bool, typer.Option("--fuse", help="Also write a variant fused for ONNX Runtime, sharing the weights.")
    ] = False,
    split: Annotated[
        bool,
        typer.Option(
            "--split",
            help="Each complementary encoder as a file of its own, which a device runs when its input changes.",
        ),
    ] = False,
    routing: Annotated[
        bool, typer.Option("--routing/--no-routing", help="Whether the experts' weights are an output of the graph.")
    ] = True,
    samples: Samples = None,
    gate_samples: GateSamples = None,
    threshold: Annotated[
        str | None,
        unset(
            metavar="NAME=SHARE",
            help="What they have to reach: labels=0.99,routing=0.99 (least share equal), metric=0.01 (largest drop), "
            "probability=0.25,mean_probability=0.03 (largest change), logits=0.1 (of their spread).",
        ),
    ] = None,
    calib: Annotated[
        int | None,
        unset(min=1, help=f"Real samples that int8 reads its ranges from. Default: {CALIBRATION_SAMPLES}."),
    ] = None,
    calib_data: Annotated[
        Path | None, unset(metavar="JSONL", help="Where they are; default: the run's training split.")
    ] = None,
    calib_method: Annotated[
        str | None,
        unset(help=f"How outliers among them are cut: {' or '.join(METHODS)}. Default: {METHODS[0]}."),
    ] = None,
    repair_minutes: Annotated[
        float | None,
        unset(
            help="How long each may look for what has to stay in fp32, where it does not reach that. "
            f"Default: {REPAIR_MINUTES:g}."
        ),
    ] = None,
    batch: Annotated[str | None, unset(help="Batch sizes that engines are built for, min:opt:max.")] = None,
    text_len: Annotated[str | None, unset(help="The same for tokens of a text, 8:32:128.")] = None,
    audio_len: Annotated[str | None, unset(help="The same for a clip, in samples at its encoder's rate.")] = None,
    workspace: Annotated[int | None, unset(min=1, help="Limit of a builder's GPU scratch memory, MiB.")] = None,
    backend: Annotated[
        str | None,
        unset(help="Library that --format trt builds with: tensorrt or tensorrt_rtx; default: what fits this machine."),
    ] = None,
    compute: Annotated[
        str | None,
        unset(help="Compute capabilities of --format trt, 8.6,12.0; default: this GPU's, or all without one."),
    ] = None,
    tf32: Annotated[
        bool, typer.Option("--tf32", help="Let engines round float32 products to TF32, which is faster.")
    ] = False,
    triton: Annotated[
        Path | None, unset(metavar="REPOSITORY", help="Where --format triton writes; default: OUT-triton.")
    ] = None,
    cpu_threads: Annotated[
        int | None,
        unset(
            min=1,
            help="Threads of a session on a device's CPU, unless it says otherwise; default: as many as it has cores.",
        ),
    ] = None,
    arena: Annotated[
        bool, typer.Option("--arena/--no-arena", help="Whether such a session keeps memory for its next run.")
    ] = True,
    seed: Seed = 0,
    name: Annotated[str | None, unset(help="What the bundle calls itself; default: the run's name.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the bundle that is at --out.")] = False,
    report: Report = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Load everything, say what would be done, stop.")] = False,
    version: Version = False,
) -> int:
    started = time.monotonic()
    formats = parse_list("format", format, FORMATS)
    preset = get_target(device) if device is not None else None
    _check_belongs(formats, "trt", {"--backend": backend, "--compute": compute, "--tf32": tf32 or None})
    _check_belongs(formats, "triton", {"--triton": triton})
    if preset is not None and precision is not None:
        preset.check_precisions([name.strip().lower() for name in precision.split(",")])
    options = Options(
        opset=opset or (preset.opset if preset else DEFAULT_OPSET),
        fold=fold,
        fuse=fuse,
        routing=routing,
        samples=samples,
        overwrite=overwrite,
        seed=seed,
        precisions=parse_list("precision", precision, PRECISIONS)
        if precision is not None
        else (preset.default_precisions if preset else ("fp32",)),
        gate_samples=gate_samples or GATE_SAMPLES,
        thresholds=parse_thresholds(threshold) if threshold is not None else {},
        calibration_samples=calib or CALIBRATION_SAMPLES,
        calibration_method=calib_method or METHODS[0],
        repair_minutes=REPAIR_MINUTES if repair_minutes is None else repair_minutes,
        target=device,
        batch=batch,
        text_length=text_len,
        audio_length=audio_len,
        workspace=workspace,
        split=split,
        cpu_threads=cpu_threads,
        cpu_arena=arena,
    )
    if split and formats != ("onnx",):
        raise UsageError(
            "graphs in parts are for ONNX Runtime in one bundle",
            received=f"--split with --format {','.join(formats)}",
            todo="export two bundles",
        )
    check_report(report)
    source = find_source(run, data=data)
    options = replace(options, name=name or source.name, skip_bad=source.skip_bad)
    target = target or BUNDLES / source.name
    repository = triton or target.with_name(f"{target.name}-triton")
    if calib_data is not None and not calib_data.is_file():
        raise UsageError(f"--calib-data {calib_data} is not a file", expected="a JSONL file of image, text")
    _check_used(
        "precision int8",
        "int8" in options.precisions,
        {"--calib": calib, "--calib-data": calib_data, "--calib-method": calib_method},
    )
    _check_used(
        "precisions below fp32",
        options.precisions != ("fp32",),
        {"--threshold": threshold, "--gate-samples": gate_samples, "--repair-minutes": repair_minutes},
    )
    _check_used(
        "TensorRT engines, which no graph of this bundle can become",
        "triton" in formats or not (split or set(options.precisions) == {"int8-dynamic"}),
        {"--batch": batch, "--text-len": text_len, "--audio-len": audio_len, "--workspace": workspace},
    )
    check_target(target, overwrite=overwrite or (dry_run and (target / MANIFEST).is_file()))
    if "triton" in formats:
        from export.pack.triton import check_repository, schema

        schema()  # a missing extra is found out before any work, as is a path that cannot be
        check_repository(repository, options.name)
    engines = None
    if "trt" in formats:
        from export.pack.engines import EngineOptions, check_engine_options

        engines = EngineOptions(backend=backend, compute=compute, tf32=tf32)
        check_engine_options(engines, options.precisions, preset)
    with steps() as step:
        step("loading PyTorch and the exporter")
        require_packages()
        from export.pack.summary import summary_table
        from export.pipeline import export_model

        step(f"loading {source.checkpoint}")
        model = load(source)
        check_sizes(model, options)
        check_split(model, options)
        if dry_run:
            step(None)
            print_plan(source, model, target, options, formats, calib_data or source.calibration)
            return 0
        reports: dict[str, ParityReport | PrecisionReport] = {}

        def on_report(found: ParityReport | PrecisionReport) -> None:
            step(None)
            reports[found.file] = found
            out.print(found.table())
            if report is not None:
                write_report(report, reports)

        def on_notice(text: str) -> None:
            step(None)
            err.print(text, markup=False)

        exported = export_model(
            model,
            target,
            data=source.data,
            calibration=calib_data or source.calibration,
            options=options,
            on_step=step,
            on_report=on_report,
            on_notice=on_notice,
            engines=engines,
        )
        step(None)
        if len(exported.rows) > 1:
            out.print(summary_table(exported.rows))
        if "triton" in formats:
            step("writing the Triton repository")
            repositories = _write_triton(exported.bundle, repository)
    for row in exported.rows:
        if row.explanation:
            out.print(f"{row.graph}: {row.explanation}", markup=False)
        if row.parts:
            out.print(f"{row.graph} in parts: {row.parts}", markup=False)
    _print_result(exported.bundle, source, target, seconds=time.monotonic() - started)
    if "triton" in formats:
        print_rows({"triton": ", ".join(map(str, repositories))})
    return 0


def _check_belongs(formats: Sequence[str], format: str, given: Mapping[str, object]) -> None:
    """Options of one format are not passed over in silence where it was not asked for."""
    for option, value in given.items():
        if value is not None and format not in formats:
            raise UsageError(
                f"{option} belongs to --format {format}",
                received=f"--format {','.join(formats)}",
                todo=f"add {format} to --format, or leave {option} out",
            )


def _check_used(what: str, used: bool, given: Mapping[str, object]) -> None:
    """Options that nothing would read are not passed over in silence."""
    for option, value in given.items():
        if value is not None and not used:
            raise UsageError(f"{option} is for {what}, and would change nothing here", todo="leave it out")


def _write_triton(bundle: Bundle, repository: Path) -> list[Path]:
    """A model for every graph that the server's ONNX Runtime takes."""
    from export.pack.triton import model_name, write_repository

    return [
        write_repository(
            bundle, repository, graph=graph.name, name=model_name(bundle) + graph.name.removeprefix("model")
        )
        for graph in bundle.manifest.graphs
        if graph.takes("onnxruntime")
    ]


def _print_result(bundle: Bundle, source: Source, target: Path, *, seconds: float) -> None:
    from mope_deploy.data import open_samples

    manifest = bundle.manifest
    total = sum(entry.bytes for entry in manifest.files.values())
    rows = open_samples(
        bundle.file(manifest.golden.samples),
        task=manifest.task,
        require_label=False,
        modalities=(manifest.main, *manifest.complementary),
        optional=manifest.missing,
    )
    sample = next(iter(rows))
    path = shlex.quote(str(target))
    inputs = sample.named | {
        name: str(target / Path(os.path.relpath(file, bundle.path)))
        for name in ("image", "audio", "video")
        if (file := getattr(sample, name)) is not None
    }
    given = " ".join(f"--{name} {shlex.quote(value)}" for name, value in inputs.items())
    print_rows(
        {
            "bundle": f"{target} ({size(total)} in {len(manifest.files) + 1} files)",
            "took": f"{seconds:.1f} s",
            "next": f"mope verify {path}",
            "": f"mope run {path} {given}",
            " ": f"mope eval {path} {shlex.quote(str(source.data))}",
        }
    )
