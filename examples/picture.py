"""One sample to look at: its picture on a terminal, and a page with its prediction and routing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image
from rich.text import Text

__all__ = ["draw", "save_page"]


def draw(path: Path, *, width: int = 48) -> Text:
    """The picture in ``path`` as coloured text, two pixels a character, ``width`` characters wide, its shape kept."""
    with Image.open(path) as image:
        height = max(2, round(width * image.height / image.width) // 2 * 2)
        pixels = image.convert("RGB").resize((width, height))
    drawn = Text()
    for row in range(0, height, 2):
        for column in range(width):
            upper, lower = (pixels.getpixel((column, row + offset)) for offset in (0, 1))
            assert isinstance(upper, tuple)
            assert isinstance(lower, tuple)
            drawn.append("▀", style=f"rgb({upper[0]},{upper[1]},{upper[2]}) on rgb({lower[0]},{lower[1]},{lower[2]})")
        drawn.append("\n")
    return drawn


def save_page(target: Path, image: Path, text: str, truth: str, answer: dict[str, Any]) -> None:
    """Write a PNG of one sample: picture, probabilities, and the experts' weights in each layer.

    Args:
        target: the PNG.
        image: the sample's picture.
        text: its text.
        truth: its label.
        answer: what ``mope run --routing --json`` printed for it.
    """
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    figure.suptitle(f"“{text}”   truth: {truth}")
    picture, bars, routing = figure.subplots(1, 3, width_ratios=(1, 1.2, 2))
    with Image.open(image) as opened:
        picture.imshow(opened.convert("RGB"), interpolation="nearest")
    picture.set_axis_off()
    names = list(answer["probabilities"])
    bars.barh(names, [answer["probabilities"][name] for name in names], color="#fb923c")
    bars.set(xlim=(0, 1), xlabel="probability")
    bars.invert_yaxis()
    weights = answer["routing"]  # (layers, K)
    drawn = routing.imshow(weights, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    routing.set(xlabel="expert", ylabel="layer", title="routing weights")
    # Counted from 1, as in the usage picture.
    routing.set_xticks(range(len(weights[0])), [str(k + 1) for k in range(len(weights[0]))], fontsize=8)
    routing.set_yticks(range(len(weights)), [str(i + 1) for i in range(len(weights))])
    figure.colorbar(drawn, ax=routing)
    figure.savefig(target, dpi=120)
