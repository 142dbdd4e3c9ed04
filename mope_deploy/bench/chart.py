"""A picture of latencies: a bar to the median, a whisker to p95, a tick at p99. No matplotlib, which no device needs.

One list of shapes is drawn twice, as SVG text or with Pillow.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from PIL import Image, ImageDraw, ImageFont

__all__ = ["Bar", "draw_png", "draw_svg"]

_WIDTH, _LABELS, _RIGHT, _TOP, _ROW, _BOTTOM = 860, 300, 90, 54, 26, 58  # pixels
_FONT = 13
_SCALE = 2  # of the PNG, whose pixels would else be coarse on today's screens
_COLOURS = ("#3b6ea8", "#d08a36", "#5b9467", "#8a6fae")
_INK, _GRID = "#222222", "#dddddd"


@dataclass(frozen=True)
class Bar:
    """One row.

    Attributes:
        label: at its left.
        group: rows of one group share a colour, which the legend names.
        p50, p95, p99: milliseconds.
    """

    label: str
    group: str
    p50: float
    p95: float
    p99: float


@dataclass(frozen=True)
class _Box:
    x: float
    y: float
    width: float
    height: float
    colour: str


@dataclass(frozen=True)
class _Text:
    x: float
    y: float  # of its middle
    text: str
    anchor: str  # "start", "middle" or "end"


def draw_svg(title: str, bars: Sequence[Bar]) -> bytes:
    """The chart as an SVG file; opens in any browser."""
    shapes, height = _shapes(title, bars)
    size = f'width="{_WIDTH}" height="{height}"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="{_FONT}">',
        f'<rect {size} fill="white"/>',
    ]
    for shape in shapes:
        if isinstance(shape, _Box):
            size = f'width="{shape.width:.1f}" height="{shape.height:.1f}"'
            lines.append(f'<rect x="{shape.x:.1f}" y="{shape.y:.1f}" {size} fill="{shape.colour}"/>')
        else:
            place = f'x="{shape.x:.1f}" y="{shape.y + _FONT / 3:.1f}" text-anchor="{shape.anchor}"'
            lines.append(f'<text {place} fill="{_INK}">{escape(shape.text)}</text>')
    return ("\n".join([*lines, "</svg>"]) + "\n").encode("utf-8")


def draw_png(title: str, bars: Sequence[Bar]) -> bytes:
    """The chart as a PNG file."""
    shapes, height = _shapes(title, bars)
    image = Image.new("RGB", (_WIDTH * _SCALE, height * _SCALE), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(_FONT * _SCALE)
    # Pillow's small built-in font, where it was built without FreeType, is placed by its upper left corner alone.
    anchored = isinstance(font, ImageFont.FreeTypeFont)
    for shape in shapes:
        if isinstance(shape, _Box):
            corners = (shape.x, shape.y, shape.x + max(shape.width, 0.5), shape.y + shape.height)
            draw.rectangle([value * _SCALE for value in corners], fill=shape.colour)
            continue
        x, y = shape.x * _SCALE, shape.y * _SCALE
        if anchored:
            draw.text((x, y), shape.text, _INK, font, anchor={"start": "lm", "middle": "mm", "end": "rm"}[shape.anchor])
        else:
            text = shape.text.encode("latin-1", "replace").decode("latin-1")
            left = {"start": 0.0, "middle": 0.5, "end": 1.0}[shape.anchor] * draw.textlength(text, font)
            draw.text((x - left, y - _FONT), text, _INK, font)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _shapes(title: str, bars: Sequence[Bar]) -> tuple[list[_Box | _Text], int]:
    """Everything to draw, in order, and the height of the picture."""
    groups = list(dict.fromkeys(bar.group for bar in bars))
    bottom = _TOP + _ROW * len(bars)
    step = _step(max(bar.p99 for bar in bars))
    scale = (_WIDTH - _LABELS - _RIGHT) / max(bar.p99 for bar in bars)  # pixels per millisecond
    shapes: list[_Box | _Text] = [_Text(12, 20, title, "start")]
    for number in range(int(max(bar.p99 for bar in bars) / step) + 1):
        x = _LABELS + number * step * scale
        shapes += [
            _Box(x, _TOP - 8, 1, bottom - _TOP + 10, _GRID),
            _Text(x, bottom + 14, f"{number * step:g}", "middle"),
        ]
    for i, bar in enumerate(bars):
        y, colour = _TOP + _ROW * i, _COLOURS[groups.index(bar.group) % len(_COLOURS)]
        middle, end = y + _ROW / 2 - 3, _LABELS + bar.p99 * scale
        shapes += [
            _Text(_LABELS - 8, middle, _cut(bar.label), "end"),
            _Box(_LABELS, y, bar.p50 * scale, _ROW - 6, colour),
            _Box(_LABELS + bar.p50 * scale, middle, (bar.p95 - bar.p50) * scale, 1.5, _INK),
            _Box(end, middle - 5, 1.5, 11, _INK),
            _Text(end + 8, middle, f"{bar.p50:.3g} ms", "start"),
        ]
    x = 12.0
    for number, group in enumerate(groups):
        shapes += [
            _Box(x, bottom + 32, 12, 12, _COLOURS[number % len(_COLOURS)]),
            _Text(x + 18, bottom + 38, group, "start"),
        ]
        x += 34 + 7.5 * len(group)
    shapes.append(_Text(_WIDTH - 12, bottom + 38, "ms: bar p50, line to p95, tick p99", "end"))
    return shapes, bottom + _BOTTOM


def _step(largest: float) -> float:
    """Milliseconds between two lines of the grid: 1, 2 or 5 times a power of ten, four to nine lines."""
    power = 10.0 ** math.floor(math.log10(largest))
    return next(power * factor for factor in (0.1, 0.2, 0.5, 1.0, 2.0) if largest / (power * factor) < 9.0)


def _cut(label: str) -> str:
    return label if len(label) <= 40 else f"{label[:39]}…"
