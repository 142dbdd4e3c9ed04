"""The gate counts what really differs, and lets nothing through that it has not compared."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from rich.console import Console
from sklearn.metrics import f1_score

from export.gate import THRESHOLDS, Evaluation, Thresholds, measure_precision, require_precision
from export.limits import GATE_SAMPLES
from export.pack.golden import pick_samples
from mope_deploy.data import Sample
from mope_deploy.errors import DataError, ParityError, UsageError
from tests.export.conftest import Export, make_model
from tests.export.runs import write_data
from tests.export.table import ANYTHING, Table, compare, select, table_samples, write_table
from tests.export.test_parity import edit, rename

N, C, LAYERS, K = 83, 4, 3, 5  # 1 + 3 + 4·16 + 15: the last batch is a part of one


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


def weights(random: np.random.Generator, n: int = N) -> np.ndarray:
    """Routing weights (n, layers, K); rows sum to 1."""
    raw = np.exp(2 * random.standard_normal((n, LAYERS, K)))
    return (raw / raw.sum(axis=-1, keepdims=True)).astype(np.float32)


def nudged(random: np.random.Generator, soft: np.ndarray, by: float = 0.3) -> np.ndarray:
    """Other weights, near enough for most top experts to stay."""
    raw = soft * np.exp(by * random.standard_normal(soft.shape))
    return (raw / raw.sum(axis=-1, keepdims=True)).astype(np.float32)


def best(values: np.ndarray) -> int:
    """argmax by a loop: the first of equals."""
    found = 0
    for i in range(1, len(values)):
        if values[i] > values[found]:
            found = i
    return found


def names(n: int, classes: int = C) -> list[Any]:
    return ["abcd"[i % classes] for i in range(n)]


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


def test_a_limit_takes_the_first_samples_and_the_model_runs_once(tmp_path: Path, random: np.random.Generator) -> None:
    eager = random.standard_normal((N, C)).astype(np.float32)
    lowered = eager.copy()
    lowered[37:] = -eager[37:]  # the first 37 agree
    model = Table(eager)
    steps: list[str] = []
    evaluation = Evaluation(model, table_samples(names(N)), on_step=steps.append)  # type: ignore[arg-type]
    file = write_table(tmp_path / "x.onnx", lowered)
    found = {}
    for limit in (1, 36, 37, 38, N, 10 * N, None):
        arguments: dict[str, Any] = {"precision": "int8", "thresholds": ANYTHING, "limit": limit}
        report = measure_precision(evaluation, file, model.describe(), **arguments)
        found[limit] = report.samples, report.samples - report.labels.equal
    assert found == {
        1: (1, 0),
        36: (36, 0),
        37: (37, 0),
        38: (38, 1),
        N: (N, N - 37),
        10 * N: (N, N - 37),
        None: (N, N - 37),
    }
    assert model.calls == 7  # batches of 1, 3, 16, 16, 16, 16, 15: each once for all seven comparisons
    assert steps[-1] == f"comparing x.onnx with the model ({N} of {N} samples)"


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


def shown(report: Any) -> str:
    text = io.StringIO()
    Console(file=text, width=100).print(report.table())
    return text.getvalue()


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
    assert document["thresholds"] == {"labels": 0.999, "routing": 0.995, "metric": 0.005}
    assert document["mark"] == "CPU"
    assert document["passed"] is False
    assert "/somewhere" not in json.dumps(document)  # no path of this machine goes into a bundle


def test_thresholds_are_shares() -> None:
    assert Thresholds(labels=0.9, routing=None, metric=None).to_dict() == {"labels": 0.9}
    for wrong in (99.9, -0.1, float("nan")):
        with pytest.raises(UsageError, match="a share from 0 to 1"):
            Thresholds(labels=wrong, routing=None, metric=None)
    assert THRESHOLDS["fp16"].labels == 0.999
    assert THRESHOLDS["int8"].to_dict() == {"labels": 0.99, "routing": 0.99, "metric": 0.01}


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


def test_the_model_is_left_in_its_mode(vit: Path, bert: Path, pictures: Path) -> None:
    model = make_model("dense", vit, bert)
    model.train()
    evaluation = Evaluation(model, pick_samples(pictures, model, 5, seed=0))
    eager = [batch.eager for batch in evaluation.batches()]
    assert model.training
    model.eval()
    batch = next(Evaluation(model, evaluation.samples).batches())
    assert np.array_equal(batch.eager["logits"], eager[0]["logits"])  # no noise, no dropout
