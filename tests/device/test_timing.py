"""How calls are timed against each other. No test looks at a real time."""

from __future__ import annotations

import time

import numpy as np
import pytest

from mope_deploy.bench.timing import interleave, ratio_of_medians, summary, warm_up

pytestmark = pytest.mark.device


def test_every_round_calls_each_once_in_an_order_that_varies() -> None:
    seen: list[str] = []
    calls = {name: (lambda name=name: seen.append(name)) for name in "abc"}
    times = interleave(calls, seconds=0.0, rounds=40)
    rounds = [tuple(seen[i : i + 3]) for i in range(0, len(seen), 3)]
    assert len(rounds) == 40
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(rounds)) == 6
    assert {name: values.shape for name, values in times.items()} == {"a": (40,), "b": (40,), "c": (40,)}


def test_times_belong_to_their_call(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def taking(seconds: float):
        def call() -> None:
            clock[0] += seconds

        return call

    times = interleave({"short": taking(0.001), "long": taking(0.25)}, seconds=1.0)
    assert set(times["short"].round(9)) == {1.0}
    assert set(times["long"].round(9)) == {250.0}
    assert len(times["long"]) == 4
    calls: list[int] = []
    warm_up({"x": lambda: (calls.append(1), taking(0.25)())}, calls_each=2, seconds=1.0)
    assert len(calls) == 4


def test_summary_and_ratio() -> None:
    times = np.arange(1.0, 102.0)  # 1 to 101 ms
    found = summary(times, samples=4)
    assert found == {"p50_ms": 51, "p95_ms": 96, "p99_ms": 100, "samples_per_s": pytest.approx(4e3 / 51), "calls": 101}
    base = np.full(101, 2.0)
    steady = ratio_of_medians(np.full(101, 3.0), base)
    assert (steady.value, steady.error) == (1.5, 0.0)
    noise = np.random.default_rng(0).normal(3.0, 0.3, (200, 400))
    found_ratios = [ratio_of_medians(row, np.full(400, 2.0)) for row in noise]
    spread = np.std([ratio.value for ratio in found_ratios])
    assert 0.7 < np.median([ratio.error for ratio in found_ratios]) / spread < 1.6  # the error is the true one's size
    assert ratio_of_medians(np.ones(5), np.ones(5)).error is None
