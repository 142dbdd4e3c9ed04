"""The two pictures of a run: which classes are confused, and which experts are used for what."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from mope_deploy.files import whole_file
from mope_deploy.metrics import accuracy, confusion_matrix
from mope_deploy.task import MultiLabel, SingleLabel
from train.evaluation import Usage

__all__ = ["DECISIONS", "confusion_picture", "label_picture", "usage_picture"]

Draw = TypeVar("Draw", bound=Callable[..., None])
MAX_NAMED = 45  # rows that still have room for a name each
MAX_SHOWN = 60  # characters of a name
MAX_NUMBERED = 25  # classes whose cells still have room for a number
PLEASANT = 1.5  # width to height
INK, FAINT, HAIR = "#1f2933", "#616e7c", "#cbd2d9"


def _as_written(draw: Draw) -> Draw:
    """Names of labels and groups are no formulas: a ``$`` is a dollar, whatever the user's matplotlibrc says."""

    @wraps(draw)
    def drawn(*args: Any, **kwargs: Any) -> None:
        with rc_context({"text.usetex": False, "text.parse_math": False}):
            draw(*args, **kwargs)

    return drawn  # type: ignore[return-value]


@_as_written
def confusion_picture(path: Path, confusion: Sequence[Sequence[int]], labels: Sequence[str], *, title: str) -> None:
    """Row = true class, column = predicted class; colour = share of the row, number = count."""
    counts = np.asarray(confusion, dtype=np.float64)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    C = len(labels)
    side = min(14.0, 2.6 + 0.62 * C if C <= MAX_NUMBERED else 2.6 + 0.16 * C)
    side += 0.08 * max(0, max(map(len, _short(labels)), default=0) - 20) if C <= MAX_NAMED else 0
    figure = Figure(figsize=(side + 0.6, side), layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    _name_ticks(axes, labels)
    axes.set_xlabel("predicted", color=INK)
    axes.set_ylabel("true", color=INK)
    axes.set_title(title, fontsize=11, color=INK, loc="left")
    if C <= MAX_NUMBERED:
        for (row, column), count in np.ndenumerate(counts):
            colour = "white" if shares[row, column] > 0.55 else INK
            axes.text(column, row, f"{int(count):,}", ha="center", va="center", fontsize=9, color=colour)
    _colour_bar(figure, shown, axes, "share of the true class")
    _save(figure, path)


@_as_written
def label_picture(
    path: Path, true: NDArray[np.bool_], predicted: NDArray[np.bool_], labels: Sequence[str], *, title: str
) -> None:
    """For multi-label tasks: per label, how often it was found, missed and wrongly given, as shares of where it occurs.

    Args:
        true, predicted: booleans (n, C).
    """
    found, missed, wrong = (true & predicted).sum(0), (true & ~predicted).sum(0), (~true & predicted).sum(0)
    figure = Figure(figsize=(8, min(20.0, 1.6 + 0.3 * len(labels))), layout="constrained")
    axes = figure.subplots()
    rows = np.arange(len(labels))
    axes.barh(rows, found, color="#2b6cb0", label="found")
    axes.barh(rows, missed, left=found, color="#bee3f8", label="missed")
    axes.barh(rows, -wrong, color="#e2936b", label="given, but not there")
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_yticks(rows, _short(labels) if len(labels) <= MAX_NAMED * 2 else [""] * len(labels), fontsize=8)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.xaxis.set_major_formatter(lambda value, _: f"{abs(value):,.0f}")
    axes.set_xlabel("samples", color=INK)
    axes.set_title(title, fontsize=11, color=INK, loc="left")
    axes.legend(fontsize=8, frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    _save(figure, path)


@_as_written
def usage_picture(path: Path, usage: Usage, *, title: str, grouped_by: str | None) -> None:
    """One panel a layer: rows = classes (and groups below a gap), columns = experts, colour = mean routing weight."""
    rows, layers, K = usage.mean.shape
    groups = rows - usage.classes
    gap = 1 if groups else 0
    named = rows <= MAX_NAMED
    names = max((len(name) for name in _short(usage.names)), default=0) * 0.075 if named else 0.3
    panel = (max(1.8, min(0.22 * K, 9.0)), (rows + gap) * (0.26 if named else max(0.03, 5 / rows)) + 0.75)  # inches
    sizes = {n: (names + n * panel[0] + 1.0, 0.7 + math.ceil(layers / n) * panel[1]) for n in range(1, layers + 1)}
    empty = {n: -layers % n / layers for n in sizes}
    across = min(sizes, key=lambda n: abs(math.log(sizes[n][0] / sizes[n][1] / PLEASANT)) + empty[n])
    down = math.ceil(layers / across)
    width, height = min(22.0, sizes[across][0]), min(40.0, sizes[across][1])
    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False, sharey=True)
    top = max(2.0 / K, float(np.nanmax(usage.mean)))
    shown: Any = None
    for layer in range(down * across):
        axes = panels[layer // across][layer % across]
        if layer >= layers:
            axes.set_axis_off()
            continue
        values = usage.mean[:, layer]  # (rows, K)
        if gap:
            values = np.insert(values, usage.classes, np.nan, axis=0)
        shown = axes.imshow(values, cmap="BuPu", vmin=0, vmax=top, aspect="auto", interpolation="nearest")
        axes.set_title(f"layer {layer + 1}", fontsize=10, color=INK, loc="left")
        axes.set_title(f"{usage.used[layer]} of {K} used", fontsize=8, color=FAINT, loc="right")
        step = max(1, math.ceil(K / 16))
        axes.set_xticks(range(0, K, step), [str(k + 1) for k in range(0, K, step)], fontsize=7, color=FAINT)
        if layer // across == down - 1 or layer + across >= layers:
            axes.set_xlabel("expert", fontsize=8, color=FAINT)
        if named:
            places = [row + (gap if row >= usage.classes else 0) for row in range(rows)]
            axes.set_yticks(places, _short(usage.names), fontsize=8, color=INK)
        else:
            axes.set_yticks([])
            axes.set_ylabel(f"{usage.classes} classes" + (f", {groups} groups" if groups else ""), fontsize=8)
        axes.tick_params(length=0)
        for side in axes.spines.values():
            side.set_visible(not gap)
            side.set_color(HAIR)
        if gap:
            for first, last in ((-0.5, usage.classes - 0.5), (usage.classes + 0.5, rows + 0.5)):
                corner, height = (-0.5, first), last - first
                axes.add_patch(Rectangle(corner, K, height, fill=False, edgecolor=HAIR, linewidth=0.8, clip_on=False))
    below = f"   rows: class{f', below: {grouped_by}' if groups else ''}"
    figure.suptitle(title + below, fontsize=11, color=INK, x=0.01, ha="left")
    _colour_bar(figure, shown, panels.ravel().tolist(), f"mean routing weight (even: {1 / K:.3g})")
    _save(figure, path)


def _short(names: Sequence[str]) -> list[str]:
    return [name if len(name) <= MAX_SHOWN else f"{name[: MAX_SHOWN - 1]}…" for name in names]


def _name_ticks(axes: Any, names: Sequence[str]) -> None:
    if len(names) > MAX_NAMED:
        axes.set_xticks([])
        axes.set_yticks([])
        return
    size = 9 if len(names) <= MAX_NUMBERED else 6
    axes.set_xticks(range(len(names)), _short(names), rotation=35 if len(names) <= 8 else 90, ha="right", fontsize=size)
    axes.set_yticks(range(len(names)), _short(names), fontsize=size)
    axes.tick_params(length=0)


def _colour_bar(figure: Figure, shown: Any, axes: Any, label: str) -> None:
    tall = figure.get_figheight()
    bar = figure.colorbar(
        shown, ax=axes, shrink=min(0.8, 4 / tall), aspect=24, fraction=0.05, pad=0.02, anchor=(0.0, 1.0)
    )
    bar.set_label(label, fontsize=8, color=FAINT)
    bar.ax.tick_params(labelsize=7, length=0, colors=FAINT)
    bar.outline.set_visible(False)


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130, facecolor="white")


def _confusion_of(
    path: Path, true: NDArray[np.int64], predicted: NDArray[np.int64], labels: Sequence[str], *, title: str
) -> None:
    title = f"{title}, accuracy {accuracy(true, predicted):.1%}"
    confusion_picture(path, confusion_matrix(true, predicted, len(labels)).tolist(), labels, title=title)


DECISIONS: dict[type, Callable[..., None]] = {SingleLabel: _confusion_of, MultiLabel: label_picture}
"""What draws a task's decisions against the truth, by its class: (path, true, predicted, labels, title)."""
