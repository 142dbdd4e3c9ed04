"""The picture of ``mope bench --plot``."""

from __future__ import annotations

import io
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from PIL import Image

from mope_deploy.bench.plot import Bar, draw

pytestmark = pytest.mark.device

BARS = [
    Bar("model, onnxruntime", "engine only", 1.0, 2.0, 4.0),
    Bar("a & <b> $x_1$", "end to end", 3.0, 3.5, 8.0),
]
SVG = "{http://www.w3.org/2000/svg}"


def texts(svg: bytes) -> set[str]:
    return {"".join(element.itertext()).strip() for element in ElementTree.fromstring(svg).iter(f"{SVG}text")}


def test_svg_says_everything_as_it_is() -> None:
    """Names are no formulas, and the medians are among the words."""
    found = texts(draw("tiny & <co> $y$", BARS, form="svg"))
    assert {"tiny & <co> $y$", "model, onnxruntime", "a & <b> $x_1$", "engine only", "end to end"} <= found
    assert {"p50", "1", "3", "milliseconds: bar p50, line to p95, tick p99"} <= found


def boxes(svg: bytes) -> list[float]:
    """Widths of what is filled in the colours of bars, in the order in which they are drawn, the legend's left out."""
    found = []
    for path in ElementTree.fromstring(svg).iter(f"{SVG}path"):
        if "#3b6ea8" in str(path.get("style")) or "#d08a36" in str(path.get("style")):
            numbers = [float(word) for word in str(path.get("d")).split() if not word.isalpha()]
            found.append(max(numbers[::2]) - min(numbers[::2]))
    return found[:2]


def test_bars_are_to_scale() -> None:
    one, three = boxes(draw("", BARS, form="svg"))
    assert three == pytest.approx(3 * one, rel=1e-3)


@pytest.mark.parametrize("largest", [0.0123, 7.0, 99_999.0])
def test_any_range_of_times(largest: float) -> None:
    assert f"{largest / 3:.3g}" in texts(draw("", [Bar("x" * 99, "y", largest / 3, largest / 2, largest)], form="svg"))


def test_png(recwarn: pytest.WarningsRecorder) -> None:
    with Image.open(io.BytesIO(draw("tiny · 数", BARS, form="png"))) as image:
        assert image.format == "PNG"
        assert len(image.convert("RGB").getcolors(1 << 20)) > 4
    # A letter that the font lacks is nothing to report on a terminal: run_app hides what this module warns of.
    assert {Path(one.filename).name for one in recwarn.list} <= {"plot.py"}
