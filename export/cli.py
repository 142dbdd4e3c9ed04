"""``mope-export RUN --format onnx`` and ``mope-export check RUN BUNDLE``."""

from __future__ import annotations

import json
import os
import secrets
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from export.options import DEFAULT_OPSET, OPSETS, Options, check_target
from export.packages import require_packages
from export.source import find_source
from mope_deploy.console import err, out, run_app
from mope_deploy.errors import ExportError, UsageError
from mope_deploy.fields import nearest

if TYPE_CHECKING:
    from export.bundling import Exported
    from export.report import ParityReport
    from export.source import Source
    from mope_deploy.model import MoPE

__all__ = ["check_app", "export_app", "main"]

FORMATS = ("onnx",)
PLANNED = ("trt",)
BUNDLES = Path("bundles")
PLAIN_EVERY_S = 5.0

_HELP = """Export a trained model to a bundle that runs without PyTorch.

RUN is a run folder of python -m train, one of its checkpoints (RUN/best), or a checkpoint folder or hub id with --data.
The saved graph is compared with the trained model on generated and on real samples; if it does not compute the same,
there is no bundle and the exit code is 1.

    mope-export runs/mine --format onnx --out bundles/mine

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
    format: Annotated[str, typer.Option("--format", help=f"One of: {', '.join(FORMATS)}.")] = "onnx",
    target: Annotated[
        Path | None,
        typer.Option("--out", metavar="BUNDLE", help="Folder to make; default: bundles/ and the run's name."),
    ] = None,
    data: Data = None,
    opset: Annotated[
        int, typer.Option(help=f"Version of the ONNX operators, {OPSETS.start} to {OPSETS.stop - 1}.")
    ] = DEFAULT_OPSET,
    fuse: Annotated[
        bool, typer.Option("--fuse", help="Also write a variant fused for ONNX Runtime, sharing the weights.")
    ] = False,
    routing: Annotated[
        bool, typer.Option("--routing/--no-routing", help="Whether the experts' weights are an output of the graph.")
    ] = True,
    samples: Samples = None,
    seed: Seed = 0,
    name: Annotated[
        str | None, typer.Option(help="What the bundle calls itself; default: the run's name.", show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the bundle that is at --out.")] = False,
    report: Report = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Load everything, say what would be done, stop.")] = False,
) -> int:
    started = time.monotonic()
    _check_format(format)
    source = find_source(run, data=data)
    target = target or BUNDLES / source.name
    options = Options(
        name=name or source.name,
        opset=opset,
        fuse=fuse,
        routing=routing,
        samples=samples,
        overwrite=overwrite,
        seed=seed,
    )
    check_target(target, overwrite=overwrite)
    with _steps() as step:
        step("loading PyTorch and the exporter")
        require_packages()
        from export.bundling import export_model

        step(f"loading {source.checkpoint}")
        model = _load(source)
        if dry_run:
            step(None)
            _print_plan(source, model, target, options)
            return 0
        reports: dict[str, ParityReport] = {}

        def on_report(found: ParityReport) -> None:
            step(None)
            reports[found.file] = found
            out.print(found.table())
            if report is not None:
                _write_report(report, reports)

        exported = export_model(model, target, data=source.data, options=options, on_step=step, on_report=on_report)
    _print_result(exported, source, target, seconds=time.monotonic() - started)
    return 0


@check_app.command(help=_CHECK_HELP)
def check(
    run: Run,
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder of the bundle.", show_default=False)],
    data: Data = None,
    samples: Samples = None,
    seed: Seed = 0,
    report: Report = None,
) -> int:
    from mope_deploy.bundle import Bundle

    started = time.monotonic()
    source = find_source(run, data=data)
    opened = Bundle.open(bundle)
    with _steps() as step:
        step("loading PyTorch")
        require_packages()
        from export.bundling import check_bundle
        from export.report import require_parity

        step(f"loading {source.checkpoint}")
        model = _load(source)
        reports = check_bundle(model, opened, data=source.data, samples=samples, seed=seed, on_step=step)
    for found in reports.values():
        out.print(found.table())
    if report is not None:
        _write_report(report, reports)
    for found in reports.values():
        require_parity(found)
    out.print(f"{bundle} computes what {run} computes ({time.monotonic() - started:.1f} s)", markup=False)
    return 0


def _check_format(name: str) -> None:
    if name in FORMATS:
        return
    available = ", ".join(FORMATS)
    if name in PLANNED:
        raise UsageError(f"--format {name} is not available yet", expected=f"one of: {available}")
    hint = nearest(name.lower(), (*FORMATS, *PLANNED))
    raise UsageError(
        f"there is no --format {name}", expected=f"one of: {available}", todo=f"did you mean {hint}?" if hint else None
    )


def _load(source: Source) -> MoPE:
    from transformers.utils import logging

    logging.disable_progress_bar()  # of single weights; our own steps are shown
    return source.load()


def _print_plan(source: Source, model: MoPE, target: Path, options: Options) -> None:
    from export.bundling import GOLDEN_COUNT
    from export.cases import generated_cases, rows_needed
    from export.exporter_config import exporter_config

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
            "graph": f"opset {options.opset}, about {_size(weights)}"
            + (", and a variant fused for ONNX Runtime" if options.fuse else ""),
            "comparison": f"{generated} generated samples and up to {real} of {source.data}",
            "golden": f"up to {GOLDEN_COUNT} samples of {source.data} go into the bundle, pictures and texts included",
            "bundle": f"{target}, called {options.name!r}" + (", replacing what is there" if target.exists() else ""),
        }
    )
    out.print("dry run: nothing was written", markup=False)


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


def _write_report(path: Path, reports: Mapping[str, ParityReport]) -> None:
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
