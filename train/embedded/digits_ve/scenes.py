"""Scenes of digits-ve: coloured cards with real handwritten digits on a 2×2 table, sampled and drawn in numpy.

A scene has three or four cards in four slots. All cards have different colours, all face-up cards different digits, and
exactly one card lies face-down: a solid tile that shows its colour and hides its number. The digits are those of
scikit-learn's ``load_digits``, split by index before any scene is composed.

The data set and the pretraining of the image encoder draw their scenes here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from mope_deploy.extras import require

__all__ = [
    "COLOURS",
    "EMPTY",
    "FACE_DOWN",
    "IMAGE_SIZE",
    "SLOTS",
    "SPLITS",
    "Digits",
    "Scenes",
    "load_split",
    "render",
    "sample_scenes",
]

IMAGE_SIZE = 64
SLOTS = 4  # row-major: 0 top left, 1 top right, 2 bottom left, 3 bottom right
EMPTY, FACE_DOWN = -1, -2

COLOURS = {
    "red": (222, 52, 48),
    "green": (58, 168, 72),
    "blue": (62, 110, 224),
    "yellow": (240, 212, 58),
    "purple": (150, 80, 196),
    "orange": (246, 142, 40),
}

# Indices into load_digits. It has no writer ids; contiguous blocks are the closest one gets to unseen handwriting.
SPLITS = {"train": range(1200), "validation": range(1200, 1500), "test": range(1500, 1797)}

_SLOT = IMAGE_SIZE // 2
_CARD = 26
_INK = 24
_JITTER = 2  # pixels a card may lie off its slot's centre


@dataclass(frozen=True)
class Digits:
    """Handwritten digits to put on cards.

    Attributes:
        ink: (n, 24, 24) uint8, 255 where the pen wrote.
        value: (n,) int8, the digit 0–9.
        source: (n,) int16, index in ``load_digits``.
    """

    ink: NDArray[np.uint8]
    value: NDArray[np.int8]
    source: NDArray[np.int16]


@dataclass(frozen=True)
class Scenes:
    """What lies on B tables; every array is (B, 4), one column a slot.

    Attributes:
        colour: int8, index into :data:`COLOURS`, or ``EMPTY``.
        digit: int8, 0–9 on a face-up card, ``FACE_DOWN``, or ``EMPTY``.
        handwriting: int32, row of the :class:`Digits` the scene was made from, or -1 where no digit shows.
    """

    colour: NDArray[np.int8]
    digit: NDArray[np.int8]
    handwriting: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.colour)

    def __getitem__(self, rows: slice) -> Scenes:
        return Scenes(self.colour[rows], self.digit[rows], self.handwriting[rows])


@cache
def load_split(split: str) -> Digits:
    """The handwriting of one split, enlarged from 8×8 to 24×24.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    datasets = require("sklearn.datasets", extra="train", purpose="making digits-ve")
    images, values = datasets.load_digits(return_X_y=True)
    rows = np.array(SPLITS[split])
    small = images.reshape(-1, 8, 8)[rows] / 16.0  # (n, 8, 8), 0–1
    weights = _bilinear(8, _INK)
    ink = np.einsum("oi,nij,pj->nop", weights, small, weights)
    return Digits(
        ink=np.rint(ink * 255).astype(np.uint8), value=values[rows].astype(np.int8), source=rows.astype(np.int16)
    )


def _bilinear(size_in: int, size_out: int) -> NDArray[np.float64]:
    """(size_out, size_in) matrix of linear interpolation at pixel centres, the edge repeated."""
    at = np.clip((np.arange(size_out) + 0.5) * size_in / size_out - 0.5, 0, size_in - 1)
    return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(size_in)))


def sample_scenes(count: int, digits: Digits, rng: np.random.Generator) -> Scenes:
    """Draw ``count`` scenes: three or four cards, each half of the time; digits and colours uniform."""
    cards = np.where(rng.random(count) < 0.5, 3, 4)
    order = rng.random((count, SLOTS)).argsort(axis=1)  # the cards' places in a random order
    empty = (order == 3) & (cards == 3)[:, None]
    face_down = order == 0
    colour = rng.random((count, len(COLOURS))).argsort(axis=1)[:, :SLOTS]
    digit = rng.random((count, 10)).argsort(axis=1)[:, :SLOTS]

    by_digit = digits.value.argsort(kind="stable")
    available = np.bincount(digits.value, minlength=10)
    first = np.cumsum(available) - available
    handwriting = by_digit[first[digit] + (rng.random((count, SLOTS)) * available[digit]).astype(int)]

    shown = ~(empty | face_down)
    return Scenes(
        colour=np.where(empty, EMPTY, colour).astype(np.int8),
        digit=np.where(shown, digit, np.where(empty, EMPTY, FACE_DOWN)).astype(np.int8),
        handwriting=np.where(shown, handwriting, -1).astype(np.int32),
    )


def render(scenes: Scenes, digits: Digits, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw scenes, (B, 64, 64, 3) uint8 RGB: cards of varying tint lie a little off centre on a grey table."""
    count = len(scenes)
    shape = (count, SLOTS)
    down, right = rng.integers(0, 2 * _JITTER + 1, (2, *shape))
    tint = rng.uniform(0.85, 1.08, (*shape, 1)) + rng.uniform(-0.06, 0.06, (*shape, 3))
    table = rng.uniform(190, 235, (count, 1, 1, 1, 1)).astype(np.float32)
    pen = rng.uniform(0.75, 0.95, (*shape, 1, 1)).astype(np.float32)

    palette = np.array(list(COLOURS.values()), dtype=np.float32)
    colour = np.clip(palette[scenes.colour] * tint, 0, 255).astype(np.float32)  # (B, 4, 3)
    card = _shifted(np.full((1, _CARD, _CARD), 255, np.uint8))[0, down, right]  # (B, 4, 32, 32)
    written = _shifted(digits.ink)[scenes.handwriting, down, right] * (pen / 255)
    light = 1 - written * (scenes.handwriting >= 0)[..., None, None]

    face = colour[:, :, None, None, :] * light[..., None]  # (B, 4, 32, 32, 3)
    lies = (card > 0) & (scenes.colour != EMPTY)[..., None, None]
    slots = np.where(lies[..., None], face, table)
    grid = slots.reshape(count, 2, 2, _SLOT, _SLOT, 3).transpose(0, 1, 3, 2, 4, 5)
    return np.rint(grid).astype(np.uint8).reshape(count, IMAGE_SIZE, IMAGE_SIZE, 3)


def _shifted(pictures: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(n, 5, 5, 32, 32) view: every picture in its slot, for each offset down and right."""
    border = (_SLOT - pictures.shape[-1]) // 2 + _JITTER
    padded = np.pad(pictures, ((0, 0), (border, border), (border, border)))
    return np.lib.stride_tricks.sliding_window_view(padded, (_SLOT, _SLOT), axis=(1, 2))
