"""Metrics against scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as reference

from mope_deploy import metrics


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("classes", [2, 3, 7])
def test_single_label(seed: int, classes: int) -> None:
    draw = np.random.default_rng(seed)
    true, predicted = draw.integers(0, classes, 57), draw.integers(0, classes, 57)
    if seed == 3:  # a class that never occurs and one that is never predicted
        true[true == 0], predicted[predicted == 1] = 1, 0
    names = range(classes)
    scores = metrics.f1_scores(true, predicted, classes)
    assert metrics.accuracy(true, predicted) == pytest.approx(reference.accuracy_score(true, predicted))
    assert scores["macro"] == pytest.approx(reference.f1_score(true, predicted, average="macro", zero_division=0))
    assert scores["micro"] == pytest.approx(reference.f1_score(true, predicted, average="micro", zero_division=0))
    per_class = reference.f1_score(true, predicted, average=None, labels=list(names), zero_division=0)
    np.testing.assert_allclose(scores["per_class"], per_class)
    cells = reference.confusion_matrix(true, predicted, labels=list(names))
    np.testing.assert_array_equal(metrics.confusion_matrix(true, predicted, classes), cells)


def test_class_absent_on_both_sides() -> None:
    true, predicted = np.array([0, 0, 2]), np.array([0, 2, 2])
    want = reference.f1_score(true, predicted, average="macro")
    assert metrics.f1_scores(true, predicted, 4)["macro"] == pytest.approx(want)


@pytest.mark.parametrize("seed", range(4))
def test_multi_label(seed: int) -> None:
    draw = np.random.default_rng(seed)
    true, predicted = draw.random((41, 5)) < 0.3, draw.random((41, 5)) < 0.4
    true[:, 4] = predicted[:, 4] = False  # counts as 0
    if seed == 2:
        predicted[:] = False
    scores = metrics.f1_scores(true, predicted, 5)
    assert metrics.accuracy(true, predicted) == pytest.approx(reference.accuracy_score(true, predicted))
    for average in ("macro", "micro"):
        want = reference.f1_score(true, predicted, average=average, zero_division=0)
        assert scores[average] == pytest.approx(want)
    np.testing.assert_allclose(scores["per_class"], reference.f1_score(true, predicted, average=None, zero_division=0))


def test_report_has_the_same_numbers() -> None:
    draw = np.random.default_rng(9)
    true, predicted = draw.integers(0, 3, 30), draw.integers(0, 3, 30)
    found = metrics.report(true, predicted, ["a", "b", "c"])
    want = reference.classification_report(true, predicted, target_names=["a", "b", "c"], output_dict=True)
    assert found["samples"] == 30
    assert found["accuracy"] == pytest.approx(want["accuracy"])
    assert found["f1_macro"] == pytest.approx(want["macro avg"]["f1-score"])
    for label in "abc":
        assert found["per_class"][label]["f1"] == pytest.approx(want[label]["f1-score"])
        assert found["per_class"][label]["support"] == want[label]["support"]
