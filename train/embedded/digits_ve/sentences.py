"""Sentences of digits-ve: one true, one undecidable and one false hypothesis about a scene, all of the same template.

Two rules keep one modality from giving the label away. The three sentences share their wording, so the text alone says
nothing. And a false or undecidable *number* is always one that lies face-up elsewhere on the table, so which digits are
visible says nothing either: one has to know on which card.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from train.embedded.digits_ve.scenes import COLOURS, EMPTY, FACE_DOWN

__all__ = ["CLAIMS", "LABELS", "PHRASES", "TEMPLATES", "Phrase", "Table", "hypotheses", "vocabulary"]

LABELS = ("entailment", "neutral", "contradiction")

_T = TypeVar("_T")

# Share of the pictures whose sentences are of this kind.
TEMPLATES = {"identity": 0.44, "parity": 0.35, "comparison": 0.13, "relation": 0.08}

# What a sentence of each kind can claim; a phrase has one word for each, in this order.
CLAIMS = {
    "identity": tuple("0123456789"),
    "parity": ("even", "odd"),
    "comparison": ("larger", "smaller"),
    "relation": ("left", "right", "above", "below"),
}

# Of the undecidable sentences, those about the face-down card; the others are about a colour that is not on the table.
_ABOUT_FACE_DOWN = 0.7


@dataclass(frozen=True)
class Phrase:
    """A sentence with holes: ``{a}`` and ``{b}`` take colours, ``{claim}`` takes one of ``words``."""

    pattern: str
    words: tuple[str, ...]

    def fill(self, colours: Sequence[int], claim: int) -> str:
        """Write the sentence about one or two colours (indices into COLOURS)."""
        names = dict(zip("ab", (list(COLOURS)[colour] for colour in colours), strict=False))
        text = self.pattern.format(claim=self.words[claim], **names)
        return text[0].upper() + text[1:]


_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_LARGER = ("larger", "smaller")
_GREATER = ("greater", "less")
_PLACES = ("left of", "right of", "above", "below")
_TO_THE = ("to the left of", "to the right of", "above", "below")

PHRASES: dict[str, tuple[Phrase, ...]] = {
    "identity": tuple(
        Phrase(pattern, words)
        for pattern in (
            "the {a} card shows the number {claim}.",
            "the number on the {a} card is {claim}.",
            "there is the digit {claim} on the {a} card.",
            "on the {a} card we see the digit {claim}.",
        )
        for words in (_NUMBERS, CLAIMS["identity"])
    ),
    "parity": tuple(
        Phrase(pattern, CLAIMS["parity"])
        for pattern in (
            "the number on the {a} card is {claim}.",
            "the {a} card shows an {claim} number.",
            "there is an {claim} digit on the {a} card.",
            "on the {a} card we see an {claim} number.",
        )
    ),
    "comparison": (
        Phrase("the number on the {a} card is {claim} than the number on the {b} card.", _LARGER),
        Phrase("the {a} card shows a {claim} number than the {b} card.", _LARGER),
        Phrase("the digit on the {a} card is {claim} than the digit on the {b} card.", _GREATER),
        Phrase("the {a} number is {claim} than the {b} number.", _GREATER),
    ),
    "relation": (
        Phrase("the {a} card is {claim} the {b} card.", _PLACES),
        Phrase("the {a} card lies {claim} the {b} card.", _TO_THE),
        Phrase("we see the {a} card {claim} the {b} card.", _TO_THE),
    ),
}


def vocabulary() -> list[str]:
    """Every word and sign that a sentence can hold, lower-case, sorted."""
    words = set(COLOURS)
    for phrases in PHRASES.values():
        for phrase in phrases:
            words.update(phrase.pattern.format(a="", b="", claim=" ".join(phrase.words)).replace(".", " . ").split())
    return sorted(words)


@dataclass(frozen=True)
class Table:
    """One scene: colour and digit of each slot, as in :class:`~train.embedded.digits_ve.scenes.Scenes`."""

    colour: tuple[int, ...]
    digit: tuple[int, ...]

    @property
    def cards(self) -> list[int]:
        """Slots that hold a card, face-up or not."""
        return [slot for slot, colour in enumerate(self.colour) if colour != EMPTY]

    @property
    def face_up(self) -> list[int]:
        return [slot for slot, digit in enumerate(self.digit) if digit >= 0]

    @property
    def face_down(self) -> int:
        return self.digit.index(FACE_DOWN)

    @property
    def absent(self) -> list[int]:
        """Colours that are not on the table."""
        return [colour for colour in range(len(COLOURS)) if colour not in self.colour]


def hypotheses(table: Table, template: str, rng: np.random.Generator) -> list[tuple[str, str]]:
    """One (label, sentence) of each label, in the order of LABELS, all of one phrase.

    ``template="parity"`` needs an even and an odd number face-up, so that a parity that is false is still on the table.
    """
    phrase = _pick(PHRASES[template], rng)
    write = {"identity": _identity, "parity": _parity, "comparison": _comparison, "relation": _relation}[template]
    return [(label, phrase.fill(*content)) for label, content in zip(LABELS, write(table, rng), strict=True)]


def _pick(items: Sequence[_T], rng: np.random.Generator) -> _T:
    return items[int(rng.integers(len(items)))]


def _unknown(table: Table, rng: np.random.Generator) -> int:
    """A colour whose number cannot be known."""
    if rng.random() < _ABOUT_FACE_DOWN:
        return table.colour[table.face_down]
    return _pick(table.absent, rng)


_Content = tuple[tuple[int, ...], int]  # colours, claim


def _identity(table: Table, rng: np.random.Generator) -> list[_Content]:
    shown = table.face_up
    true, false = _pick(shown, rng), _pick(shown, rng)
    elsewhere = _pick([slot for slot in shown if slot != false], rng)
    return [
        ((table.colour[true],), table.digit[true]),
        ((_unknown(table, rng),), table.digit[_pick(shown, rng)]),
        ((table.colour[false],), table.digit[elsewhere]),
    ]


def _parity(table: Table, rng: np.random.Generator) -> list[_Content]:
    shown = table.face_up
    assert {table.digit[slot] % 2 for slot in shown} == {0, 1}, "a parity scene shows an even and an odd number"
    true, false = _pick(shown, rng), _pick(shown, rng)
    return [
        ((table.colour[true],), table.digit[true] % 2),
        ((_unknown(table, rng),), int(rng.integers(2))),
        ((table.colour[false],), 1 - table.digit[false] % 2),
    ]


def _comparison(table: Table, rng: np.random.Generator) -> list[_Content]:
    def ordered(claim: int, holds: bool) -> tuple[int, ...]:
        pair = rng.permutation(table.face_up)[:2]
        larger, smaller = sorted((int(slot) for slot in pair), key=lambda slot: -table.digit[slot])
        first_larger = (claim == 0) == holds
        return tuple(table.colour[slot] for slot in ((larger, smaller) if first_larger else (smaller, larger)))

    def undecidable(claim: int) -> tuple[int, ...]:
        # "The hidden number is larger than 9" would be false, not undecidable.
        options = [
            (slot, known_first)
            for slot in table.face_up
            for known_first in (True, False)
            if table.digit[slot] != (0 if known_first == (claim == 0) else 9)
        ]
        slot, known_first = _pick(options, rng)
        pair = (table.colour[slot], _unknown(table, rng))
        return pair if known_first else pair[::-1]

    true, unknown, false = (int(claim) for claim in rng.integers(2, size=3))
    return [(ordered(true, True), true), (undecidable(unknown), unknown), (ordered(false, False), false)]


def _relation(table: Table, rng: np.random.Generator) -> list[_Content]:
    def pair(claim: int) -> tuple[int, ...]:
        """Two cards that stand as claimed; where the face-down card lies is plain to see."""
        pairs = [(a, b) for a in table.cards for b in table.cards if _stands(a, claim, b)]
        return tuple(table.colour[slot] for slot in _pick(pairs, rng))

    true, unknown, false = (int(claim) for claim in rng.integers(4, size=3))
    with_absent = (table.colour[_pick(table.cards, rng)], _pick(table.absent, rng))
    return [
        (pair(true), true),
        (with_absent if rng.random() < 0.5 else with_absent[::-1], unknown),
        (pair(false)[::-1], false),
    ]


def _stands(a: int, claim: int, b: int) -> bool:
    """Whether slot a lies left of, right of, above or below slot b."""
    across, down = a % 2 - b % 2, a // 2 - b // 2
    return (across < 0, across > 0, down < 0, down > 0)[claim]
