"""What logits decide, which is what a near-tie flips."""

from __future__ import annotations

import numpy as np
import pytest

from mope_deploy.engines.golden import decided
from mope_deploy.manifest import Task

pytestmark = pytest.mark.device


def test_one_label_is_the_largest_logit() -> None:
    task = Task(type="single-label", labels=("a", "b", "c"), threshold=None)
    assert decided(np.array([[0.0, 2.0, 1.0], [3.0, -1.0, 0.0]]), task).tolist() == [[1], [0]]


def test_several_labels_are_those_that_reach_the_threshold() -> None:
    task = Task(type="multi-label", labels=("a", "b"), threshold=0.8)
    # The logit of 0.8 is 1.386; the largest logit alone says nothing here.
    assert decided(np.array([[1.38, 1.39], [5.0, 2.0]]), task).tolist() == [[False, True], [True, True]]
