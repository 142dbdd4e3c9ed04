"""A picture of latencies: a bar to the median with its number, a line on to p95, a tick at p99."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from mope_deploy.extras import require

__all__ = ["Bar", "draw", "matplotlib"]

_COLOURS = ("#3b6ea8", "#d08a36", "#5b9467", "#8a6fae")


@dataclass(frozen=True)
class Bar:
    """One row, in milliseconds."""

    label: str  # at its left
    group: str  # rows of one group share a colour, which the legend names
    p50: float
    p95: float
    p99: float


def matplotlib() -> ModuleType:
    """The library with its figures, without its state for a whole process, or :class:`MissingExtraError`."""
    library = require("matplotlib", extra="plot", purpose="--plot")
    require("matplotlib.figure", extra="plot", purpose="--plot")
    return library


def draw(title: str, bars: Sequence[Bar], *, form: str) -> bytes:
    """The chart as a file in the ``form`` ``"svg"`` or ``"png"``, bars from top to bottom.

    Title and labels are taken as they are, never as formulas. Raises as :func:`matplotlib`.
    """
    library = matplotlib()
    figure = library.figure.Figure(figsize=(8.6, 1.6 + 0.28 * len(bars)), dpi=200, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", parse_math=False)
    _draw_bars(figure.add_subplot(), bars)
    for text in figure.legend(loc="outside lower left", ncols=9, frameon=False).get_texts():
        text.set_parse_math(False)
    buffer = io.BytesIO()
    with library.rc_context({"svg.fonttype": "none"}):
        figure.savefig(buffer, format=form)
    return buffer.getvalue()


def _draw_bars(axes: Any, bars: Sequence[Bar]) -> None:
    groups = dict.fromkeys(bar.group for bar in bars)
    for colour, group in zip(itertools.cycle(_COLOURS), groups, strict=False):
        rows = [row for row, bar in enumerate(bars) if bar.group == group]
        axes.barh(rows, [bars[row].p50 for row in rows], height=0.75, color=colour, label=group)
    for row, bar in enumerate(bars):
        axes.plot([bar.p50, bar.p95], [row, row], color="black", linewidth=1)
        axes.plot(bar.p99, row, color="black", marker="|", markersize=8)
    # Numbers stand in a column of their own: at the end of a bar they would be read as those of the line or the tick.
    for row, text in [(-1, "p50"), *((row, f"{bar.p50:.3g}") for row, bar in enumerate(bars))]:
        axes.annotate(text, (1, row), (34, 0), ("axes fraction", "data"), "offset points", ha="right", va="center")
    labels = [bar.label if len(bar.label) <= 40 else f"{bar.label[:39]}…" for bar in bars]
    axes.set_yticks(range(len(bars)), labels, parse_math=False)
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel("milliseconds: bar p50, line to p95, tick p99")
    axes.grid(axis="x", color="0.87")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
