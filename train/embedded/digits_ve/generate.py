"""Writes the data set: pictures, one JSONL of pairs a split, the facts of every scene, and where it all comes from.

The folder (docs/digits-ve.md)::

    train.jsonl, validation.jsonl, test.jsonl   {"image", "text", "label", "template"}, three rows a picture
    images/<split>/000001.png                   64×64 RGB
    scenes.jsonl                                {"image", "split", "cards": [{"slot", "colour", "digit", "source"}]}
    info.json                                   version, seed, sizes, SHA-256 of the JSONL files, source, licence
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mope_deploy.errors import DataError, UsageError
from mope_deploy.files import json_bytes, sha256, whole_folder
from mope_deploy.progress import track
from mope_deploy.reading import read_json
from train.embedded.digits_ve.scenes import (
    COLOURS,
    EMPTY,
    FACE_DOWN,
    IMAGE_SIZE,
    SPLITS,
    Digits,
    Scenes,
    load_split,
    render,
    sample_scenes,
)
from train.embedded.digits_ve.sentences import LABELS, TEMPLATES, Table, hypotheses

__all__ = ["VERSION", "ensure_digits_ve"]

VERSION = 1  # of the generator: raised whenever the same seed would give other data

_SOURCE = (
    "Optical Recognition of Handwritten Digits (E. Alpaydin, C. Kaynak; UCI Machine Learning Repository, 1998), "
    "the copy of its test set in scikit-learn's load_digits"
)
# scikit-learn's description of the digits names no licence; docs/digits-ve.md says what is known.
_LICENCE = (
    "digits: see the UCI Machine Learning Repository (cite Alpaydin and Kaynak); scenes and sentences: Apache-2.0"
)
_DRAWN_AT_ONCE = 64


def ensure_digits_ve(
    folder: Path | str,
    *,
    seed: int = 0,
    train_pairs: int = 20_000,
    validation_pairs: int = 2_000,
    test_pairs: int = 2_000,
) -> Path:
    """Make digits-ve in ``folder``, or find it there.

    The same arguments give the same bytes. The folder appears only when complete; one that holds digits-ve of the same
    version, seed and sizes is used as it is.

    Args:
        folder: where the data set goes; must not hold anything else.
        seed: of everything that is drawn, 0 or more.
        train_pairs, validation_pairs, test_pairs: number of picture-sentence pairs, at least 3; rounded to the nearest
            multiple of 3, because each picture has one sentence of each label.

    Returns:
        the folder.

    Raises:
        UsageError: a size or seed that cannot be, or a folder that holds something else.
        DataError: the folder cannot be written.
        MissingExtraError: scikit-learn, which brings the digits, is not installed.
    """
    folder = Path(folder)
    pairs = {"train": train_pairs, "validation": validation_pairs, "test": test_pairs}
    for split, count in pairs.items():
        if count < len(LABELS):
            raise UsageError(
                f"the {split} split of digits-ve is too small", received=f"{count} pairs", expected="3 or more"
            )
    if seed < 0:
        raise UsageError("the seed of digits-ve is negative", received=seed, expected="0 or more")
    request = {
        "name": "digits-ve",
        "version": VERSION,
        "seed": seed,
        "pictures": {split: round(count / len(LABELS)) for split, count in pairs.items()},
    }
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        return _checked(folder, request)
    with whole_folder(folder, error=DataError, sync=False) as new:
        _write(new, request)
    return folder


def _checked(folder: Path, request: dict[str, Any]) -> Path:
    """The folder, if it holds just what is asked for, whole."""
    todo = "name another folder, or delete this one to have it made again"
    try:
        info = read_json(folder / "info.json")
        found = {key: info.get(key) for key in request}
    except (OSError, ValueError, AttributeError):
        raise UsageError(f"{folder} exists and does not hold digits-ve", todo="name a new or an empty folder") from None
    if found != request:
        different = [key for key in request if found[key] != request[key]]
        raise UsageError(
            f"{folder} holds another digits-ve",
            received=", ".join(f"{key} {found[key]}" for key in different),
            expected=", ".join(f"{key} {request[key]}" for key in different),
            todo=todo,
        )
    for file, digest in info.get("sha256", {}).items():
        if not (folder / file).is_file() or sha256(folder / file) != digest:
            raise DataError(f"{folder / file} is missing or was altered", todo=todo)
    for split, count in request["pictures"].items():
        present = sum(1 for _ in (folder / "images" / split).glob("*.png"))
        if present != count:
            raise DataError(
                f"{folder / 'images' / split} is not whole", received=present, expected=f"{count} PNG", todo=todo
            )
    return folder


def _write(folder: Path, request: dict[str, Any]) -> None:
    with _lines(folder / "scenes.jsonl") as facts:
        for number, split in enumerate(SPLITS):
            rng = np.random.default_rng([request["seed"], VERSION, number])
            _write_split(folder, split, request["pictures"][split], rng, facts)
    info = {
        **request,
        "pairs": {split: count * len(LABELS) for split, count in request["pictures"].items()},
        "labels": list(LABELS),
        "templates": TEMPLATES,
        "image": [IMAGE_SIZE, IMAGE_SIZE, 3],
        "source": _SOURCE,
        "licence": _LICENCE,
        "sha256": {f"{name}.jsonl": sha256(folder / f"{name}.jsonl") for name in (*SPLITS, "scenes")},
    }
    (folder / "info.json").write_bytes(json_bytes(info))


def _lines(path: Path) -> TextIO:
    return path.open("w", encoding="utf-8", newline="\n")


def _write_split(folder: Path, split: str, pictures: int, rng: np.random.Generator, facts: TextIO) -> None:
    """Draw the pictures of a split and write them, their pairs and their facts."""
    digits = load_split(split)
    templates, scenes = _plan(pictures, digits, rng)
    (folder / "images" / split).mkdir(parents=True)
    with _lines(folder / f"{split}.jsonl") as rows:
        for at in track(range(0, pictures, _DRAWN_AT_ONCE), what=f"digits-ve {split}"):
            part = scenes[at : at + _DRAWN_AT_ONCE]
            for offset, pixels in enumerate(render(part, digits, rng)):
                image, template = f"images/{split}/{at + offset + 1:06d}.png", templates[at + offset]
                Image.fromarray(pixels).save(folder / image, compress_level=6)
                facts.write(json.dumps({"image": image, "split": split, "cards": _cards(part, offset, digits)}) + "\n")
                table = Table(tuple(part.colour[offset].tolist()), tuple(part.digit[offset].tolist()))
                pairs = hypotheses(table, template, rng)
                for i in rng.permutation(len(pairs)):
                    label, text = pairs[i]
                    rows.write(json.dumps({"image": image, "text": text, "label": label, "template": template}) + "\n")


def _plan(pictures: int, digits: Digits, rng: np.random.Generator) -> tuple[list[str], Scenes]:
    """Which template each picture gets, in exact shares and a random order, and a scene that suits it."""
    ends = [round(share * pictures) for share in np.cumsum(list(TEMPLATES.values()))]
    names = np.repeat(list(TEMPLATES), np.diff([0, *ends]))
    templates = names[rng.permutation(pictures)]
    scenes = sample_scenes(pictures, digits, rng)
    while len(unsuited := np.flatnonzero((templates == "parity") & ~_shows_both_parities(scenes))):
        again = sample_scenes(len(unsuited), digits, rng)
        for name in ("colour", "digit", "handwriting"):
            getattr(scenes, name)[unsuited] = getattr(again, name)
    return templates.tolist(), scenes


def _shows_both_parities(scenes: Scenes) -> NDArray[np.bool_]:
    shown, odd = scenes.digit >= 0, scenes.digit % 2 == 1
    return (shown & odd).any(axis=1) & (shown & ~odd).any(axis=1)


def _cards(scenes: Scenes, row: int, digits: Digits) -> list[dict[str, Any]]:
    """The facts of a scene; of a face-down card neither digit nor source are known."""
    slots = zip(scenes.colour[row].tolist(), scenes.digit[row].tolist(), scenes.handwriting[row].tolist(), strict=True)
    return [
        {
            "slot": slot,
            "colour": list(COLOURS)[colour],
            "digit": None if digit == FACE_DOWN else digit,
            "source": None if digit == FACE_DOWN else int(digits.source[drawn]),
        }
        for slot, (colour, digit, drawn) in enumerate(slots)
        if colour != EMPTY
    ]
