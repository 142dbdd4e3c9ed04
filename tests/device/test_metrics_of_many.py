"""Thousands of labels: what is written and shown stays small, and nothing grows with their square."""

from __future__ import annotations

import csv
import io
import json
import tracemalloc

import numpy as np
import pytest

from mope_deploy.cli.evaluate import _print
from mope_deploy.files import json_bytes
from mope_deploy.metrics import DENSE, confusion_matrix, confusions_csv, f1_scores, report

pytestmark = pytest.mark.device
LABELS = tuple(f"label, {i}" for i in range(3129))


@pytest.fixture(scope="module")
def answers() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    true = rng.zipf(1.3, 5000) % len(LABELS)
    return true, np.where(rng.random(5000) < 0.6, true, rng.zipf(1.3, 5000) % len(LABELS))


def test_the_most_frequent_confusions_stand_for_the_matrix(answers: tuple[np.ndarray, np.ndarray]) -> None:
    found = report(*answers, LABELS)
    assert "confusion_matrix" not in found
    assert len(json_bytes(found)) < 500_000
    cells = confusion_matrix(*answers, len(LABELS))
    np.fill_diagonal(cells, 0)
    assert found["confusions"]["pairs"] == np.count_nonzero(cells)
    most = found["confusions"]["most_frequent"]
    assert [one["count"] for one in most] == np.sort(cells, axis=None)[::-1][:DENSE].tolist()
    for one in most:
        assert cells[LABELS.index(one["true"]), LABELS.index(one["predicted"])] == one["count"]


def test_the_file_has_every_cell(answers: tuple[np.ndarray, np.ndarray]) -> None:
    rows = list(csv.DictReader(io.StringIO(confusions_csv(*answers, LABELS))))
    cells = np.zeros((len(LABELS), len(LABELS)), int)
    for row in rows:
        cells[LABELS.index(row["true"]), LABELS.index(row["predicted"])] = int(row["count"])
    np.testing.assert_array_equal(cells, confusion_matrix(*answers, len(LABELS)))


def test_few_classes_keep_their_matrix() -> None:
    true = np.arange(DENSE)
    found = report(true, true, LABELS[:DENSE])
    assert "confusions" not in found
    assert np.array_equal(found["confusion_matrix"], np.eye(DENSE))


def test_nothing_grows_with_the_square_of_the_classes() -> None:
    true = np.arange(20_000)
    tracemalloc.start()
    assert f1_scores(true, true, len(true))["macro"] == 1.0
    report(true, true, [str(i) for i in true.tolist()])
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


def test_a_terminal_gets_the_top_of_it(
    answers: tuple[np.ndarray, np.ndarray], capsys: pytest.CaptureFixture[str]
) -> None:
    found = report(*answers, LABELS)
    _print(json.loads(json_bytes(found)))
    printed = capsys.readouterr().out
    assert printed.count("\n") < 60
    assert "--json also has the other 3,109 labels" in printed
    assert f"the most frequent of {found['confusions']['pairs']:,} different confusions" in printed
    top = max(found["per_class"].items(), key=lambda item: item[1]["support"])[0]
    assert top in printed
