"""``mope``: run, evaluate, verify, measure and describe a bundle. No torch.

Results go to standard output, everything else to standard error, so that output can be piped. Exit codes: 0 success,
1 failure, 2 misuse.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table

from mope_deploy import console
from mope_deploy.bench.command import bench
from mope_deploy.errors import DataError, EngineError, MopeError, UsageError
from mope_deploy.progress import track

if TYPE_CHECKING:
    from mope_deploy.bundle import Bundle
    from mope_deploy.data import Sample, Samples
    from mope_deploy.manifest import Gate, Manifest
    from mope_deploy.predictor import Prediction, Predictor

__all__ = ["app", "main"]

app = typer.Typer(
    name="mope",
    help="Run a bundle: a multimodal model exported by mope-export. Needs no PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

BUNDLE = typer.Argument(metavar="BUNDLE", help="Folder of the bundle.", show_default=False)
ENGINE = typer.Option(
    "auto",
    help="Inference engine: tensorrt, onnxruntime, or auto: TensorRT, then ONNX Runtime on CUDA, then on the CPU.",
)
REBUILD = typer.Option(
    False, "--rebuild", help="Build the TensorRT engine again where there is none or this device refuses it."
)
GRAPH = typer.Option(None, help="Which graph of the bundle; by default the canonical one.", show_default=False)
THREADS = typer.Option(
    None,
    min=1,
    help="Threads of one operator; by default the bundle's choice, else the cores of this process.",
    show_default=False,
)
ARENA = typer.Option(
    None,
    "--arena/--no-arena",
    help="Keep the memory of earlier runs for the next one; by default the bundle's choice.",
    show_default=False,
)
CACHE = typer.Option(
    64, "--cache-mb", min=0, max=2**20, help="MiB for what a split graph need not compute again; others use none."
)
PROVIDER = typer.Option(
    None,
    help="ONNX Runtime's execution provider: cpu, cuda, tensorrt, tensorrt-rtx, or its full name. Repeatable.",
    show_default=False,
)
BATCH = typer.Option(16, min=1, max=4096, help="Samples that run at once.")
SKIP_BAD = typer.Option(False, "--skip-bad", help="Leave out rows that cannot be used, and list them at the end.")
JSON = typer.Option(False, "--json", help="Print JSON.")


@app.command()
def run(
    bundle: Path = BUNDLE,
    image: Path | None = typer.Option(None, help="One image file.", show_default=False),
    text: str | None = typer.Option(None, help="One text.", show_default=False),
    audio: Path | None = typer.Option(None, help="One sound file.", show_default=False),
    video: Path | None = typer.Option(None, help="One video file.", show_default=False),
    data: Path | None = typer.Option(
        None, help="JSONL with a row per sample: image, text, audio, video.", show_default=False
    ),
    out: Path | None = typer.Option(
        None, help="JSONL to write, with --data; by default standard output.", show_default=False
    ),
    routing: bool = typer.Option(False, "--routing", help="Also give the experts' weights in each layer."),
    as_json: bool = JSON,
    batch_size: int = BATCH,
    skip_bad: bool = SKIP_BAD,
    engine: str = ENGINE,
    graph: str | None = GRAPH,
    threads: int | None = THREADS,
    arena: bool | None = ARENA,
    provider: list[str] | None = PROVIDER,
    rebuild: bool = REBUILD,
    cache_mb: int = CACHE,
) -> None:
    """Predict one sample (--image, --text, …), or every row of a file (--data in.jsonl --out out.jsonl)."""
    given = {"image": image, "text": text, "audio": audio, "video": video}
    if data is not None and any(value is not None for value in given.values()):
        raise UsageError(
            "--data reads a file and --image/--text/--audio/--video give one sample", expected="one of the two"
        )
    if data is None and (out is not None or skip_bad):
        raise UsageError(
            f"{'--out' if out is not None else '--skip-bad'} belongs to --data", expected="--data in.jsonl"
        )
    if data is not None and out is not None and _same_file(data, out):
        raise UsageError("--out is the file that --data reads", received=out, expected="another file")
    predictor = _load(
        bundle,
        engine=engine,
        graph=graph,
        threads=threads,
        arena=arena,
        provider=provider,
        rebuild=rebuild,
        cache_mb=cache_mb,
    )
    if data is not None:
        _run_file(predictor, data, out, routing=routing, batch_size=batch_size, skip_bad=skip_bad)
        return
    _require_inputs(predictor, **given)
    prediction = predictor.predict(image=image, text=text, audio=audio, video=video, routing=routing)
    assert not isinstance(prediction, list)
    if as_json:
        _print_json(prediction.to_dict())
        return
    _warn(prediction.notices)
    _print_prediction(prediction)


@app.command("eval")
def evaluate(
    bundle: Path = BUNDLE,
    data: Path = typer.Argument(metavar="DATA", help="JSONL with a row per sample: its inputs and label."),
    as_json: bool = JSON,
    batch_size: int = BATCH,
    skip_bad: bool = SKIP_BAD,
    engine: str = ENGINE,
    graph: str | None = GRAPH,
    threads: int | None = THREADS,
    arena: bool | None = ARENA,
    provider: list[str] | None = PROVIDER,
    rebuild: bool = REBUILD,
    cache_mb: int = CACHE,
) -> None:
    """Compare predictions with the labels of a file: accuracy, macro and micro F1, confusion."""
    import numpy as np

    from mope_deploy.metrics import report

    predictor = _load(
        bundle,
        engine=engine,
        graph=graph,
        threads=threads,
        arena=arena,
        provider=provider,
        rebuild=rebuild,
        cache_mb=cache_mb,
    )
    task, index = predictor.task, {name: i for i, name in enumerate(predictor.labels)}
    true: list[Any] = []
    predicted: list[Any] = []

    def encode(label: Any) -> Any:
        return [name in label for name in index] if task.multi_label else index[label]

    samples = _open(predictor, data, require_label=True, skip_bad=skip_bad)
    for sample, prediction in _stream(predictor, samples, routing=False, batch_size=batch_size):
        true.append(encode(sample.label))
        predicted.append(encode(prediction.label))
    found = report(np.array(true), np.array(predicted), predictor.labels)
    found["skipped"] = len(samples.skipped)
    session = predictor.session
    found["engine"] = {"name": session.name, "device": session.device, "settings": session.settings}
    if predictor.cache is not None:
        found["cache"] = predictor.cache.to_dict()
    if as_json:
        _print_json(found)
    else:
        _print_report(found)


@app.command()
def verify(
    bundle: Path = BUNDLE,
    engine: str = ENGINE,
    graph: str | None = GRAPH,
    threads: int | None = THREADS,
    arena: bool | None = ARENA,
    provider: list[str] | None = PROVIDER,
    rebuild: bool = REBUILD,
    as_json: bool = JSON,
) -> None:
    """Check every file's hash, then repeat the golden samples: preprocessing bit for bit, outputs within tolerance."""
    from mope_deploy.bundle import Bundle
    from mope_deploy.engines import built_engines, engines_not_run

    opened = Bundle.open(bundle, verify=True)
    runs_here = "tensorrt" if engine == "tensorrt" else "onnxruntime"
    canonical = opened.graph(graph, engine=runs_here).name
    variants = [g.name for g in opened.manifest.graphs if g.takes(runs_here) and g.name != canonical]
    results, unusable = [], {}
    for name in [canonical, *(variants if graph is None else [])]:
        try:
            predictor = _load(
                bundle,
                engine=engine,
                graph=name,
                threads=threads,
                arena=arena,
                provider=provider,
                rebuild=rebuild and name == canonical,
                cache_mb=0,
                check=False,
                announce=name == canonical and bool(built_engines(opened, name)),
            )
            results.append((predictor, predictor.verify()))
        except EngineError as error:
            # A variant may need a newer engine than this device has. One that runs and is wrong raises ParityError.
            if name == canonical:
                raise
            unusable[name] = str(error)
    not_run = engines_not_run(opened, [one.session for one, _ in results], [canonical, *([] if graph else variants)])
    if as_json:
        found = {"bundle": str(bundle), "sha256": opened.sha256, "unusable": unusable, "engines_not_run": not_run}
        _print_json(found | {"graphs": [vars(result) for _, result in results]})
        return
    console.out.print(f"{len(opened.manifest.files)} files: SHA-256 as in the manifest", markup=False)
    for predictor, result in results:
        routing = "" if result.routing_error is None else f", routing error {result.routing_error:.1e}"
        ties = f", {result.near_ties} near-tied labels flipped" if result.near_ties else ""
        console.out.print(
            f"{result.graph} in {predictor.session.name} ({predictor.session.device}): {result.samples} golden "
            f"samples, inputs equal to the last bit, logits error {result.logits_error:.1e}{routing}{ties}",
            markup=False,
        )
    for name, reason in unusable.items():
        console.err.print(f"note: {name} cannot be used here, and is not unless asked for: {reason}", markup=False)
    for file, reason in not_run.items():
        console.err.print(f"note: {file} was not run: {reason}", markup=False)
    if unlisted := opened.unlisted():
        console.err.print(
            f"note: {len(unlisted)} files are not part of the bundle: {', '.join(unlisted[:10])}", markup=False
        )
    console.out.print(f"{bundle} is as it was exported", markup=False)


@app.command()
def build(
    bundle: Path = BUNDLE,
    backend: str | None = typer.Option(
        None, help="tensorrt or tensorrt_rtx; by default what fits this machine.", show_default=False
    ),
    graph: str | None = GRAPH,
    batch: str | None = typer.Option(None, help="Batch sizes, min:opt:max. Default: 1:4:16.", show_default=False),
    text_len: str | None = typer.Option(
        None, help="Tokens of a text, min:opt:max. Default: all that the bundle makes.", show_default=False
    ),
    audio_len: str | None = typer.Option(
        None, help="Samples of a clip, min:opt:max. Default: all that the bundle makes.", show_default=False
    ),
    compute: str | None = typer.Option(
        None,
        help="Compute capabilities, 8.6,12.0 (tensorrt_rtx). Default: this GPU's; all of them where there is none.",
        show_default=False,
    ),
    tf32: bool = typer.Option(False, "--tf32", help="Let float32 products be rounded to TF32, which is faster."),
    workspace: int | None = typer.Option(
        None, min=1, help="Limit of the builder's GPU scratch memory, MiB.", show_default=False
    ),
    no_memory_check: bool = typer.Option(False, "--no-memory-check", help="Begin even if free memory looks too small."),
) -> None:
    """Build the TensorRT engine for this device from the bundle's ONNX, and prove it on the golden samples."""
    from mope_deploy.bundle import Bundle
    from mope_deploy.engines import open_session
    from mope_deploy.engines.tensorrt.build import build_engine, why_not_run_here
    from mope_deploy.engines.tensorrt.device import this_device

    opened, device = Bundle.open(bundle), this_device()
    sidecar, files = build_engine(
        opened,
        backend=backend,
        graph=graph,
        batch=batch,
        text_length=text_len,
        audio_length=audio_len,
        compute=compute,
        tf32=tf32,
        workspace=workspace,
        check_memory=not no_memory_check,
        device=device,
    )
    say = console.out.print
    sizes = ", ".join(f"{axis} {size}" for axis, size in sidecar.profile.items())
    products = ", ".join(f"{count} of {dtype}" for dtype, count in sidecar.precision.products.items())
    say(f"{files.engine}: {sidecar.engine.bytes / 1e6:,.1f} MB", markup=False)
    say(f"{sidecar.backend} {sidecar.version}, for {', '.join(sidecar.compute_capabilities)}; {sizes}", markup=False)
    say(
        f"{sidecar.precision.declared}, products: {products}{', TF32 allowed' if tf32 else ''}; "
        f"{sidecar.seconds:,.1f} s, at most {sidecar.peak_bytes / 2**20:,.0f} MiB of memory",
        markup=False,
    )
    if reason := why_not_run_here(sidecar, device):
        say(f"built, not run here: {reason}", markup=False)
        say("the golden samples are run when the engine is first loaded, before any prediction", markup=False)
        return
    session = open_session(opened, engine="tensorrt", graph=graph)
    say(f"golden samples come out right on {session.device}", markup=False)
    say(f"next: mope run {bundle} --engine tensorrt --data in.jsonl", markup=False)


@app.command()
def info(bundle: Path = BUNDLE, as_json: bool = JSON) -> None:
    """Say what a bundle is: task, inputs, graphs, parity figures, versions. Its files are checked first."""
    from mope_deploy.bundle import MANIFEST, Bundle

    opened = Bundle.open(bundle)
    if as_json:
        sys.stdout.write((opened.path / MANIFEST).read_text(encoding="utf-8"))
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    for key, value in _described(opened.manifest):
        table.add_row(_plain(key), _plain(value))
    table.add_row(_plain("sessions on a CPU"), _plain(_on_a_cpu(opened)))
    table.add_row(_plain("sha256"), _plain(opened.sha256))
    for key, value in _engines(opened):
        table.add_row(_plain(key), _plain(value))
    console.print_table(table)


app.command("bench")(bench)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 success, 1 failure, 2 misuse."""
    return console.run_app(app, argv)


def _load(
    bundle: Path,
    *,
    engine: str,
    graph: str | None,
    threads: int | None,
    arena: bool | None,
    provider: list[str] | None,
    rebuild: bool,
    cache_mb: int,
    check: bool = True,
    announce: bool = True,
) -> Predictor:
    from mope_deploy.predictor import load

    predictor = load(
        bundle,
        engine=engine,
        graph=graph,
        threads=threads,
        arena=arena,
        providers=provider or None,
        rebuild=rebuild,
        cache_mb=cache_mb,
        verify=check,
    )
    if announce:
        _say_engine(predictor)
    return predictor


def _say_engine(predictor: Predictor) -> None:
    """Which engine runs, how it is set up and why, where the choice was left to us."""
    session = predictor.session
    if session.why:
        from mope_deploy.engines.onnxruntime.cpu import CpuSettings

        set_up = f", {CpuSettings(**session.settings)}" if session.settings else ""
        console.err.print(f"engine: {session.name} on {session.device}{set_up}: {session.why}", markup=False)


def _require_inputs(predictor: Predictor, **given: Any) -> None:
    read = (predictor.bundle.manifest.main, *predictor.bundle.manifest.complementary)
    optional = predictor.preprocessing.missing
    missing = [f"--{name}" for name in read if given[name] is None and name not in optional]
    surplus = [f"--{name}" for name, value in given.items() if value is not None and name not in read]
    if missing or surplus:
        raise UsageError(
            f"{' and '.join(missing)} missing" if missing else f"this bundle reads no {surplus[0].removeprefix('--')}",
            expected=" and ".join(f"--{name}" for name in read if name not in optional)
            + "".join(f", perhaps --{name}" for name in optional)
            + ", or --data in.jsonl",
        )


def _open(predictor: Predictor, data: Path, *, require_label: bool, skip_bad: bool) -> Samples:
    from mope_deploy.data import open_samples

    manifest = predictor.bundle.manifest
    return open_samples(
        data,
        labels=predictor.labels if require_label else None,
        multi_label=predictor.task.multi_label,
        require_label=require_label,
        skip_bad=skip_bad,
        modalities=(manifest.main, *manifest.complementary),
        optional=manifest.missing,
    )


def _stream(
    predictor: Predictor, samples: Samples, *, routing: bool, batch_size: int
) -> Iterator[tuple[Sample, Prediction]]:
    """Every row's prediction with progress; afterwards what was skipped and truncated, once for the whole file."""
    from mope_deploy.data import count_rows

    count, truncated, other = 0, 0, []
    pairs = predictor.predict_batches(samples, batch_size=batch_size, routing=routing)
    for sample, prediction in track(pairs, what="predicting", total=count_rows(samples.path)):
        count += 1
        truncated += any(notice.startswith("text truncated") for notice in prediction.notices)
        other += [f"line {sample.line}: {n}" for n in prediction.notices if not n.startswith("text truncated")]
        yield sample, prediction
    for message in samples.skipped:
        console.err.print(f"skipped {message}", markup=False)
    if samples.skipped:
        console.err.print(f"skipped {len(samples.skipped):,} of {count + len(samples.skipped):,} rows", markup=False)
    if predictor.cache is not None:
        kept = predictor.cache
        console.err.print(
            f"complementary inputs: {kept.misses:,} encoded, {kept.hits:,} not encoded again (cache: "
            f"{kept.bytes / 2**20:.1f} of {kept.limit / 2**20:,.0f} MiB)",
            markup=False,
        )
    if truncated:
        assert predictor.preprocessing.text is not None
        limit = predictor.preprocessing.text.max_length
        console.err.print(f"note: {truncated:,} texts were truncated to {limit:,} tokens", markup=False)
    if other:
        more = f", and {len(other) - 1:,} more such notes" if len(other) > 1 else ""
        console.err.print(f"note: {other[0]}{more}", markup=False)
    if count == 0:
        raise DataError(f"{samples.path}: no row to predict", received=f"{len(samples.skipped):,} rows skipped")


def _run_file(
    predictor: Predictor, data: Path, out: Path | None, *, routing: bool, batch_size: int, skip_bad: bool
) -> None:
    samples = _open(predictor, data, require_label=False, skip_bad=skip_bad)
    with _writer(out) as write:
        for sample, prediction in _stream(predictor, samples, routing=routing, batch_size=batch_size):
            row: dict[str, Any] = {"line": sample.line, **sample.named}
            write(json.dumps({**row, **prediction.to_dict()}, ensure_ascii=False, allow_nan=False) + "\n")
    if out is not None:
        console.err.print(f"wrote {out}", markup=False)


@contextmanager
def _writer(out: Path | None) -> Iterator[Callable[[str], object]]:
    """Write lines to standard output, or to a temporary file that becomes ``out`` if nothing fails."""
    if out is None:
        yield sys.stdout.write
        return
    out = out.resolve()  # a link stays one, what it points to is replaced
    regular = out.is_file() or not out.exists()
    temporary = out.parent / f".{out.name}.{secrets.token_hex(4)}.tmp" if regular else out
    try:
        file = temporary.open("x" if regular else "w", encoding="utf-8")  # a device or a pipe is written as it is
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written", received=error.strerror) from error
    try:
        with file:
            yield file.write
        if regular:
            os.replace(temporary, out)
    except OSError as error:
        raise MopeError(f"{out} cannot be written", received=error.strerror) from error
    finally:
        if regular:
            temporary.unlink(missing_ok=True)


def _same_file(a: Path, b: Path) -> bool:
    return a.exists() and b.exists() and a.samefile(b)


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, ensure_ascii=False, allow_nan=False, indent=2) + "\n")


def _plain(value: object) -> Any:
    """Text from a file as rich shows it: without reading markup into it."""
    from rich.text import Text

    return Text(str(value))


def _warn(notices: tuple[str, ...]) -> None:
    for notice in notices:
        console.err.print(f"note: {notice}", markup=False)


def _print_prediction(prediction: Prediction) -> None:
    label = prediction.label if isinstance(prediction.label, str) else ", ".join(prediction.label) or "(no label)"
    console.out.print(label, markup=False, style="bold")
    table = Table(show_header=False, box=None, pad_edge=False)
    ranked = sorted(prediction.probabilities.items(), key=lambda item: -item[1])
    for name, probability in ranked[:10]:
        table.add_row(_plain(name), _plain(f"{probability:.4f}"))
    if len(ranked) > 10:
        table.add_row(_plain(f"… {len(ranked) - 10:,} more"), "")
    console.print_table(table)
    if prediction.routing is None:
        return
    layers = Table(box=None, pad_edge=False)
    layers.add_column("routing")
    for k in range(prediction.routing.shape[1]):
        layers.add_column(f"expert {k + 1}", justify="right")
    for i, weights in enumerate(prediction.routing):
        layers.add_row(f"layer {i + 1}", *(f"{weight:.3f}" for weight in weights))
    console.print_table(layers)


def _print_report(found: dict[str, Any]) -> None:
    console.out.print(
        f"{found['samples']:,} samples: accuracy {found['accuracy']:.4f}, "
        f"F1 macro {found['f1_macro']:.4f}, F1 micro {found['f1_micro']:.4f}",
        markup=False,
    )
    table = Table(box=None, pad_edge=False)
    for name in ("label", "F1", "samples"):
        table.add_column(name, justify="left" if name == "label" else "right")
    for label, figures in found["per_class"].items():
        table.add_row(_plain(label), f"{figures['f1']:.4f}", f"{figures['support']:,}")
    console.print_table(table)
    cells, labels = found.get("confusion_matrix"), list(found["per_class"])
    if cells is None or len(labels) > 12:
        return
    confusion = Table(box=None, pad_edge=False, title="rows: true, columns: predicted", title_justify="left")
    confusion.add_column("")
    for label in labels:
        confusion.add_column(_plain(label), justify="right")
    for label, row in zip(labels, cells, strict=True):
        confusion.add_row(_plain(label), *(f"{cell:,}" for cell in row))
    console.print_table(confusion)


def _on_a_cpu(bundle: Bundle) -> str:
    """How a session is set up here unless options say otherwise."""
    from mope_deploy.engines.onnxruntime.cpu import cpu_settings

    chosen = cpu_settings(bundle.manifest.build.cpu)
    return f"{chosen} (threads: {chosen.threads_from})"


def _engines(bundle: Bundle) -> Iterator[tuple[str, str]]:
    """What could run it here, and what was built for it."""
    from mope_deploy.engines import providers_here
    from mope_deploy.engines.onnxruntime.session import library_version
    from mope_deploy.engines.tensorrt.backends import BACKENDS, installed
    from mope_deploy.engines.tensorrt.sidecar import Sidecar, find_engines

    try:
        yield "onnxruntime here", library_version()
        for name, state, options in providers_here():
            yield f"provider {name}", state
            yield from (("", f"{key}={value}") for key, value in options.items())
    except MopeError as error:
        yield "onnxruntime here", str(error)
    found = installed()
    for name in BACKENDS:
        library = found.get(name, "not installed")
        yield f"{name} here", library if isinstance(library, str) else library.version
    for graph in bundle.manifest.graphs:
        for name, files in find_engines(bundle, graph):
            key = f"{'exported engine' if files.exported else 'engine'} {files.engine.name}"
            try:
                sidecar = Sidecar.read(files.sidecar)
                sizes = ", ".join(f"{axis} {size}" for axis, size in sidecar.profile.items())
                targets = ", ".join(sidecar.compute_capabilities)
                yield key, f"{name} {sidecar.version}, for {targets}; {sizes}"
            except EngineError as error:
                yield key, str(error)


def _judged(gate: Gate) -> str:
    """How a graph of lower precision compared with the eager model."""
    figures, asked = gate.figures, gate.thresholds
    parts = []
    for key, threshold, words in (
        ("labels_agreement", "labels", "of labels"),
        ("experts_worst_layer_agreement", "routing", "of top experts in the worst layer"),
    ):
        share, least = figures.get(key), asked.get(threshold)
        if isinstance(share, float | int):
            shown = math.floor(round(share * 1e4, 6)) / 100  # as the exporter's tables round: 100 means all
            parts.append(f"{shown:.2f} % {words} equal" + (f" (≥ {least:.1%})" if least is not None else ""))
    before, after = figures.get("metric_before"), figures.get("metric_after")
    if isinstance(before, float | int) and isinstance(after, float | int):
        parts.append(f"{figures.get('metric', 'metric')} {before:.4f} → {after:.4f}")
    mark = f", {gate.mark}" if gate.mark else ""
    return "; ".join([*parts, f"{gate.samples:,} samples{mark}"])


def _described(manifest: Manifest) -> Iterator[tuple[str, str]]:
    task, labels = manifest.task, manifest.task.labels
    few = ", ".join(labels[:10]) + (f" … {len(labels) - 10:,} more" if len(labels) > 10 else "")
    yield "name", manifest.name
    yield "created", manifest.created
    yield "schema", str(manifest.schema)
    yield "task", task.type + (f", threshold {task.threshold:g}" if task.threshold is not None else "")
    yield f"{len(labels):,} labels", few
    yield "main", manifest.main
    yield "complementary", ", ".join(manifest.complementary) or "none"
    if manifest.image is not None:
        yield "image", f"{manifest.image.height} x {manifest.image.width} pixels, {manifest.image.interpolation}"
    if manifest.text is not None:
        yield "text", f"at most {manifest.text.max_length:,} tokens"
    if manifest.audio is not None:
        clip = manifest.audio
        yield (
            "audio",
            f"{'' if clip.fixed else 'at most '}{clip.max_seconds:g} s at {clip.sample_rate:,} Hz, {clip.form}",
        )
    if manifest.video is not None:
        pixels = f"{manifest.video.image.height} x {manifest.video.image.width} pixels"
        yield "video", f"{manifest.video.frames} frames of {pixels}, of the first {manifest.video.max_seconds:g} s"
    if manifest.missing:
        yield "may be missing", ", ".join(manifest.missing)
    if manifest.routing is not None:
        kind = "dense" if manifest.routing.top_k is None else f"top-{manifest.routing.top_k}"
        yield "routing", f"{kind}, {manifest.routing.experts} experts in each of {manifest.routing.layers} layers"
    for graph in manifest.graphs:
        size = sum(manifest.files[name].bytes for name in graph.files) / 1e6
        runs = "" if graph.runs_on == "any" else f", for {graph.runs_on} only"
        yield f"graph {graph.name}", f"{graph.file}, {graph.precision}, opset {graph.opset}, {size:,.1f} MB{runs}"
        for part in graph.parts:
            size = sum(manifest.files[name].bytes for name in (part.file, *part.data)) / 1e6
            width = part.outputs[1].shape[1]
            yield "", f"of it {part.modality}: {part.file}, {size:,.1f} MB; {width:,} numbers for each input"
        if graph.gate is not None:
            yield "", _judged(graph.gate)
            if graph.gate.kept:
                yield "", f"kept in fp32: {', '.join(graph.gate.kept)}"
    if manifest.build.target is not None:
        yield "target", manifest.build.target
    if manifest.build.profile:
        sizes = (f"{axis} {':'.join(map(str, size))}" for axis, size in manifest.build.profile.items())
        yield "engines are built for", ", ".join(sizes)
    for key, figure in manifest.parity.figures.items():
        yield f"parity {key}", f"{figure:.3g}" if isinstance(figure, float) else str(figure)
    yield from manifest.versions.items()
