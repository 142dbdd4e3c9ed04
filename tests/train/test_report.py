"""Usage of experts and the pictures: right numbers, readable at every size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from tests.train.tools import split_of
from train.evaluation import Predictions, Usage, evaluate, usage
from train.report import confusion_picture, label_picture, usage_picture


def test_usage_is_the_mean_weight_of_each_class_group_and_layer(tiny: Path) -> None:
    split = split_of(tiny, group_by="template")
    rng = np.random.default_rng(0)
    routing = rng.dirichlet([0.3] * 5, size=(len(split), 2)).astype(np.float32)
    found = usage(split, routing, grouped=True)
    assert found.names == ("entailment", "neutral", "contradiction", "a", "b")
    assert found.classes == 3
    for layer in range(2):
        for k in range(5):
            for row, name in enumerate(found.names):
                column, value = (split.targets, row) if row < 3 else (split.columns["group"], name)
                picked = [float(routing[i, layer, k]) for i, v in enumerate(column.tolist()) if v == value]
                assert found.mean[row, layer, k] == pytest.approx(sum(picked) / len(picked), abs=1e-6)


def test_an_expert_counts_as_used_from_a_tenth_of_an_even_share_on(tiny: Path) -> None:
    split = split_of(tiny)  # 60 rows, K = 4: 60 / (10 · 4) = 1.5, so two samples are needed
    routing = np.zeros((60, 1, 4), np.float32)
    for sample, expert in enumerate([0] * 57 + [1] * 2 + [2]):
        routing[sample, 0, expert] = 1
    assert usage(split, routing, grouped=False).used.tolist() == [2]


def test_accuracy_of_each_group(tiny: Path) -> None:
    split = split_of(tiny, group_by="template")
    logits = np.zeros((60, 3), np.float32)
    true, groups = split.targets, split.columns["group"]
    for i in range(60):
        right = groups[i] == "a" or i < 20
        logits[i, true[i] if right else (true[i] + 1) % 3] = 1
    found = evaluate(split, Predictions(logits, None), group_by="template")
    assert found["by"]["template"]["a"] == {"samples": 30, "accuracy": 1.0}
    assert found["by"]["template"]["b"] == {"samples": 30, "accuracy": pytest.approx(10 / 30)}
    assert found["accuracy"] == pytest.approx(40 / 60)


@pytest.mark.parametrize(
    ("classes", "groups", "layers", "experts"), [(3, 4, 4, 16), (1, 0, 1, 1), (101, 0, 12, 4), (2, 2, 3, 256)]
)
def test_the_usage_picture_is_drawn_at_every_size(
    tmp_path: Path, classes: int, groups: int, layers: int, experts: int
) -> None:
    rng = np.random.default_rng(1)
    mean = rng.dirichlet([1.0] * experts, size=(classes + groups, layers))
    if classes > 1:
        mean[0] = np.nan  # a class without samples
    names = tuple(f"a rather long name {i}" for i in range(classes + groups))
    found = Usage(names, classes, mean, np.full(layers, experts))
    usage_picture(tmp_path / "u.png", found, title="Use of experts", grouped_by="template" if groups else None)
    with Image.open(tmp_path / "u.png") as picture:
        assert 250 < picture.width < 3200
        assert 150 < picture.height < 5400
        assert len(np.unique(np.asarray(picture.convert("L")))) > 20
    assert [path.name for path in tmp_path.iterdir()] == ["u.png"]


@pytest.mark.parametrize("classes", [2, 3, 23, 101])
def test_the_confusion_picture_shows_counts_as_long_as_they_fit(
    tmp_path: Path, classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[str] = []
    axes_of = Figure.subplots

    def spy(self: Figure, *args: object, **kwargs: object) -> object:
        axes = axes_of(self, *args, **kwargs)  # type: ignore[call-overload]
        text = axes.text
        axes.text = lambda x, y, value, **style: (drawn.append(value), text(x, y, value, **style))[1]
        return axes

    monkeypatch.setattr(Figure, "subplots", spy)
    counts = np.arange(classes * classes).reshape(classes, classes)
    labels = [f"label {i}" for i in range(classes)]
    confusion_picture(tmp_path / "c.png", counts.tolist(), labels, title="test")
    assert drawn == ([f"{value:,}" for value in range(classes * classes)] if classes <= 25 else [])
    with Image.open(tmp_path / "c.png") as picture:
        assert picture.width > 250


def test_the_label_picture(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    true, predicted = rng.random((2, 50, 23)) < 0.2
    label_picture(tmp_path / "l.png", true, predicted, [f"genre {i}" for i in range(23)], title="test")
    with Image.open(tmp_path / "l.png") as picture:
        assert picture.height > 600


@pytest.mark.parametrize("name", ["$", "$$", "$$$", "$x^2", r"\frac{a}{b}$", "a_b^c", "[red]", "_hidden", "x" * 256])
def test_names_are_drawn_as_they_are(tmp_path: Path, name: str) -> None:
    """Not as formulas, which matplotlib would make of what stands between dollars."""
    names = (name, f"other {name}")
    texts: list[str] = []
    draw = Text.draw

    def spy(self: Text, *args: object, **kwargs: object) -> None:
        texts.append(self.get_text())
        assert not self.get_parse_math()
        draw(self, *args, **kwargs)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch, rc_context({"text.usetex": False}):
        patch.setattr(Text, "draw", spy)
        confusion_picture(tmp_path / "c.png", [[1, 2], [3, 4]], names, title=name)
        shown = [one if len(one) <= 60 else one[:59] + "…" for one in names]
        assert set(shown) <= set(texts)
        mean = np.full((3, 1, 2), 0.5)
        used = Usage((*names, name), 2, mean, np.full(1, 2))
        usage_picture(tmp_path / "u.png", used, title=name, grouped_by=name)
        true = np.eye(2, dtype=bool)
        label_picture(tmp_path / "l.png", true, true, names, title=name)
        assert all(texts.count(one) >= 3 for one in shown)
