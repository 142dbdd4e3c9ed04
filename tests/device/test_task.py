"""Both kinds of task against a plain oracle of loops: labels, targets, probabilities and decisions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from mope_deploy import metrics
from mope_deploy.errors import DataError
from mope_deploy.task import TASKS, MultiLabel, SingleLabel

pytestmark = pytest.mark.device

LABELS = ("a", "b", "c")
SINGLE = SingleLabel(LABELS)
LOGITS = np.random.default_rng(1).normal(0, 3, (40, 3))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def softmax(row: list[float]) -> list[float]:
    powers = [math.exp(x - max(row)) for x in row]
    return [power / sum(powers) for power in powers]


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_single_label_decides_for_the_largest_logit(dtype: Any) -> None:
    logits = LOGITS.astype(dtype)
    rows = [[float(x) for x in row] for row in logits]
    best = [row.index(max(row)) for row in rows]
    assert SINGLE.decide(logits).tolist() == best
    assert SINGLE.cells(SINGLE.decide(logits)).tolist() == [[i] for i in best]
    found = SINGLE.probabilities(logits)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, [softmax(row) for row in rows], rtol=1e-13)
    for one, row, i in zip(logits, rows, best, strict=True):
        label, probability = SINGLE.name(one)
        assert label == LABELS[i]
        assert probability == pytest.approx(softmax(row)[i], rel=1e-13)
        second = sorted(row)[-2]
        ((what, decision, distance),) = SINGLE.verdicts(one)
        assert (what, decision) == ("label", LABELS[i])
        assert distance == pytest.approx(row[i] - second, rel=1e-3 if dtype is np.float16 else 1e-6)


@pytest.mark.parametrize("threshold", [0.5, 0.1, 0.45, 0.8, 0.99])
def test_multi_label_decides_for_what_reaches_the_threshold(threshold: float) -> None:
    task = MultiLabel(LABELS, threshold)
    given = [[sigmoid(x) >= threshold for x in row] for row in LOGITS.tolist()]
    assert any(map(any, given))
    assert not all(map(all, given))
    assert task.decide(LOGITS).tolist() == given
    assert task.cells(task.decide(LOGITS)).tolist() == given
    np.testing.assert_allclose(
        task.probabilities(LOGITS), [[sigmoid(x) for x in row] for row in LOGITS.tolist()], rtol=1e-12, atol=1e-16
    )
    bound = math.log(threshold / (1 - threshold))
    for row, yes in zip(LOGITS, given, strict=True):
        assert task.name(row) == (tuple(name for name, one in zip(LABELS, yes, strict=True) if one), None)
        verdicts = task.verdicts(row)
        assert [what for what, _, _ in verdicts] == ["label a", "label b", "label c"]
        assert [decision for _, decision, _ in verdicts] == ["yes" if one else "no" for one in yes]
        distances = [distance for _, _, distance in verdicts]
        assert distances == pytest.approx([abs(float(x) - bound) for x in row], rel=1e-12, abs=1e-12)


def test_ties_go_to_the_first_label_and_to_yes() -> None:
    tied = np.array([[1.0, 2.0, 2.0], [3.0, 3.0, 3.0]])
    assert SINGLE.decide(tied).tolist() == [1, 0]
    assert SINGLE.name(tied[1]) == ("a", pytest.approx(1 / 3))
    assert SINGLE.verdicts(tied[0]) == [("label", "b", 0.0)]
    assert MultiLabel(LABELS).decide(np.array([[0.0, -1e-9, 1e-9]])).tolist() == [[True, False, True]]
    assert MultiLabel(LABELS).verdicts(np.array([0.0, -1.0, 1.0]))[0] == ("label a", "yes", 0.0)


def test_the_threshold_and_not_the_largest_logit_decides() -> None:
    """The logit of 0.8 is 1.386."""
    found = MultiLabel(("a", "b"), 0.8).decide(np.array([[1.38, 1.39], [5.0, 2.0]]))
    assert found.tolist() == [[False, True], [True, True]]


def test_extreme_logits_do_not_overflow() -> None:
    extreme = np.array([[1e4, -1e4, 0.0]], np.float32)
    with np.errstate(all="raise", under="ignore"):
        assert SINGLE.probabilities(extreme).tolist() == [[1.0, 0.0, 0.0]]
        assert MultiLabel(LABELS).probabilities(extreme).tolist() == [[1.0, 0.0, 0.5]]


def test_the_ends_of_the_threshold() -> None:
    logits = np.array([3.0, -3.0, 0.0])
    for threshold, decision in ((0.0, "yes"), (1.0, "no")):
        verdicts = MultiLabel(LABELS, threshold).verdicts(logits)
        assert [(yes, distance) for _, yes, distance in verdicts] == [(decision, math.inf)] * 3


def test_targets_are_what_decisions_are() -> None:
    """Class indices or booleans, as the metrics take them; nothing said is -1, or no label."""
    single = SINGLE.encode(["c", None, "a"])
    assert (single.dtype, single.tolist()) == (np.dtype(np.int64), [2, -1, 0])
    several = MultiLabel(LABELS).encode([("c", "a"), (), None, ("b",)])
    assert several.dtype == np.dtype(bool)
    assert several.tolist() == [[True, False, True], [False] * 3, [False] * 3, [False, True, False]]
    assert MultiLabel(LABELS).encode([]).shape == (0, 3)
    for task, targets in ((SINGLE, SINGLE.encode(["a", "b"])), (MultiLabel(LABELS), several)):
        decided = task.decide(LOGITS[: len(targets)])
        assert task.metric in metrics.report(targets, decided, LABELS)
        assert task.cells(targets).shape == task.cells(decided).shape


def test_members_are_the_samples_of_each_label() -> None:
    assert SINGLE.members(SINGLE.encode(["c", None, "a", "c"])).tolist() == [
        [False, False, True, False],
        [False] * 4,
        [True, False, False, True],
    ]
    task = MultiLabel(LABELS)
    assert task.members(task.encode([("c", "a"), ("a",)])).tolist() == [[True, True], [False, False], [True, False]]


def test_counts_are_the_sums_of_members() -> None:
    cases = ((SINGLE, ["c", None, "a", "c"]), (MultiLabel(LABELS), [("c", "a"), (), ("a",)]), (SINGLE, []))
    for task, labels in cases:
        targets = task.encode(labels)  # type: ignore[arg-type]
        assert task.counts(targets).tolist() == task.members(targets).sum(axis=1).tolist()


def test_rows_of_the_other_kind_are_refused() -> None:
    def name(value: object, where: str) -> str:
        if value not in LABELS:
            raise DataError(f"{where}: unknown")
        return str(value)

    assert SINGLE.read("a", "f:1", name) == "a"
    assert MultiLabel().read(["c", "a"], "f:1", name) == ("c", "a")
    assert MultiLabel().read([], "f:1", name) == ()
    for task, value, words in (
        (SINGLE, ["a"], "f:1: label; received an array of 1 items; expected one label name; lists of names belong to"),
        (SINGLE, "z", "f:1: unknown"),
        (MultiLabel(), "a", """f:1: label; received 'a'; expected an array of label names; write ["a"]"""),
        (MultiLabel(), 3, "f:1: label; received 3; expected an array of label names"),
        (MultiLabel(), ["a", "a"], "f:1: label; received a name twice; expected every name once"),
        (MultiLabel(), ["a", "z"], "f:1: unknown"),
    ):
        with pytest.raises(DataError) as caught:
            task.read(value, "f:1", name)
        assert words in str(caught.value)


def test_every_kind_is_found_by_its_name() -> None:
    assert {name: (kind.fewest_labels, kind.several, kind().threshold) for name, kind in TASKS.items()} == {
        "single-label": (2, False, None),
        "multi-label": (1, True, 0.5),
    }
    assert all(kind.type == name and kind().labels == () for name, kind in TASKS.items())
