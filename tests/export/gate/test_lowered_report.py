"""The precision gate's verdict: what fails it, what its table, figures and JSON say."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from export.gate import THRESHOLDS, Evaluation, Thresholds, measure_precision, require_precision
from export.limits import GATE_SAMPLES
from mope_deploy.errors import ParityError, UsageError
from tests.export.gate.faults import edit, rename
from tests.export.gate.table import (
    ANYTHING,
    C,
    N,
    Table,
    compare,
    names,
    select,
    shown,
    table_samples,
    weights,
    write_table,
)


def test_flipped_experts_fail_although_every_label_agrees(tmp_path: Path, random: np.random.Generator) -> None:
    soft, eager = weights(random), random.standard_normal((N, C)).astype(np.float32)
    routing = soft.copy()
    routing[7, 1] = np.roll(soft[7, 1], 1)
    asked = Thresholds(labels=1.0, routing=0.99, metric=0.0)
    model = Table(eager, soft)
    report = compare(model, tmp_path, names(N), logits=eager, routing=routing, thresholds=asked)
    assert report.labels.share == 1
    assert report.routing.share > 0.99  # over all layers it would do; in layer 1 alone it does not
    assert not report.passed
    expected = "82 of 83 (98.79 %) samples have the same top expert in layer 1, at least 99.00 % must"
    assert report.problems() == [expected]
    with pytest.raises(ParityError, match="not the model in int8: 82 of 83"):
        require_precision(report)
    assert compare(model, tmp_path, names(N), logits=eager, routing=soft, thresholds=asked).passed


def test_flipped_labels_fail(tmp_path: Path, random: np.random.Generator) -> None:
    eager = random.standard_normal((200, C)).astype(np.float32)
    lowered = eager.copy()
    lowered[[5, 9]] = -eager[[5, 9]]
    asked = Thresholds(labels=0.99, routing=None, metric=None)
    assert compare(Table(eager), tmp_path, names(200), logits=lowered, thresholds=asked).passed  # exactly 99 %
    lowered[11] = -eager[11]
    report = compare(Table(eager), tmp_path, names(200), logits=lowered, thresholds=asked)
    assert report.problems() == ["197 of 200 (98.50 %) predicted labels agree, at least 99.00 % must"]


def test_a_metric_may_drop_by_no_more_than_its_threshold(tmp_path: Path) -> None:
    truth = names(100)
    eager = np.array([[float("abcd"[c] == truth[i]) for c in range(C)] for i in range(100)], np.float32)
    eager[:20] = np.roll(eager[:20], 1, axis=1)  # 80 of 100 are right
    asked = Thresholds(labels=0.0, routing=None, metric=0.01)

    def after(wrong: list[int], right: list[int]) -> Any:
        lowered = eager.copy()
        lowered[wrong] = np.roll(eager[wrong], 1, axis=1)
        lowered[right] = np.roll(eager[right], -1, axis=1)
        return compare(Table(eager), tmp_path, truth, logits=lowered, thresholds=asked)

    assert after([50], []).passed  # 0.80 − 0.79 is more than 0.01 in binary
    assert after([50, 51], [3]).passed
    assert after([], [1, 2, 3]).passed  # better is no fault
    report = after([50, 51], [])
    assert report.problems() == ["accuracy drops from 80.00 % to 78.00 %, at most 1 points are allowed"]


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize(
    ("fault", "refused"),
    [
        (lambda b: 0.25 * b, {"probabilities change by", "probabilities change, in the mean", "logits change"}),
        (lambda b: b + 3, {"logits change"}),  # which a softmax does not see
        (lambda b: b + 3 * (np.arange(N) == 7)[:, None] * b, {"probabilities change by"}),  # one sample
    ],
)
def test_labels_that_agree_do_not_hide_other_logits(
    fault: Any, refused: set[str], multi_label: bool, tmp_path: Path, random: np.random.Generator
) -> None:
    eager = 2 * random.standard_normal((N, C)).astype(np.float32)
    eager[7] = [0.6, -0.5, -0.6, -0.4]
    if multi_label:
        eager = np.abs(eager)  # every answer stays yes
    asked = dataclasses.replace(THRESHOLDS["int8"], routing=None)
    model = Table(eager, multi_label=multi_label)
    labels = [("a",)] * N if multi_label else names(N)
    report = compare(model, tmp_path, labels, logits=fault(eager), thresholds=asked)
    assert report.labels.share == 1
    problems = report.problems()
    assert all(any(problem.startswith(words) for problem in problems) for words in refused), problems
    assert len(problems) >= len(refused)
    assert "FAIL" in shown(report)
    loose = dataclasses.replace(asked, probability=1.0, mean_probability=1.0, logits=1.0)
    assert compare(model, tmp_path, labels, logits=eager * 1.001, thresholds=asked).passed
    assert not compare(model, tmp_path, labels, logits=-eager, thresholds=loose).passed


def test_a_model_that_says_the_same_of_everything_can_pass(tmp_path: Path) -> None:
    """Its logits have no spread: they are measured by their size."""
    eager = np.full((N, 1), 2.0, np.float32)
    asked = dataclasses.replace(THRESHOLDS["fp16"], routing=None)
    model = Table(eager, multi_label=True)
    for logits, passed in ((eager, True), (eager * 1.001, True), (eager * 1.02, False), (np.zeros_like(eager), False)):
        assert compare(model, tmp_path, [("a",)] * N, logits=logits, thresholds=asked).passed == passed
    zero = Table(np.zeros((N, 1), np.float32), multi_label=True)
    assert compare(zero, tmp_path, [("a",)] * N, logits=np.zeros((N, 1)), thresholds=asked).passed
    assert not compare(zero, tmp_path, [("a",)] * N, logits=np.full((N, 1), 1.0), thresholds=asked).passed


def test_values_are_compared_where_the_same_experts_were_selected(tmp_path: Path, random: np.random.Generator) -> None:
    """Another expert is another answer: how many there may be is the threshold for routing's to say."""
    soft, eager = weights(random), random.standard_normal((N, C)).astype(np.float32)
    hard, logits = select(soft, 1), eager.copy()
    routing = hard.copy()
    routing[5, 1] = np.roll(hard[5, 1], 1)
    logits[5] *= 2
    asked = dataclasses.replace(THRESHOLDS["int8"], labels=0.0, routing=0.9, metric=None)
    model = Table(eager, soft, top_k=1)
    report = compare(model, tmp_path, names(N), logits=logits, routing=routing, thresholds=asked)
    assert report.passed
    assert report.probabilities.compared == N - 1
    assert not compare(model, tmp_path, names(N), logits=logits, routing=hard, thresholds=asked).passed
    none = compare(model, tmp_path, names(N), logits=eager, routing=np.roll(hard, 1, axis=2), thresholds=asked)
    assert any("probabilities change by nan" in problem for problem in none.problems())  # nothing was compared


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("output", ["logits", "routing"])
def test_nothing_infinite_passes(value: float, output: str, tmp_path: Path, random: np.random.Generator) -> None:
    soft, eager = weights(random), random.standard_normal((N, C)).astype(np.float32)
    tables = {"logits": eager.copy(), "routing": soft.copy()}
    tables[output][N - 1, -1] = value
    report = compare(Table(eager, soft), tmp_path, names(N), **tables)
    assert report.problems() == ["an output is NaN or infinite"]
    assert np.isnan(report.drift).all()
    assert json.loads(json.dumps(report.to_dict()))["finite"] is False


def test_a_reference_that_is_not_finite_proves_nothing(tmp_path: Path) -> None:
    eager = np.eye(3)
    eager[1, 1] = np.nan
    assert not compare(Table(eager), tmp_path, names(3, 3), logits=eager).passed


def test_fewer_samples_are_stated(tmp_path: Path) -> None:
    n = GATE_SAMPLES + 1
    eager = np.tile(np.eye(C), (n // C + 1, 1))[:n]
    model = Table(eager)
    report = compare(model, tmp_path, names(n), logits=eager)
    assert report.samples == n
    assert report.to_dict()["few_samples"] is False
    assert "only" not in shown(report)
    few = compare(model, tmp_path, names(GATE_SAMPLES - 1), logits=eager)
    assert few.to_dict()["few_samples"] is True
    assert "999 samples only; 1,000 would say more" in shown(few)


def test_fails_closed(tmp_path: Path, random: np.random.Generator) -> None:
    soft, eager = weights(random), random.standard_normal((N, C)).astype(np.float32)
    model = Table(eager, soft)
    nothing = compare(model, tmp_path, [], logits=eager, routing=soft)
    assert nothing.problems() == ["nothing was compared"]
    assert not nothing.ran
    assert "nothing was compared" in shown(nothing)
    silent = compare(model, tmp_path, names(N), logits=eager)  # no output routing
    assert silent.problems() == ["the file has no output routing, so which experts it chooses was not compared"]
    unasked = dataclasses.replace(ANYTHING, routing=None)
    assert compare(model, tmp_path, names(N), logits=eager, thresholds=unasked).passed
    evaluation = Evaluation(model, table_samples(names(N)))  # type: ignore[arg-type]

    def problem(change: Any) -> str:
        file = write_table(tmp_path / "x.onnx", eager, soft)
        proto = onnx.load(file)
        change(proto)
        onnx.save(proto, file)
        report = measure_precision(evaluation, file, model.describe(), precision="int8", thresholds=ANYTHING)
        assert not report.ran
        assert not report.passed
        assert report.samples == 0
        return report.problems()[0]

    assert problem(lambda m: rename(m, "logits", "scores")).startswith("names of the outputs")
    assert problem(lambda m: rename(m, "input_ids", "ids")).startswith("names of the inputs")
    assert problem(lambda m: m.graph.output.reverse()).startswith("names of the outputs")
    fewer = lambda m: edit(m, "logits.table", lambda table: table[: N - 5])  # noqa: E731
    assert problem(fewer).startswith("running samples 69 to 83")
    narrow = lambda m: edit(m, "routing.table", lambda table: table[:, :, 1:])  # noqa: E731
    assert "received" in problem(narrow)
    (tmp_path / "y.onnx").write_bytes(b"no graph")
    broken = measure_precision(evaluation, tmp_path / "y.onnx", model.describe(), precision="int8", thresholds=ANYTHING)
    assert broken.problems()[0].startswith("loading in ONNX Runtime")


def test_no_more_than_a_hundred_flips_are_listed_and_all_are_counted(
    tmp_path: Path, random: np.random.Generator
) -> None:
    eager = random.standard_normal((150, C)).astype(np.float32)
    report = compare(Table(eager), tmp_path, names(150), logits=-eager)
    assert report.labels.equal == 0
    assert len(report.label_flips) == 100
    margins = sorted((float(row.max() - row.min()) for row in eager), reverse=True)
    assert [flip.margin for flip in report.label_flips] == pytest.approx(margins[:100], rel=1e-6)


def test_the_table_the_figures_and_the_json_say_the_same(tmp_path: Path, random: np.random.Generator) -> None:
    soft, eager = weights(random), random.standard_normal((N, C)).astype(np.float32)
    routing = soft.copy()
    routing[2, 1] = np.roll(soft[2, 1], 1)
    asked = THRESHOLDS["fp16"]
    report = compare(
        Table(eager, soft), tmp_path, names(N), logits=eager, routing=routing, thresholds=asked, mark="CPU"
    )
    text = shown(report)
    assert "top expert, worst layer (1)" in text
    assert "82 equal, 98.79 %" in text
    assert "≥ 99.50 %" in text
    assert text.count("FAIL") == 1
    assert "computed on a CPU" in text
    figures = report.figures()
    assert figures["experts_worst_layer_agreement"] == 82 / 83
    assert figures["experts_equal"] == 3 * N - 1
    assert figures["passed"] is False
    document = report.to_dict()
    assert document["experts"][1] == {"compared": 83, "equal": 82, "share": 82 / 83}
    assert document["thresholds"] == THRESHOLDS["fp16"].to_dict()
    assert "≤ 0.05" in text
    assert document["probabilities"] == {"compared": 83, "maximum": 0.0, "mean": 0.0}
    assert (figures["probabilities_max_error"], figures["logits_rms_of_spread"]) == (0.0, 0.0)
    assert document["mark"] == "CPU"
    assert document["passed"] is False
    assert "/somewhere" not in json.dumps(document)  # no path of this machine goes into a bundle


def test_thresholds_are_shares() -> None:
    assert Thresholds(labels=0.9, routing=None, metric=None).to_dict() == {"labels": 0.9}
    for wrong in (99.9, -0.1, float("nan")):
        with pytest.raises(UsageError, match="a share from 0 to 1"):
            Thresholds(labels=wrong, routing=None, metric=None)
    assert THRESHOLDS["fp16"].labels == 0.999
    assert THRESHOLDS["int8"].to_dict() == {
        "labels": 0.99,
        "routing": 0.99,
        "metric": 0.01,
        "probability": 0.25,
        "mean_probability": 0.03,
        "logits": 0.1,
    }
