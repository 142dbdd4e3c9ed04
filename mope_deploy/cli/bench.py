"""``mope bench``: what a bundle costs on this device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from mope_deploy.cli.options import BundleFolder, EngineOptions, check_output, option, takes_engine_options
from mope_deploy.cli.printing import print_rows, say, tell
from mope_deploy.errors import UsageError
from mope_deploy.files import json_bytes, write_file

__all__ = ["bench"]

_PLOTS = (".svg", ".png")
_KINDS = {"engine": "engine only", "y_cached": "engine, y cached", "end_to_end": "end to end"}
_MS = ("p50_ms", "p95_ms", "p99_ms")
_ABSENT = "not reported"


@takes_engine_options(but=["graph", "rebuild", "cache_mb"])
def bench(
    bundle: BundleFolder,
    options: EngineOptions,
    variants: Annotated[
        str | None, option("Graphs, separated by commas, or all; by default the canonical one.")
    ] = None,
    duration: Annotated[
        float, option("Seconds, all variants together.", min=0.1, max=86_400, show_default=True)
    ] = 10.0,
    spinning: Annotated[bool, option("Let ONNX Runtime's idle threads spin, as mope run does.", "--spinning")] = False,
    batch: Annotated[int, option("Samples of each call.", min=1, max=4096, show_default=True)] = 1,
    text_len: Annotated[
        int | None, option("Tokens of each text; by default the golden texts as they are.", min=1)
    ] = None,
    to: Annotated[Path | None, option("Write the figures there.", "--json", metavar="FILE")] = None,
    plot: Annotated[Path | None, option("Draw them there: .svg or .png.", metavar="FILE")] = None,
) -> None:
    """Measure latency, throughput, memory and energy on this device, all variants in turn in one process."""
    check_output("--json", to)
    check_output("--plot", plot)
    names = None if variants == "all" else [name.strip() for name in (variants or "").split(",") if name.strip()]
    if variants is not None and names == []:
        raise UsageError("--variants", received=repr(variants), expected="names of graphs, or all")
    if plot is not None:  # what it needs is found missing before minutes of measuring, not after
        from mope_deploy.bench.plot import matplotlib

        if plot.suffix.lower() not in _PLOTS:
            raise UsageError("--plot", received=plot.name, expected="a file ending in .svg or .png")
        matplotlib()

    from mope_deploy.bench.measure import measure

    found = measure(
        bundle,
        variants=names,
        engine=options.engine,
        providers=options.providers,
        threads=options.threads,
        arena=options.arena,
        spinning=spinning,
        batch=batch,
        text_length=text_len,
        seconds=duration,
        on_step=tell,
    )
    if to is not None:
        write_file(to, json_bytes(found))
    if plot is not None:
        write_file(plot, _picture(found, plot.suffix.lower().lstrip(".")))
    _print(found)


def _picture(found: dict[str, Any], form: str) -> bytes:
    from mope_deploy.bench.plot import Bar, draw

    bars = [
        Bar(f"{row['graph']}, {row['engine_name']}", words, *(row[kind][key] for key in _MS))
        for row in found["variants"]
        for kind, words in _KINDS.items()
        if kind in row
    ]
    title = f"{found['bundle']['name']}, batch {found['settings']['batch']}, on {_name(found['machine'])}"
    return draw(title, bars, form=form)


def _print(found: dict[str, Any]) -> None:
    settings = found["settings"]
    texts = f", texts of {settings['text_length']} tokens" if settings["text_length"] else ""
    say(f"{_name(found['machine'])}: batch {settings['batch']}{texts}{_set_up(found)}")
    header = ("variant", "engine", "", "p50 ms", "p95 ms", "p99 ms", "samples/s", "÷ first")
    print_rows(_table(found), header=header, left=3)
    for line in _lines(found):
        say(line)
    for name, reason in found["unusable"].items():
        tell(f"note: {name} cannot be used here: {reason}")
    for file, reason in found["engines_not_run"].items():
        tell(f"note: {file} was not measured: {reason}")


def _table(found: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for row in found["variants"]:
        for kind, words in ((kind, words) for kind, words in _KINDS.items() if kind in row):
            ratio = row[kind]["ratio_to_first"]
            yield (
                *((row["graph"], row["engine_name"]) if kind == "engine" else ("", "")),
                words,
                *(f"{row[kind][key]:.3f}" for key in _MS),
                f"{row[kind]['samples_per_s']:,.1f}",
                f"{ratio['value']:.3f}" + (f" ± {ratio['error']:.3f}" if ratio["error"] is not None else ""),
            )
    yield "", "", "preprocessing", *(f"{found['preprocessing'][key]:.3f}" for key in _MS)


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
