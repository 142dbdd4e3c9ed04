"""A small picture on a terminal: two pixels a character, by the upper half block."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from rich.text import Text

__all__ = ["draw"]


def draw(path: Path, *, width: int = 48) -> Text:
    """The picture in ``path`` as coloured text, ``width`` characters wide, its shape kept."""
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
