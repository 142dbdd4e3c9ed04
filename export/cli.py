"""``mope-export RUN --format onnx,trt,triton`` and ``mope-export check RUN BUNDLE``."""

from __future__ import annotations

import json
import os
import secrets
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from export.options import (
    CALIBRATION_METHODS,
    CALIBRATION_SAMPLES,
    DEFAULT_OPSET,
    FOLDS,
    FORMATS,
    GATE_SAMPLES,
    OPSETS,
    Options,
    check_target,
    parse_list,
    parse_thresholds,
)
from export.packages import require_packages
from export.source import find_source
from mope_deploy.console import err, out, run_app
from mope_deploy.errors import ExportError, UsageError
from mope_deploy.manifest import MANIFEST, PRECISIONS
from mope_deploy.targets import TARGETS, get_target

if TYPE_CHECKING:
    from export.gate import PrecisionReport
    from export.gate.parity_report import ParityReport
    from export.pipeline import Exported
    from export.source import Source
    from mope_deploy.model import MoPE

__all__ = ["check_app", "export_app", "main"]

BUNDLES = Path("bundles")
PLAIN_EVERY_S = 5.0

_HELP = """Export a trained model to a bundle that runs without PyTorch.

RUN is a run folder of python -m train, one of its checkpoints (RUN/best), or a checkpoint folder or hub id with --data.
The saved graph is compared with the trained model on generated and on real samples; if it does not compute the same,
there is no bundle and the exit code is 1.

    mope-export runs/mine --format onnx --out bundles/mine
    mope-export runs/mine --format onnx,trt --precision fp32,fp16,int8

    mope-export check runs/mine bundles/mine      repeats the comparison on a bundle's own files

A run folder that is itself called check is written ./check.
"""
_CHECK_HELP = """Repeat the comparison of a bundle's graphs with the trained model they came from.

The exit code is 1 if they do not compute the same.
"""

export_app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
check_app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

Run = Annotated[str, typer.Argument(metavar="RUN", help="What to export.", show_default=False)]
Data = Annotated[
    Path | None,
    typer.Option(metavar="JSONL", help="Real samples for the comparison; default: the run's test split."),
]
Samples = Annotated[
    int | None, typer.Option(min=1, help="How many of them; default: enough for 128 logits.", show_default=False)
]
GateSamples = Annotated[
    int | None,
    typer.Option(
        min=1,
        help=f"Real samples that precisions below fp32 are judged on, or all there are. Default: {GATE_SAMPLES}.",
        show_default=False,
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Of generated inputs and of the choice of samples.")]
Report = Annotated[
    Path | None, typer.Option(metavar="JSON", help="Also write the full report of the comparison, passed or not.")
]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 success, 1 failure, 2 misuse."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] != ["check"]:
        return run_app(export_app, arguments, name="mope-export")
    named = [argument for argument in arguments[1:] if not argument.startswith("-")]
    if Path("check").is_dir() and len(named) < 2 and "--help" not in arguments:
        err.print("error: check is a command of mope-export; the folder of that name is written ./check", markup=False)
        return 2
    return run_app(check_app, arguments[1:], name="mope-export check")


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
        typer.Option(
            help=f"A list of: {', '.join(PRECISIONS)}. The first runs by default. Default: fp32, or the target's.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option("--target", help=f"What it is for: {', '.join(TARGETS)}. Checks and presets.", show_default=False),
    ] = None,
    target: Annotated[
        Path | None,
        typer.Option("--out", metavar="BUNDLE", help="Folder to make; default: bundles/ and the run's name."),
    ] = None,
    data: Data = None,
    opset: Annotated[
        int | None,
        typer.Option(
            help=f"Version of the ONNX operators, {OPSETS.start} to {OPSETS.stop - 1}. Default: {DEFAULT_OPSET}.",
            show_default=False,
        ),
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
        typer.Option(
            metavar="NAME=SHARE",
            help="What they have to reach: labels=0.99,routing=0.99 (least share equal), metric=0.01 (largest drop).",
            show_default=False,
        ),
    ] = None,
    calib: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=f"Real samples that int8 reads its ranges from. Default: {CALIBRATION_SAMPLES}.",
            show_default=False,
        ),
    ] = None,
    calib_data: Annotated[
        Path | None,
        typer.Option(metavar="JSONL", help="Where they are; default: the run's training split.", show_default=False),
    ] = None,
    calib_method: Annotated[
        str | None,
        typer.Option(
            help=f"How outliers among them are cut: {' or '.join(CALIBRATION_METHODS)}. "
            f"Default: {CALIBRATION_METHODS[0]}.",
            show_default=False,
        ),
    ] = None,
    batch: Annotated[
        str | None, typer.Option(help="Batch sizes that engines are built for, min:opt:max.", show_default=False)
    ] = None,
    text_len: Annotated[
        str | None, typer.Option(help="The same for tokens of a text, 8:32:128.", show_default=False)
    ] = None,
    audio_len: Annotated[
        str | None, typer.Option(help="The same for a clip, in samples at its encoder's rate.", show_default=False)
    ] = None,
    workspace: Annotated[
        int | None, typer.Option(min=1, help="Limit of a builder's GPU scratch memory, MiB.", show_default=False)
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(
            help="Library that --format trt builds with: tensorrt or tensorrt_rtx; default: what fits this machine.",
            show_default=False,
        ),
    ] = None,
    compute: Annotated[
        str | None,
        typer.Option(
            help="Compute capabilities of --format trt, 8.6,12.0; default: this GPU's, or all without one.",
            show_default=False,
        ),
    ] = None,
    tf32: Annotated[
        bool, typer.Option("--tf32", help="Let engines round float32 products to TF32, which is faster.")
    ] = False,
    triton: Annotated[
        Path | None,
        typer.Option(
            metavar="REPOSITORY", help="Where --format triton writes; default: OUT-triton.", show_default=False
        ),
    ] = None,
    cpu_threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Threads of a session on a device's CPU, unless it says otherwise; default: as many as it has cores.",
            show_default=False,
        ),
    ] = None,
    arena: Annotated[
        bool, typer.Option("--arena/--no-arena", help="Whether such a session keeps memory for its next run.")
    ] = True,
    seed: Seed = 0,
    name: Annotated[
        str | None, typer.Option(help="What the bundle calls itself; default: the run's name.", show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the bundle that is at --out.")] = False,
    report: Report = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Load everything, say what would be done, stop.")] = False,
) -> int:
    started = time.monotonic()
    formats = parse_list("format", format, FORMATS)
    preset = get_target(device) if device is not None else None
    _check_belongs(formats, "trt", {"--backend": backend, "--compute": compute, "--tf32": tf32 or None})
    _check_belongs(formats, "triton", {"--triton": triton})
    if "triton" in formats:
        from export.pack.triton import schema

        schema()  # a missing extra is found out before any work
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
        calibration_method=calib_method or CALIBRATION_METHODS[0],
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
    _check_report(report)
    source = find_source(run, data=data)
    options = replace(options, name=name or source.name)
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
        {"--threshold": threshold, "--gate-samples": gate_samples},
    )
    _check_used(
        "TensorRT engines, which no graph of this bundle can become",
        "triton" in formats or not (split or set(options.precisions) == {"int8-dynamic"}),
        {"--batch": batch, "--text-len": text_len, "--audio-len": audio_len, "--workspace": workspace},
    )
    check_target(target, overwrite=overwrite or (dry_run and (target / MANIFEST).is_file()))
    engines = None
    if "trt" in formats:
        from export.pack.engines import EngineOptions, check_engine_options

        engines = EngineOptions(backend=backend, compute=compute, tf32=tf32)
        check_engine_options(engines, options.precisions, preset)
    with _steps() as step:
        step("loading PyTorch and the exporter")
        require_packages()
        from export.pack.summary import summary_table
        from export.pipeline import check_sizes, check_split, export_model

        step(f"loading {source.checkpoint}")
        model = _load(source)
        check_sizes(model, options)
        check_split(model, options)
        if dry_run:
            step(None)
            _print_plan(source, model, target, options, formats, calib_data or source.calibration)
            return 0
        reports: dict[str, ParityReport | PrecisionReport] = {}

        def on_report(found: ParityReport | PrecisionReport) -> None:
            step(None)
            reports[found.file] = found
            out.print(found.table())
            if report is not None:
                _write_report(report, reports)

        exported = export_model(
            model,
            target,
            data=source.data,
            calibration=calib_data or source.calibration,
            options=options,
            on_step=step,
            on_report=on_report,
            engines=engines,
        )
        step(None)
        if len(exported.rows) > 1:
            out.print(summary_table(exported.rows))
        if "triton" in formats:
            step("writing the Triton repository")
            repositories = _write_triton(exported, repository)
    for row in exported.rows:
        if row.explanation:
            out.print(f"{row.graph}: {row.explanation}", markup=False)
        if row.parts:
            out.print(f"{row.graph} in parts: {row.parts}", markup=False)
    _print_result(exported, source, target, seconds=time.monotonic() - started)
    if "triton" in formats:
        _print_rows({"triton": ", ".join(map(str, repositories))})
    return 0


@check_app.command(help=_CHECK_HELP)
def check(
    run: Run,
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder of the bundle.", show_default=False)],
    data: Data = None,
    samples: Samples = None,
    gate_samples: GateSamples = None,
    seed: Seed = 0,
    report: Report = None,
) -> int:
    from mope_deploy.bundle import Bundle

    started = time.monotonic()
    _check_report(report)
    source = find_source(run, data=data)
    opened = Bundle.open(bundle)
    with _steps() as step:
        step("loading PyTorch")
        require_packages()
        from export.gate import PrecisionReport, require_precision
        from export.gate.parity_report import require_parity
        from export.pipeline import check_bundle

        step(f"loading {source.checkpoint}")
        model = _load(source)
        reports = check_bundle(
            model,
            opened,
            data=source.data,
            samples=samples,
            gate_samples=gate_samples or GATE_SAMPLES,
            seed=seed,
            on_step=step,
        )
    for found in reports.values():
        out.print(found.table())
    if report is not None:
        _write_report(report, reports)
    for found in reports.values():
        if isinstance(found, PrecisionReport):
            require_precision(found)
        else:
            require_parity(found)
    for graph in opened.manifest.graphs:
        if graph.name not in reports:
            out.print(f"{graph.name} ({graph.precision}) was not checked: ONNX Runtime has no such arithmetic here")
    out.print(f"{bundle} computes what {run} computes ({time.monotonic() - started:.1f} s)", markup=False)
    return 0


def _check_report(report: Path | None) -> None:
    """A report that could not be written is found out before any work."""
    if report is not None and not report.absolute().parent.is_dir():
        raise UsageError("--report", received=report, expected="a file in a folder that is there")


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


def _write_triton(exported: Exported, repository: Path) -> list[Path]:
    """A model for every graph that the server's ONNX Runtime takes."""
    from export.pack.triton import model_name, write_repository

    bundle = exported.bundle
    graphs = [graph.name for graph in bundle.manifest.graphs if graph.takes("onnxruntime")]
    return [
        write_repository(bundle, repository, graph=graph, name=model_name(bundle) + graph.removeprefix("model"))
        for graph in graphs
    ]


def _load(source: Source) -> MoPE:
    from transformers.utils import logging

    logging.disable_progress_bar()  # of single weights; our own steps are shown
    return source.load()


def _print_plan(
    source: Source, model: MoPE, target: Path, options: Options, formats: Sequence[str], calibration: Path
) -> None:
    from export.gate.cases import generated_cases, rows_needed
    from export.graph.exporter_config import exporter_config
    from export.graph.static import folding_of
    from export.pipeline import GOLDEN_COUNT

    config = model.config
    described = exporter_config(model, routing_output=options.routing)
    conditioned = " and ".join(spec.modality for spec in config.complementary)
    routing = f"top-{config.top_k}" if config.top_k else "dense"
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    generated = sum(case.batch for case in generated_cases(described.graph, seed=options.seed))
    real = options.samples or rows_needed(len(config.labels))
    _print_rows(
        {
            "model": f"{source.checkpoint}: {config.main.modality} conditioned by {conditioned}, "
            f"L = {config.prompt_length}, K = {config.experts}, {routing} routing, {len(config.labels)} labels",
            "inputs": _tensors(described.input_shapes),
            "outputs": _tensors(described.output_shapes),
            "graph": f"opset {options.opset}, about {_size(weights)} in fp32"
            + (", and a variant fused for ONNX Runtime" if options.fuse else ""),
            "prompts": folding_of(model, options.fold),
            **({"files": f"a main file, and one of {conditioned}"} if options.split else {}),
            "formats": f"{', '.join(formats)} in {', '.join(options.precisions)}"
            + (f" for {options.target}" if options.target else ""),
            **_lowered(source, options, weights, calibration),
            "comparison": f"{generated} generated samples and up to {real} of {source.data}",
            "golden": f"up to {GOLDEN_COUNT} samples of {source.data} go into the bundle, pictures and texts included",
            "bundle": f"{target}, called {options.name!r}" + _replacing(target, overwrite=options.overwrite),
        }
    )
    out.print("dry run: nothing was written", markup=False)


def _lowered(source: Source, options: Options, weights: int, calibration: Path) -> dict[str, str]:
    """How precisions below fp32 will be made and judged, each in a row."""
    from export.gate import THRESHOLDS

    rows = {}
    for precision in options.precisions:
        if precision == "fp32":
            continue
        least = _size(weights // (2 if precision in ("fp16", "bf16") else 4))
        limits = replace(THRESHOLDS[precision], **options.thresholds)
        asked = ", ".join(f"{name} {share:g}" for name, share in limits.to_dict().items())
        ranges = (
            f"; ranges of up to {options.calibration_samples:,} of {calibration} ({options.calibration_method})"
            if precision == "int8"
            else ""
        )
        rows[precision] = (
            f"{least} or more, with what is kept in fp32; judged on up to {options.gate_samples:,} of {source.data}: "
            f"{asked}{ranges}"
        )
    return rows


def _replacing(target: Path, *, overwrite: bool) -> str:
    if not target.exists():
        return ""
    return ", replacing what is there" if overwrite else ", which is there already: --overwrite would be needed"


def _print_result(exported: Exported, source: Source, target: Path, *, seconds: float) -> None:
    from mope_deploy.data import open_samples

    bundle = exported.bundle
    files = bundle.manifest.files
    total = sum(entry.bytes for entry in files.values())
    golden = bundle.file(bundle.manifest.golden.samples)
    manifest = bundle.manifest
    rows = open_samples(
        golden,
        multi_label=manifest.task.multi_label,
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
    _print_rows(
        {
            "bundle": f"{target} ({_size(total)} in {len(files) + 1} files)",
            "took": f"{seconds:.1f} s",
            "next": f"mope verify {path}",
            "": f"mope run {path} {given}",
            " ": f"mope eval {path} {shlex.quote(str(source.data))}",
        }
    )


def _print_rows(rows: Mapping[str, str]) -> None:
    for name, text in rows.items():
        out.print(f"{name:<12}{text}", markup=False)


def _tensors(shapes: Mapping[str, tuple[str, tuple[int | str, ...]]]) -> str:
    return ", ".join(f"{name} ({', '.join(map(str, shape))})" for name, (_, shape) in shapes.items())


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


@contextmanager
def _steps() -> Iterator[Callable[[str | None], None]]:
    """Show what is being done: a spinner on a terminal, plain lines elsewhere; None clears the way for other output."""
    if not err.is_terminal:
        yield _plain_steps()
        return
    status = err.status("starting")

    def show(text: str | None) -> None:
        if text is None:
            status.stop()
        else:
            status.update(f"{text} …")
            status.start()

    try:
        yield show
    finally:
        status.stop()


def _plain_steps() -> Callable[[str | None], None]:
    """A line for each new step; of the batches within one only now and then."""
    last, shown = "", 0.0

    def show(text: str | None) -> None:
        nonlocal last, shown
        step = (text or "").partition(" (")[0]
        if step and (step != last or time.monotonic() - shown > PLAIN_EVERY_S):
            err.print(f"{text if step == last else step} …", markup=False)
            last, shown = step, time.monotonic()

    return show


def _write_report(path: Path, reports: Mapping[str, ParityReport | PrecisionReport]) -> None:
    document: dict[str, Any] = {name: report.to_dict() for name, report in reports.items()}
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ExportError(f"{path} cannot be written: {error.strerror or error}") from error


if __name__ == "__main__":
    sys.exit(main())
