"""Faults below fp32 that leave most decisions as they are: the second expert, labels that are never given; and ties."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from export.gate import THRESHOLDS, Thresholds
from tests.export.gate.table import LAYERS, C, K, N, Table, compare, names, select, shown, weights

ASKED = Thresholds(labels=0.99, routing=0.99, metric=0.01)


def test_a_second_expert_that_is_always_wrong_fails(tmp_path: Path, random: np.random.Generator) -> None:
    soft, eager = weights(random), random.standard_normal((N, C)).astype(np.float32)
    model = Table(eager, soft, top_k=2)
    routing = select(soft, 2)
    assert compare(model, tmp_path, names(N), logits=eager, routing=routing, thresholds=ASKED).passed
    order = np.argsort(-soft, axis=-1)
    wrong = routing.copy()
    second, third = order[..., 1:2], order[..., 2:3]
    np.put_along_axis(wrong, third, np.take_along_axis(routing, second, -1), -1)
    np.put_along_axis(wrong, second, 0, -1)
    report = compare(model, tmp_path, names(N), logits=eager, routing=wrong, thresholds=ASKED)
    assert report.routing.share == 1  # the first one is right throughout
    assert len(report.problems()) == LAYERS
    assert "0 of 83 (0.00 %) samples have the same selected experts in layer 0" in report.problems()[0]
    assert "selected experts, worst layer" in shown(report)


def test_experts_that_tie_are_no_flip(tmp_path: Path, random: np.random.Generator) -> None:
    eager = random.standard_normal((N, C)).astype(np.float32)
    for top_k in (0, 1, 2):
        soft = np.full((N, LAYERS, K), 0.2, np.float32)
        chosen = np.zeros_like(soft)
        chosen[..., [3] if top_k == 1 else [1, 3]] = 1 / max(top_k, 1)  # every sample's: no value is left to compare
        routing = chosen if top_k else np.roll(soft * np.float32(1 + 1e-6 * np.arange(K)), 1, axis=-1)
        model = Table(eager, soft, top_k=top_k)
        report = compare(model, tmp_path, names(N), logits=eager, routing=routing, thresholds=THRESHOLDS["int8"])
        assert report.passed, report.problems()
        assert not report.exact
    # A flip is no tie: where nothing is left to compare because of it, values are missing.
    soft[1] = [0.3, 0.2, 0.2, 0.1, 0.2]
    asked = replace(THRESHOLDS["int8"], routing=0.0)
    report = compare(Table(eager, soft, top_k=2), tmp_path, names(N), logits=eager, routing=chosen, thresholds=asked)
    assert any(problem.startswith("logits change, of their spread, by nan") for problem in report.problems())


@pytest.mark.parametrize("labelled", [True, False])
def test_no_label_ever_of_hundreds_fails(labelled: bool, tmp_path: Path, random: np.random.Generator) -> None:
    """99.7 % of all answers are the same."""
    classes = 300
    eager = np.full((N, classes), -3, np.float32)
    eager[np.arange(N), random.integers(0, classes, N)] = 3
    model = Table(eager, multi_label=True)
    model.config.labels = tuple(f"label {i}" for i in range(classes))
    model.task = type(model.task)(labels=model.config.labels)
    truth = [(f"label {int(row.argmax())}",) if labelled else None for row in eager]
    never = np.full_like(eager, -3)
    assert compare(model, tmp_path, truth, logits=eager, thresholds=ASKED).passed
    report = compare(model, tmp_path, truth, logits=never, thresholds=ASKED)
    assert report.labels.share > 0.99
    assert "0 of 83 (0.00 %) labels that are given agree, at least 99.00 % must" in report.problems()
    assert "labels that are given" in shown(report)
    nothing = Table(never, multi_label=True)
    nothing.config.labels, nothing.task = model.config.labels, model.task
    assert compare(nothing, tmp_path, truth, logits=never, thresholds=ASKED).given_passed
