"""The gate counts what really differs, and lets nothing through that it has not compared."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from sklearn.metrics import f1_score

from export.gate import THRESHOLDS, Evaluation, measure_precision, near
from export.gate.measure import without_routing
from export.pack.golden import pick_samples
from export.precision import lowering
from mope_deploy.data import Sample
from mope_deploy.errors import DataError
from tests.export.conftest import Export, make_model
from tests.export.gate.faults import edit
from tests.export.gate.table import (
    ANYTHING,
    LAYERS,
    C,
    K,
    N,
    Table,
    best,
    compare,
    names,
    nudged,
    select,
    shown,
    table_samples,
    weights,
    write_table,
)
from tests.export.runs import write_data


def test_counts_are_those_of_plain_loops(tmp_path: Path, random: np.random.Generator) -> None:
    eager, soft = random.standard_normal((N, C)).astype(np.float32), weights(random)
    lowered, routing = eager + 0.3 * random.standard_normal((N, C)).astype(np.float32), nudged(random, soft)
    labels = names(N)
    report = compare(Table(eager, soft), tmp_path, labels, logits=lowered, routing=routing)

    same, right_before, right_after, flips = 0, 0, 0, {}
    for i in range(N):
        ours, theirs = best(eager[i]), best(lowered[i])
        same += ours == theirs
        right_before += "abcd"[ours] == labels[i]
        right_after += "abcd"[theirs] == labels[i]
        if ours != theirs:
            flips[f"rows.jsonl:{i + 1}"] = ("abcd"[ours], "abcd"[theirs], float(eager[i][ours]) - eager[i][theirs])
    assert 0 < len(flips) < N
    assert (report.labels.compared, report.labels.equal) == (N, same)
    assert {flip.sample: (flip.eager, flip.lowered, pytest.approx(flip.margin)) for flip in report.label_flips} == flips
    assert report.metric is not None
    assert (report.metric.name, report.metric.samples) == ("accuracy", N)
    assert (report.metric.before, report.metric.after) == pytest.approx((right_before / N, right_after / N))
    assert report.metric.change == pytest.approx((right_after - right_before) / N)

    expert_flips = {}
    for layer in range(LAYERS):
        same = 0
        for i in range(N):
            ours, theirs = best(soft[i, layer]), best(routing[i, layer])
            same += ours == theirs
            if ours != theirs:
                margin = float(soft[i, layer, ours]) - float(soft[i, layer, theirs])
                expert_flips[f"rows.jsonl:{i + 1}", f"layer {layer}"] = (f"expert {ours}", f"expert {theirs}", margin)
        assert (report.experts[layer].compared, report.experts[layer].equal) == (N, same)
    assert len({layer.equal for layer in report.experts}) == LAYERS  # a mean in their place would show
    assert report.routing.equal == N * LAYERS - len(expert_flips)
    assert report.worst_layer == min(range(LAYERS), key=lambda i: report.experts[i].equal)
    listed = {(flip.sample, flip.where): (flip.eager, flip.lowered, flip.margin) for flip in report.expert_flips}
    assert {key: (a, b, pytest.approx(margin)) for key, (a, b, margin) in listed.items()} == expert_flips
    margins = [flip.margin for flip in report.expert_flips]
    assert margins == sorted(margins, reverse=True)
    assert report.selections == ()

    largest, squares, scale, total = 0.0, 0.0, 0.0, 0.0
    for a, b in zip(lowered.ravel().tolist(), eager.ravel().tolist(), strict=True):
        largest, scale = max(largest, abs(a - b)), max(scale, abs(b))
        squares, total = squares + (a - b) ** 2, total + b * b
    assert report.logits.maximum == pytest.approx(largest / scale)
    assert report.logits.rms == pytest.approx((squares / total) ** 0.5)
    for layer in range(LAYERS):
        moved = sum(
            max(0.0, float(routing[i, layer, k]) - float(soft[i, layer, k])) for i in range(N) for k in range(K)
        )
        assert report.drift[layer] == pytest.approx(moved / N, rel=1e-4)  # what one expert gains another one loses
    assert report.passed  # nothing was asked for


def test_multi_label_answers_are_counted_one_by_one(tmp_path: Path, random: np.random.Generator) -> None:
    eager = random.standard_normal((N, C)).astype(np.float32)
    eager[3, 1] = 0.0  # a yes, as on the device: its probability is 0.5
    lowered = eager + 0.3 * random.standard_normal((N, C)).astype(np.float32)
    lowered[3, 1] = -1e-3
    truth = random.random((N, C)) < 0.3
    labels = [tuple("abcd"[c] for c in range(C) if truth[i, c]) for i in range(N)]
    assert () in labels  # no label is true; which is not the same as having none
    report = compare(Table(eager, multi_label=True), tmp_path, labels, logits=lowered)
    flips = {}
    for i in range(N):
        for c in range(C):
            if (eager[i, c] >= 0) != (lowered[i, c] >= 0):
                answers = ("yes", "no") if eager[i, c] >= 0 else ("no", "yes")
                flips[f"rows.jsonl:{i + 1}", f"label {'abcd'[c]}"] = (*answers, abs(float(eager[i, c])))
    assert ("rows.jsonl:4", "label b") in flips
    assert (report.labels.compared, report.labels.equal) == (N * C, N * C - len(flips))
    listed = {(flip.sample, flip.where): (flip.eager, flip.lowered, flip.margin) for flip in report.label_flips}
    assert {key: (a, b, pytest.approx(margin)) for key, (a, b, margin) in listed.items()} == flips
    assert report.metric is not None
    assert (report.metric.name, report.metric.samples) == ("f1_micro", N)
    assert report.metric.before == pytest.approx(f1_score(truth, eager >= 0, average="micro"))
    assert report.metric.after == pytest.approx(f1_score(truth, lowered >= 0, average="micro"))
    assert report.experts == ()
    assert report.passed  # a model without experts has none to compare


@pytest.mark.parametrize("top_k", [1, 2])
def test_top_k_compares_what_was_selected(top_k: int, tmp_path: Path, random: np.random.Generator) -> None:
    soft = weights(random)
    other = nudged(random, soft)
    routing = select(other, top_k)
    eager = random.standard_normal((N, C)).astype(np.float32)
    report = compare(Table(eager, soft, top_k=top_k), tmp_path, names(N), logits=eager, routing=routing)
    for layer in range(LAYERS):
        tops = sets = 0
        for i in range(N):
            ours, theirs = (sorted(range(K), key=lambda k: -side[i, layer, k])[:top_k] for side in (soft, other))
            tops += ours[0] == theirs[0]
            sets += set(ours) == set(theirs)
        assert report.experts[layer].equal == tops
        if top_k == 2:
            assert report.selections[layer].equal == sets != tops
    assert len(report.selections) == (LAYERS if top_k == 2 else 0)  # of one expert the set is the top one
    # An expert that was not selected has the weight 0; its margin is still told from the scores before selection.
    assert all(0 < flip.margin < 1 for flip in report.expert_flips)


def test_samples_without_labels_count_for_all_but_the_metric(tmp_path: Path, random: np.random.Generator) -> None:
    eager = random.standard_normal((30, C)).astype(np.float32)
    lowered = -eager
    labels: list[Any] = [None] * 30
    none = compare(Table(eager), tmp_path, labels, logits=lowered)
    assert none.metric is None
    assert none.labels.compared == 30
    assert "no sample has a label" in shown(none)
    assert "metric" not in none.figures()
    labels[4], labels[20] = "b", "d"
    some = compare(Table(eager), tmp_path, labels, logits=lowered)
    assert some.metric is not None
    assert some.metric.samples == 2
    assert some.metric.before == (int(best(eager[4]) == 1) + int(best(eager[20]) == 3)) / 2


def test_an_unknown_label_is_named_with_its_row() -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:2: unknown label; received 'z'; expected one of a, b"):
        Evaluation(Table(np.eye(2)), table_samples(["a", "z"]))  # type: ignore[arg-type]


def test_the_model_runs_once_for_all_files(tmp_path: Path, random: np.random.Generator) -> None:
    eager = random.standard_normal((N, C)).astype(np.float32)
    model = Table(eager)
    steps: list[str] = []
    evaluation = Evaluation(model, table_samples(names(N)), on_step=steps.append)  # type: ignore[arg-type]
    for right in (37, N):
        lowered = np.concatenate((eager[:right], -eager[right:]))
        file = write_table(tmp_path / "x.onnx", lowered)
        report = measure_precision(evaluation, file, model.describe(), precision="int8", thresholds=ANYTHING)
        assert (report.samples, report.labels.equal) == (N, right)
    assert model.calls == 7  # batches of 1, 3, 16, 16, 16, 16, 15: each once
    assert steps[-1] == f"comparing x.onnx with the model ({N} of {N} samples)"


def test_where_experts_are_selected_out_of_sight_no_value_is_judged(
    tmp_path: Path, random: np.random.Generator
) -> None:
    """One sample in 83 with another expert, and so another answer, is what routing's threshold allows."""
    eager = random.standard_normal((N, C)).astype(np.float32)
    eager[:, 0] += 9
    lowered = eager.copy()
    lowered[5] *= 0.1
    for top_k, passes in ((2, True), (0, False)):
        model = Table(eager, weights(random), top_k=top_k)
        asked = without_routing(THRESHOLDS["int8"], model)  # type: ignore[arg-type]
        assert compare(model, tmp_path, names(N), logits=lowered, thresholds=asked).passed == passes
        assert near(THRESHOLDS["int8"], model.describe(routing=False), model).labels == (0.9 if top_k else 0)  # type: ignore[arg-type]


def test_equal_logits_of_other_weights_are_not_equal_to_the_last_bit(
    tmp_path: Path, random: np.random.Generator
) -> None:
    eager, soft = random.standard_normal((N, C)).astype(np.float32), weights(random)
    for routing, exact in ((soft, True), (np.nextafter(soft, 0), False)):
        report = compare(Table(eager, soft), tmp_path, names(N), logits=eager, routing=routing)
        assert report.logits.maximum == 0
        assert report.exact == exact


# --- a real model ---


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("pictures") / "data", rows=40)


def test_a_faithful_file_passes_and_a_weight_more_or_less_shows(
    exports: dict[str, Export], pictures: Path, tmp_path: Path
) -> None:
    export = exports["top2"]
    samples: list[Sample] = pick_samples(pictures, export.model, 40, seed=0)
    evaluation = Evaluation(export.model, samples)
    arguments: dict[str, Any] = {"precision": "fp32", "thresholds": THRESHOLDS["fp32"]}
    report = measure_precision(evaluation, export.file, export.config, **arguments)
    assert report.passed
    assert 0 < report.logits.maximum < 1e-4
    assert report.selections[0].equal == report.experts[1].equal == 40
    proto = export.proto()
    edit(proto, "layers.1.router.keys.T", lambda keys: keys[:, ::-1])
    onnx.save(proto, tmp_path / "other.onnx")
    report = measure_precision(evaluation, tmp_path / "other.onnx", export.config, **arguments)
    assert report.experts[0].share == 1
    assert any("in layer 1" in problem for problem in report.problems())


def test_a_lowered_head_that_keeps_every_label_is_refused(
    exports: dict[str, Export], pictures: Path, tmp_path: Path
) -> None:
    """In a real int8 file: a head at a quarter of its size, and a constant in every logit, which a softmax hides."""
    export = exports["dense"]
    evaluation = Evaluation(export.model, pick_samples(pictures, export.model, 40, seed=0))
    lower = lowering(export.file, "int8", calibration=[batch.feeds for batch in evaluation.batches()])
    asked = dataclasses.replace(THRESHOLDS["int8"], labels=0.9, routing=0.9, metric=None)
    arguments: dict[str, Any] = {"precision": "int8", "thresholds": asked}
    (file,) = lower.write(tmp_path / "int8.onnx")
    sound = measure_precision(evaluation, file, export.config, **arguments)
    assert sound.passed
    for fault, words in (
        (lambda bias, weight: (bias / 4, weight / 4), "probabilities change"),
        (lambda b, w: (b + 1, w), "logits"),
    ):
        proto = onnx.load(file)
        (bias, weight) = (
            next(t.name for t in proto.graph.initializer if t.name.startswith(f"head.classifier.{kind}"))
            for kind in ("bias", "weight")
        )
        edit(proto, bias, lambda array, fault=fault: fault(array, array)[0])
        edit(proto, weight, lambda array, fault=fault: fault(array, array)[1])
        onnx.save(proto, tmp_path / "faulty.onnx")
        report = measure_precision(evaluation, tmp_path / "faulty.onnx", export.config, **arguments)
        assert report.labels.share >= sound.labels.share - 0.05
        assert any(problem.startswith(words) for problem in report.problems())


def test_the_model_is_left_in_its_mode(vit: Path, bert: Path, pictures: Path) -> None:
    model = make_model("dense", vit, bert)
    model.train()
    evaluation = Evaluation(model, pick_samples(pictures, model, 5, seed=0))
    eager = [batch.eager for batch in evaluation.batches()]
    assert model.training
    model.eval()
    batch = next(Evaluation(model, evaluation.samples).batches())
    assert np.array_equal(batch.eager["logits"], eager[0]["logits"])  # no noise, no dropout
