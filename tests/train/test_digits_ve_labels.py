"""digits-ve: labels that an independent reading of the scenes confirms, and none to be had from one modality alone."""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from tests.train.tools import read_rows
from train.embedded.digits_ve import ensure_digits_ve

SPLITS = ("train", "validation", "test")
COLOURS = {
    "red": (222, 52, 48),
    "green": (58, 168, 72),
    "blue": (62, 110, 224),
    "yellow": (240, 212, 58),
    "purple": (150, 80, 196),
    "orange": (246, 142, 40),
}
NUMBERS = {
    word: n for n, word in enumerate(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"])
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_digits_ve(
        tmp_path_factory.mktemp("data") / "digits-ve", train_pairs=6000, validation_pairs=600, test_pairs=3000
    )


@pytest.fixture(scope="module")
def rows(folder: Path) -> dict[str, list[dict]]:
    return {split: read_rows(folder / f"{split}.jsonl") for split in SPLITS}


@pytest.fixture(scope="module")
def cards(folder: Path) -> dict[str, list[dict]]:
    return {scene["image"]: scene["cards"] for scene in read_rows(folder / "scenes.jsonl")}


# --- the independent reading: a sentence is true, false or open over every world that the picture allows -------------


def oracle(text: str, cards: list[dict]) -> str:
    """Label of a sentence about a scene, by trying every number that an unseen card may have."""
    words = re.findall(r"[a-z]+|\d", text.lower())
    by_colour = {card["colour"]: card for card in cards}
    named = [word for word in words if word in COLOURS]
    if side := {"left", "right", "above", "below"} & set(words):
        if not all(name in by_colour for name in named):
            return "neutral"
        (x0, y0), (x1, y1) = ((by_colour[name]["slot"] % 2, by_colour[name]["slot"] // 2) for name in named)
        return _label({{"left": x0 < x1, "right": x0 > x1, "above": y0 < y1, "below": y0 > y1}[side.pop()]})
    possible = [_numbers(by_colour.get(name)) for name in named]
    return _label({_claim(words, numbers) for numbers in itertools.product(*possible)})


def _numbers(card: dict | None) -> list[int]:
    return list(range(10)) if card is None or card["digit"] is None else [card["digit"]]


def _claim(words: list[str], numbers: tuple[int, ...]) -> bool:
    if "than" in words:
        first, second = numbers
        return first > second if {"larger", "greater"} & set(words) else first < second
    (number,) = numbers
    if "even" in words or "odd" in words:
        return (number % 2 == 0) == ("even" in words)
    (said,) = (NUMBERS.get(word, word) for word in words if word in NUMBERS or word.isdigit())
    return number == int(said)


def _label(truth: set[bool]) -> str:
    return "neutral" if len(truth) == 2 else "entailment" if truth == {True} else "contradiction"


def test_the_oracle_itself() -> None:
    scene = [
        {"slot": 0, "colour": "red", "digit": 9, "source": 0},
        {"slot": 3, "colour": "blue", "digit": None, "source": None},
        {"slot": 1, "colour": "green", "digit": 4, "source": 1},
    ]
    said = {
        "The red card shows the number nine.": "entailment",
        "The number on the red card is 4.": "contradiction",
        "The blue card shows an odd number.": "neutral",
        "The orange card shows an odd number.": "neutral",
        "The red number is less than the green number.": "contradiction",
        "The red number is less than the blue number.": "contradiction",  # nothing is larger than 9
        "The red number is greater than the blue number.": "neutral",  # the blue one may be a 9 too
        "The red card is left of the green card.": "entailment",
        "The red card is below the blue card.": "contradiction",
        "The red card is above the purple card.": "neutral",
    }
    assert {text: oracle(text, scene) for text in said} == said


def test_every_label_is_what_the_oracle_says(rows, cards) -> None:
    wrong = [row for split in SPLITS for row in rows[split] if oracle(row["text"], cards[row["image"]]) != row["label"]]
    assert not wrong, wrong[:3]


def test_a_false_number_is_always_on_another_card(rows, cards) -> None:
    """Otherwise the set of visible digits gives the label away."""
    seen = Counter()
    for row in itertools.chain(*rows.values()):
        shown = {card["digit"] for card in cards[row["image"]]} - {None}
        words = re.findall(r"[a-z]+|\d", row["text"].lower())
        if row["template"] == "identity":
            (said,) = (int(NUMBERS.get(word, word)) for word in words if word in NUMBERS or word.isdigit())
            assert said in shown, row
        elif row["template"] == "parity":
            assert {digit % 2 for digit in shown} == {0, 1}, row
        seen[row["template"]] += 1
    assert seen["identity"] > 1000
    assert seen["parity"] > 1000


# --- what is in a picture --------------------------------------------------------------------------------------------


def test_pictures_show_the_facts(folder: Path, cards) -> None:
    names, palette = list(COLOURS), np.array(list(COLOURS.values()), dtype=float)
    for image, facts in itertools.islice(cards.items(), 200):
        pixels = np.asarray(Image.open(folder / image)).astype(float)
        assert pixels.shape == (64, 64, 3)
        for slot in range(4):
            across, down = slot % 2 * 32, slot // 2 * 32
            inside = pixels[down + 5 : down + 27, across + 5 : across + 27]  # within the card, however it is shifted
            card = next((card for card in facts if card["slot"] == slot), None)
            if card is None:
                assert np.ptp(inside) == 0, "an empty slot is bare table"
                continue
            brightest = inside[tuple(np.argwhere(inside.sum(-1) == inside.sum(-1).max())[0])]
            unit = palette / np.linalg.norm(palette, axis=1, keepdims=True)
            assert names[int((unit @ brightest).argmax())] == card["colour"], (image, slot)
            plain = bool((inside == inside[0, 0]).all())
            assert plain == (card["digit"] is None), "a face-down card is a plain tile, a face-up one has ink"


def test_each_scene_has_one_face_down_card_and_no_repeats(cards) -> None:
    sizes = Counter()
    for facts in cards.values():
        shown = [card["digit"] for card in facts if card["digit"] is not None]
        assert len(shown) == len(set(shown)) == len(facts) - 1
        assert len({card["colour"] for card in facts}) == len({card["slot"] for card in facts}) == len(facts)
        sizes[len(facts)] += 1
    assert set(sizes) == {3, 4}
    assert min(sizes.values()) > 0.3 * len(cards)


def test_splits_share_no_handwriting(cards) -> None:
    digits = load_digits()
    used = defaultdict(set)
    for image, facts in cards.items():
        for card in facts:
            if card["digit"] is not None:
                assert digits.target[card["source"]] == card["digit"]
                used[image.split("/")[1]].add(card["source"])
    assert set(used) == set(SPLITS)
    for one, other in itertools.combinations(SPLITS, 2):
        assert not used[one] & used[other]
        bitmaps = [{digits.data[source].tobytes() for source in used[split]} for split in (one, other)]
        assert not bitmaps[0] & bitmaps[1], "no bitmap occurs in two splits under two indices"
    assert len(used["train"]) > 1100


# --- one modality alone ----------------------------------------------------------------------------------------------


def test_every_picture_has_each_label_once_in_one_template(rows) -> None:
    for split in SPLITS:
        by_image = defaultdict(list)
        for row in rows[split]:
            by_image[row["image"]].append(row)
        for three in by_image.values():
            assert sorted(row["label"] for row in three) == ["contradiction", "entailment", "neutral"]
            assert len({row["template"] for row in three}) == 1


def test_template_shares_are_exact(rows) -> None:
    for split in SPLITS:
        counts = Counter(row["template"] for row in rows[split])
        pictures = len(rows[split]) // 3
        for template, share in {"identity": 0.44, "parity": 0.35, "comparison": 0.13, "relation": 0.08}.items():
            assert abs(counts[template] / 3 - share * pictures) <= 1


def test_order_of_rows_says_nothing(rows) -> None:
    """The three sentences of a picture come in a random order."""
    first = Counter(row["label"] for row in rows["train"][::3])
    assert min(first[label] for label in ("entailment", "neutral", "contradiction")) > 0.28 * len(rows["train"]) / 3


def test_text_alone_is_near_chance(rows) -> None:
    majority = defaultdict(Counter)
    for row in rows["train"]:
        majority[row["text"]][row["label"]] += 1
    guess = [majority[row["text"]].most_common(1)[0][0] if majority[row["text"]] else "neutral" for row in rows["test"]]
    assert _share_right(guess, rows["test"]) < 0.37

    words = CountVectorizer(ngram_range=(1, 2), token_pattern=r"\w+", binary=True)
    train = words.fit_transform([row["text"] for row in rows["train"]])
    test = words.transform([row["text"] for row in rows["test"]])

    def predict(target: str) -> list[str]:
        model = LogisticRegression(max_iter=300, C=0.3).fit(train, [row[target] for row in rows["train"]])
        return list(model.predict(test))

    assert _share_right(predict("label"), rows["test"]) < 0.37
    # The same model does learn what is in the text.
    assert np.mean([a == row["template"] for a, row in zip(predict("template"), rows["test"], strict=True)]) > 0.99


def test_text_alone_is_near_chance_in_each_template(rows) -> None:
    """Word by word: no word goes with a label, so no template hides a leak behind the others' balance."""
    for template in ("identity", "parity", "comparison", "relation"):
        counts = defaultdict(Counter)
        for row in rows["train"] + rows["test"]:
            if row["template"] == template:
                for word in set(re.findall(r"\w+", row["text"].lower())):
                    counts[word][row["label"]] += 1
        for word, labels in counts.items():
            total = sum(labels.values())
            for label in ("entailment", "neutral", "contradiction"):
                deviation = abs(labels[label] - total / 3) / np.sqrt(total * 2 / 9)
                assert deviation < 4.5, (template, word, labels)


def test_image_alone_is_at_chance(folder: Path, rows) -> None:
    def features(split: str) -> np.ndarray:
        images = {row["image"] for row in rows[split]}
        small = {
            i: np.asarray(Image.open(folder / i).resize((8, 8), Image.Resampling.BOX)).ravel() / 255 for i in images
        }
        return np.stack([small[row["image"]] for row in rows[split]])

    train, test = features("train")[:3000], features("test")
    model = LogisticRegression(max_iter=60).fit(train, [row["label"] for row in rows["train"][:3000]])
    # Whatever it says about a picture is right for exactly one of the picture's three sentences.
    assert _share_right(list(model.predict(test)), rows["test"]) == pytest.approx(1 / 3)


def _share_right(guess: list[str], rows: list[dict]) -> float:
    return float(np.mean([said == row["label"] for said, row in zip(guess, rows, strict=True)]))
