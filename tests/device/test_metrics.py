"""Agreement, and what metrics refuse. (Values against scikit-learn: test_against_sklearn.py.)"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from mope_deploy import metrics
from mope_deploy.errors import UsageError

pytestmark = pytest.mark.device


def test_expert_agreement_is_per_layer() -> None:
    a = np.array([[[0.9, 0.1], [0.2, 0.8]], [[0.6, 0.4], [0.3, 0.7]], [[0.1, 0.9], [0.5, 0.4]]])  # (3, 2 layers, 2)
    b = a.copy()
    b[0, 1] = [0.8, 0.2]
    assert metrics.expert_agreement(a, a).tolist() == [1.0, 1.0]
    np.testing.assert_allclose(metrics.expert_agreement(a, b), [1.0, 2 / 3])


def test_agreement_counts_samples() -> None:
    assert metrics.agreement([0, 1, 2, 2], [0, 1, 1, 2]) == 0.75
    assert metrics.agreement(np.array([[True, False], [True, True]]), np.array([[True, False], [True, False]])) == 0.5


def test_report_is_json_ready() -> None:
    json.dumps(metrics.report(np.array([0, 1]), np.array([1, 1]), ["a", "b"]), allow_nan=False)
    found = metrics.report(np.array([[True, False]]), np.array([[True, True]]), ["a", "b"])
    json.dumps(found, allow_nan=False)
    assert "confusion_matrix" not in found


@pytest.mark.parametrize(
    ("true", "predicted"),
    [
        ([], []),
        ([0, 1], [0]),
        ([0.0, 1.0], [0, 1]),
        ([[0, 1]], [[0, 1]]),
        ([True], [True]),
        ([0, 3], [0, 1]),
        ([0, -1], [0, 1]),
    ],
)
def test_refused(true: Any, predicted: Any) -> None:
    with pytest.raises(UsageError):
        metrics.report(np.array(true), np.array(predicted), ["a", "b", "c"])


def test_routing_of_other_shapes_is_refused() -> None:
    with pytest.raises(UsageError):
        metrics.expert_agreement(np.zeros((2, 3, 4)), np.zeros((2, 3, 5)))
    with pytest.raises(UsageError):
        metrics.expert_agreement(np.zeros((0, 3, 4)), np.zeros((0, 3, 4)))
