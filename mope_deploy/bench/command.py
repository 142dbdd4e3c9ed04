"""``mope bench``: the command line around :func:`mope_deploy.bench.measure.measure`."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from mope_deploy import console
from mope_deploy.errors import MopeError, UsageError

if TYPE_CHECKING:
    from mope_deploy.bench.chart import Bar

__all__ = ["bench"]

_PLOTS = (".svg", ".png")
_KINDS = {"engine": "engine only", "y_cached": "engine, y cached", "end_to_end": "end to end"}
_ABSENT = "not reported"


def bench(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder of the bundle.")],
    variants: Annotated[
        str | None,
        typer.Option(help="Graphs, separated by commas, or all; by default the canonical one.", show_default=False),
    ] = None,
    engine: Annotated[str, typer.Option(help="Inference engine: tensorrt, onnxruntime, or auto.")] = "auto",
    provider: Annotated[
        list[str] | None,
        typer.Option(help="ONNX Runtime's execution provider, as for mope run. Repeatable.", show_default=False),
    ] = None,
    duration: Annotated[float, typer.Option(min=0.1, max=86_400, help="Seconds, all variants together.")] = 10.0,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Threads of one operator; by default as mope run has them.", show_default=False),
    ] = None,
    arena: Annotated[
        bool | None,
        typer.Option(
            "--arena/--no-arena",
            help="Keep the memory of earlier runs for the next one; by default as mope run does.",
            show_default=False,
        ),
    ] = None,
    spinning: Annotated[
        bool, typer.Option("--spinning", help="Let ONNX Runtime's idle threads spin, as mope run does.")
    ] = False,
    batch: Annotated[int, typer.Option(min=1, max=4096, help="Samples of each call.")] = 1,
    text_len: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of each text; by default the golden texts as they are.", show_default=False),
    ] = None,
    to: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the figures there.", show_default=False)
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw them there: .svg or .png.", show_default=False)
    ] = None,
) -> None:
    """Measure latency, throughput, memory and energy on this device, all variants in turn in one process."""
    if plot is not None and plot.suffix.lower() not in _PLOTS:
        raise UsageError("--plot", received=plot.name, expected="a file ending in .svg or .png")
    for option, file in (("--json", to), ("--plot", plot)):
        if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
            raise UsageError(f"{option} {file}", received="no such folder, or a folder", expected="a file to write")
    names = None if variants == "all" else [name.strip() for name in (variants or "").split(",") if name.strip()]
    if variants is not None and names == []:
        raise UsageError("--variants", received=repr(variants), expected="names of graphs, or all")

    from mope_deploy.bench.measure import measure

    found = measure(
        bundle,
        variants=names,
        engine=engine,
        providers=provider or None,
        threads=threads,
        arena=arena,
        spinning=spinning,
        batch=batch,
        text_length=text_len,
        seconds=duration,
        on_step=lambda words: console.err.print(words, markup=False),
    )
    if to is not None:
        _write(to, (json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8"))
    if plot is not None:
        _write(plot, _picture(found, plot.suffix.lower()))
    _show(found)


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all; what is no ordinary file (``/dev/stdout``) is written as it is."""
    path = path.resolve()
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(data)
            return
        temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
        try:
            temporary.write_bytes(data)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise MopeError(f"{path} cannot be written", received=error.strerror) from error


def _picture(found: dict[str, Any], suffix: str) -> bytes:
    from mope_deploy.bench.chart import Bar, draw_png, draw_svg

    bars: list[Bar] = [
        Bar(
            f"{row['graph']}, {row['engine_name']}",
            words,
            row[kind]["p50_ms"],
            row[kind]["p95_ms"],
            row[kind]["p99_ms"],
        )
        for row in found["variants"]
        for kind, words in _KINDS.items()
        if kind in row
    ]
    title = f"{found['bundle']['name']}, batch {found['settings']['batch']}, on {_name(found['machine'])}"
    return draw_svg(title, bars) if suffix == ".svg" else draw_png(title, bars)


def _show(found: dict[str, Any]) -> None:
    say = console.out.print
    settings = found["settings"]
    texts = f", texts of {settings['text_length']} tokens" if settings["text_length"] else ""
    say(f"{_name(found['machine'])}: batch {settings['batch']}{texts}{_set_up(found)}", markup=False)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("variant", "engine", "", "p50 ms", "p95 ms", "p99 ms", "samples/s", "÷ first"):
        table.add_column(column, justify="left" if column in ("variant", "engine", "") else "right")
    for row in found["variants"]:
        for kind, words in ((kind, words) for kind, words in _KINDS.items() if kind in row):
            figures, ratio = row[kind], row[kind]["ratio_to_first"]
            named = (row["graph"], row["engine_name"]) if kind == "engine" else ("", "")
            table.add_row(
                *(Text(cell) for cell in named),
                words,
                *(f"{figures[key]:.3f}" for key in ("p50_ms", "p95_ms", "p99_ms")),
                f"{figures['samples_per_s']:,.1f}",
                f"{ratio['value']:.3f}" + (f" ± {ratio['error']:.3f}" if ratio["error"] is not None else ""),
            )
    preparing = found["preprocessing"]
    table.add_row("", "", "preprocessing", *(f"{preparing[key]:.3f}" for key in ("p50_ms", "p95_ms", "p99_ms")))
    console.print_table(table)
    for line in _lines(found):
        say(line, markup=False)
    for name, reason in found["unusable"].items():
        console.err.print(f"note: {name} cannot be used here: {reason}", markup=False)
    for file, reason in found["engines_not_run"].items():
        console.err.print(f"note: {file} was not measured: {reason}", markup=False)


def _lines(found: dict[str, Any]) -> Iterator[str]:
    """Everything but latency; the same lines on every board."""
    for row in found["variants"]:
        loaded = row["loaded_bytes"]  # not more than before where it fits into what an earlier variant gave back
        memory = _ABSENT if loaded is None else f"{loaded / 2**20:,.0f} MiB" if loaded > 0 else "no new memory"
        size = f"{row['bytes'] / 1e6:,.1f} MB on disk, {memory} when loaded"
        yield f"{row['graph']}: {row['precision']}, {size}, ready after {row['load_s']:.2f} s, on {row['device']}"
        for source, spent in row["energy"].items():
            per_sample = f"{spent['joules_per_sample'] * 1e3:,.2f} mJ per sample"
            yield f"{row['graph']}: energy of {source}: {per_sample}, {spent['watts']:.2f} W"
    idle = ", ".join(f"{source} {watts:.2f} W" for source, watts in found["idle_w"].items())
    peak, board, machine = found["memory"]["peak_bytes"], found["board"], found["machine"]
    yield f"memory: {_ABSENT if peak is None else f'{peak / 2**20:,.0f} MiB at most in this process'}"
    yield f"energy: {f'as above; idle: {idle}' if idle else _ABSENT}"
    clocks = (f"{name} {c['least']:,.0f} to {c['greatest']:,.0f} MHz" for name, c in board["megahertz"].items())
    heat = (f"{name} {c['first']:.0f} to {c['last']:.0f} °C" for name, c in board["celsius"].items())
    yield f"clocks: {', '.join(clocks) or _ABSENT}"
    yield f"temperature: {', '.join(heat) or _ABSENT}"
    yield f"power mode: {machine['power_mode'] or _ABSENT}; governor: {machine['governor'] or _ABSENT}"


def _set_up(found: dict[str, Any]) -> str:
    """Threads and arena of the sessions on a CPU, the same for all of them; nothing where there are none."""
    from mope_deploy.engines.onnxruntime.cpu import CpuSettings

    settings = next((row["settings"] for row in found["variants"] if row["settings"]), None)
    if settings is None:
        return ""
    return f", {CpuSettings(**settings)}, {'spinning' if settings['spinning'] else 'spinning off'}"


def _name(machine: dict[str, Any]) -> str:
    """What to call the machine in one line."""
    gpu = machine["device"]["gpu"]
    return " with ".join(name for name in (machine["model"] or machine["cpu"] or machine["device"]["os"], gpu) if name)
