"""Agreement, and what metrics refuse. (Values against scikit-learn: test_against_sklearn.py.)"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from mope_deploy import metrics
from mope_deploy.errors import UsageError

pytestmark = pytest.mark.device


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
