"""One report of all that was run: JSON, Markdown beside it, and a plot of every curve."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from mope_deploy.files import json_bytes, write_file

__all__ = ["markdown_table", "section", "target_lines", "write_report"]


def write_report(path: Path, report: Mapping[str, Any]) -> list[Path]:
    """Write ``path`` (JSON), the Markdown page of the same name, and an SVG for each curve; return them all.

    Raises:
        MopeError: one cannot be written.
    """
    curves = [curve for result in report["results"].values() for curve in result.get("curves", ())]
    plots = {path.with_name(_plot_name(path.stem, curve)): _plot(curve) for curve in curves}
    page = _markdown(report, stem=path.stem)
    files: dict[Path, str | bytes] = {path: json_bytes(report), path.with_suffix(".md"): page, **plots}
    for file, content in reversed(files.items()):  # what the page and the JSON name is there before them
        write_file(file, content)
    return list(files)


def _markdown(report: Mapping[str, Any], *, stem: str) -> str:
    """The page: machine, targets, then every benchmark's tables and the plots of files that begin with ``stem``."""
    lines = ["# Benchmarks", "", f"Made by `{report['command']}`.", *_how(report), "", "## Targets", ""]
    lines += markdown_table(
        ("target", "at most", "measured", "verdict"), [_target_cells(row) for row in report["targets"]]
    )
    for name, result in report["results"].items():
        lines += ["", *section(name, result, stem=stem)]
    return "\n".join(lines) + "\n"


def section(name: str, result: Mapping[str, Any], *, stem: str | None = None) -> Iterator[str]:
    """Lines about one benchmark; with its plots, whose files begin with ``stem``."""
    yield from (f"## {name}", "")
    if "error" in result:
        yield f"Failed: {result['error']}"
        return
    yield result["about"]
    for table in result["tables"]:
        yield from ("", f"**{table['title']}**", "", *markdown_table(table["columns"], table["rows"]))
    if stem is not None:
        for curve in result["curves"]:
            yield from ("", f"![{curve['title']}]({_plot_name(stem, curve)})")
    for reason in dict.fromkeys(result["not_run"].values()):
        yield from ("", f"Not run: {reason}.")


def _how(report: Mapping[str, Any]) -> Iterator[str]:
    """Settings and machine."""
    machine, settings = report["machine"], report["settings"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    shown = {name: machine[name] or "not reported" for name in ("board", "governor", "power_mode")}
    yield f"{settings['size']} encoders with random weights, {settings['form']} form, {settings['threads']} threads,"
    yield f"spinning off; each comparison {settings['rounds']} rounds and {settings['seconds']:g} s at least."
    yield "Ratios are of medians, interleaved in one process, warm; ± is a standard error."
    yield ""
    int8 = ", ".join(machine["int8_instructions"]) or "no int8 instructions"
    yield f"Machine: {machine['cores']} cores of {machine['cpu']} ({int8}),"
    yield f"{machine['memory_gib']} GiB; GPU: {', '.join(machine['gpus']) or 'none'}; board: {shown['board']};"
    yield f"governor: {shown['governor']}; power mode: {shown['power_mode']}; load average before: {machine['load']};"
    yield f"{machine['system']}, Python {machine['python']}, {versions}."


def target_lines(targets: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A line for each target, for a terminal."""
    for row in targets:
        what, most, measured, verdict = _target_cells(row)
        yield f"{row['name']:<16} {measured:>18}  (at most {most})  {verdict}    {what}"


def _target_cells(row: Mapping[str, Any]) -> tuple[str, str, str, str]:
    unit = f" {row['unit']}" if row["unit"] else ""
    most = "–" if row["limit"] is None else f"{row['limit']:.2f}{unit}"
    measured = "–"
    if row["value"] is not None:
        measured = f"{row['value']:.3f}" + (f" ± {row['error']:.3f}" if row["error"] is not None else "") + unit
    verdict = row["verdict"] + (f" by {row['by']:.3f}{unit}" if row["by"] is not None else "")
    return row["what"], most, measured, verdict + (f" ({row['note']})" if row["note"] else "")


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Iterator[str]:
    """Markdown; a column of numbers is set to the right."""

    def is_number(column: int) -> bool:
        cells = [str(row[column]) for row in rows]
        return bool(cells) and all(re.fullmatch(r"[-+]?[\d,.]+|–", cell) for cell in cells)

    yield f"| {' | '.join(columns)} |"
    yield f"| {' | '.join('---:' if is_number(i) else '---' for i in range(len(columns)))} |"
    for row in rows:
        yield f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in row)} |"


def _plot(curve: Mapping[str, Any]) -> bytes:
    """p50, p95 and p99 on the left, throughput on the right, both axes logarithmic."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasSVG(figure)
    latency, throughput = figure.subplots(1, 2)
    for name, points in curve["series"].items():
        x = [point["x"] for point in points]
        fitted = curve["exponents"].get(name)
        label = name if fitted is None else f"{name}, p = {fitted:.2f}"
        (line,) = latency.plot(x, [point["p50_ms"] for point in points], marker="o", label=label)
        colour = line.get_color()
        for percentile, dashes in (("p95_ms", "--"), ("p99_ms", ":")):
            latency.plot(x, [point[percentile] for point in points], marker="_", linestyle=dashes, color=colour)
        throughput.plot(x, [point["samples_per_s"] for point in points], marker="o", color=colour, label=name)
    for axes, what in ((latency, "ms: p50, dashed p95, dotted p99"), (throughput, "samples a second")):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel(curve["quantity"])
        axes.set_title(what, fontsize=10, loc="left")
        axes.grid(alpha=0.3)
    latency.legend(fontsize=8)
    drawn = io.BytesIO()
    with rc_context({"svg.fonttype": "none"}):  # text stays text
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    return drawn.getvalue()


def _plot_name(stem: str, curve: Mapping[str, Any]) -> str:
    return f"{stem}-{re.sub(r'[^a-z0-9]+', '-', curve['title'].lower()).strip('-')}.svg"
