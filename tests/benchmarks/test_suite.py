"""The benchmark suite on tiny encoders: what it compares, how it judges, what it writes. No test looks at a time."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from benchmarks import __main__ as suite
from benchmarks.encoders import BarePair, Encoders
from benchmarks.graphs import Spec, Workshop, make_feeds
from benchmarks.machine import describe_machine
from benchmarks.report import write_report
from benchmarks.result import Curve, Result, Table, exponent
from benchmarks.settings import SIZES, NotRun, Settings
from benchmarks.targets import TARGETS, judge
from benchmarks.training_step import step
from mope_deploy.errors import MopeError
from mope_deploy.model import MoPE
from mope_deploy.model.backbones import Form


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    folder = tmp_path_factory.mktemp("graphs")
    return Workshop(Settings(folder=folder, size="tiny", threads=1, seconds=0.01, rounds=2, few=True, processes=1))


def run_graph(path: Path, feeds: dict[str, Any]) -> dict[str, Any]:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


# --- what is compared ---


def test_the_bare_pair_is_what_the_libraries_compute() -> None:
    """Padding included: the mask that is handed over has the meaning of the library's own."""
    encoders = Encoders(SIZES["tiny"])
    pair = BarePair(encoders.image("vit"), encoders.text).eval()
    inputs = {name: torch.from_numpy(a) for name, a in make_feeds(SIZES["tiny"], batch=3, text_length=9).items()}
    inputs["attention_mask"][1, 5:] = 0
    bert, vit = encoders.text.backbone.encoder, encoders.image("vit").backbone.encoder
    with torch.inference_mode():
        x = vit(inputs["pixel_values"])
        y = bert(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state[:, 0]
        torch.testing.assert_close(pair(inputs)[0], pair.head(torch.cat([x, y], dim=-1)))
        unmasked = pair(inputs | {"attention_mask": torch.ones_like(inputs["attention_mask"])})[0]
    assert not torch.allclose(pair(inputs)[0][1], unmasked[1])


def test_mope_and_the_bare_pair_share_their_encoders(workshop: Workshop) -> None:
    model, pair = workshop.model(Spec()), workshop.model(Spec(kind="bare"))
    assert isinstance(model, MoPE)
    assert model.main.encoder is pair.main.encoder
    assert model.complementary_encoders()["text"].backbone.encoder is workshop.encoders.text.backbone.encoder
    assert (model.config.experts, model.config.prompt_length, model.config.top_k) == (16, 6, 0)


def test_encoders_of_base_size_are_those_they_are_called() -> None:
    with torch.device("meta"):
        encoders = Encoders(SIZES["base"])
        vit, bert = encoders.image("vit").backbone.encoder, encoders.text.backbone.encoder
    assert 85e6 < sum(p.numel() for p in vit.parameters()) < 87e6  # ViT-B/16 without its classifier
    assert 108e6 < sum(p.numel() for p in bert.parameters()) < 110e6  # BERT-base without its pooler


def test_exported_graphs_compute_their_modules(workshop: Workshop) -> None:
    """And the one that is given y is the whole one after its complementary encoder: nothing of that is left in it."""
    feeds = workshop.feeds(Spec(), batch=3, text_length=6)
    tensors = {name: torch.from_numpy(array) for name, array in feeds.items()}
    model = workshop.model(Spec()).eval()
    assert isinstance(model, MoPE)
    with torch.inference_mode():
        want, bare = model(tensors), workshop.model(Spec(kind="bare"))(tensors)[0]
    found = run_graph(workshop.graph(Spec()), feeds)
    np.testing.assert_allclose(found["logits"], want.logits, atol=1e-5)
    np.testing.assert_allclose(found["routing"], want.routing, atol=1e-5)
    (logits,) = run_graph(workshop.graph(Spec(kind="bare")), feeds).values()
    np.testing.assert_allclose(logits, bare, atol=1e-5)
    files = workshop.graph(Spec()), workshop.graph(Spec(kind="given-y"))
    given = files[1]
    short = workshop.feeds(Spec(kind="given-y"), batch=3)
    assert set(short) == {"pixel_values", "conditions_text"}
    assert run_graph(given, short)["logits"].shape == want.logits.shape
    weights = [{tensor.name.split(".")[0] for tensor in onnx.load(path).graph.initializer} for path in files]
    assert "complementary" in weights[0] - weights[1]
    assert "main" in weights[0] & weights[1]


def test_the_same_products_are_quantised_in_both(workshop: Workshop) -> None:
    vit = {"mope": 6, "bare": 4}  # proj, two of the MLP, and q, k, v apart or in one
    for kind, products in vit.items():
        model = onnx.load(workshop.graph(Spec(kind=kind, precision="int8-dynamic")))
        found = Counter(node.op_type for node in model.graph.node)["MatMulInteger"]
        assert found == products + 6  # q, k, v, output and MLP of a BERT


def test_graphs_are_made_once(workshop: Workshop) -> None:
    path = workshop.graph(Spec())
    before = path.stat().st_mtime_ns
    assert Workshop(workshop.settings).graph(Spec()).stat().st_mtime_ns == before
    others = [Spec(top_k=1), Spec(experts=4), Spec(prompt_length=2), Spec(main="text"), Spec(kind="bare")]
    assert len({spec.name for spec in (Spec(), *others, Spec(precision="int8"))}) == 7
    assert [file.name for file in workshop.settings.folder.iterdir() if file.name.startswith(".")] == []


def test_feeds(workshop: Workshop) -> None:
    made = workshop.feeds(Spec(kind="given-y"), batch=3)
    # Of the one layer, all that depends on y alone: the mapped token and the router's share of y.
    assert {name: array.shape for name, array in made.items()} == {
        "pixel_values": (3, 3, 32, 32),
        "conditions_text": (3, 32 + 8),
    }
    assert set(workshop.feeds(Spec(kind="bare-main"), batch=1)) == {"pixel_values"}
    assert workshop.feeds(Spec(), batch=1)["input_ids"].shape == (1, 32)


@pytest.mark.parametrize("form", ["token", "prefix"])
def test_a_training_step_trains_what_trains(form: Form, workshop: Workshop) -> None:
    model = workshop.encoders.mope()
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    before = {name: p.detach().clone() for name, p in model.trained_parameters().items()}
    call = step(model, make_feeds(SIZES["tiny"], batch=4), form)
    for _ in range(2):
        call()
    changed = {name for name, p in model.trained_parameters().items() if not torch.equal(p, before[name])}
    assert changed == set(before)
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)


# --- how it judges ---


def test_targets_are_those_of_the_project() -> None:
    limits = {target.name: target.limit for target in TARGETS}
    assert len(limits) == len(TARGETS)
    assert limits == {
        "fp32-vit-1": 1.01,
        "fp32-vit-8": 1.01,
        "fp32-swin-1": 1.03,
        "fp32-swin-8": 1.03,
        "text-main": 1.05,
        "int8-vit": 1.02,
        "int8-swin": 1.05,
        "int8-speed": 0.50,
        "experts-top1": 1.01,
        "experts-soft": 1.03,
        "cached-y": 1.03,
        "training-time": 0.95,
        "training-memory": 1.00,
        "process-time": 0.6,
        "process-memory": 120.0,
        "eager-ratio": None,
    }
    assert {target.benchmark for target in TARGETS} <= set(suite.BENCHMARKS)


def test_verdicts() -> None:
    results = {
        "fp32-ratio": {
            "values": {
                "fp32-vit-1": {"value": 1.01, "error": 0.002},
                "fp32-vit-8": {"value": 1.05, "error": None},
            },
            "not_run": {"fp32-swin-1": "no Swin"},
        },
        "device-process": {"values": {"process-time": {"value": 0.6, "error": 0.1}}, "not_run": {}},
        "eager-ratio": {"values": {"eager-ratio": {"value": 0.5, "error": 0.1}}, "not_run": {}},
        "int8-ratio": {"error": "it failed"},
    }
    rows = {row["name"]: row for row in judge(results, size="base", chosen=["fp32-ratio", "int8-ratio"])}
    assert list(rows) == [target.name for target in TARGETS]
    assert (rows["fp32-vit-1"]["verdict"], rows["fp32-vit-1"]["by"]) == ("met", None)
    assert rows["fp32-vit-8"]["verdict"] == "missed"
    assert rows["fp32-vit-8"]["by"] == pytest.approx(0.04)
    assert (rows["fp32-swin-1"]["verdict"], rows["fp32-swin-1"]["note"]) == ("not run", "no Swin")
    assert (rows["process-time"]["verdict"], rows["process-time"]["by"]) == ("missed", 0.0)  # below, not at
    assert (rows["eager-ratio"]["verdict"], rows["eager-ratio"]["limit"]) == ("reported", None)
    assert rows["int8-vit"]["note"] == "it failed"
    assert "text-main was not asked for" in rows["text-main"]["note"]
    rows = {row["name"]: row for row in judge(results, size="small", chosen=["fp32-ratio"])}
    assert rows["fp32-vit-1"]["note"] == "of small encoders, which the target is not about"
    assert rows["process-time"]["note"] == ""


def test_exponents() -> None:
    x = [1.0, 2.0, 4.0, 8.0]
    assert exponent(x, [3 * value**1.5 for value in x]) == pytest.approx(1.5)
    assert exponent(x, [7.0] * 4) == pytest.approx(0.0)
    points = tuple({"x": value, "p50_ms": value**2, "p95_ms": 1.0, "p99_ms": 1.0, "samples_per_s": 1.0} for value in x)
    curve = Curve("t", "K", {"many": points, "one": points[:1]})
    assert curve.exponents == pytest.approx({"many": 2.0})


# --- what it writes ---


def report_of(results: dict[str, Result]) -> dict[str, Any]:
    documents = {name: result.to_dict() for name, result in results.items()}
    return {
        "schema": 1,
        "command": "python -m benchmarks all",
        "machine": describe_machine(),
        "settings": {"size": "tiny", "form": "token", "threads": 2, "rounds": 3, "seconds": 0.1},
        "results": documents,
        "targets": judge(documents, size="tiny", chosen=list(documents)),
    }


def test_a_report(tmp_path: Path) -> None:
    points = tuple(
        {"x": x, "p50_ms": 2.0 * x, "p95_ms": 3.0 * x, "p99_ms": 4.0 * x, "samples_per_s": 500 / x} for x in (1.0, 4.0)
    )
    result = Result(
        about="A and B.",
        tables=(Table("a | b", ("name", "ms"), (("x|y", "1.25"), ("z", "2.50"))),),
        curves=(Curve("latency against K", "K", {"dense": points}),),
        values={"experts-soft": {"value": 1.2, "error": 0.01}},
        not_run={"experts-top1": "no top-1"},
    )
    files = write_report(tmp_path / "r.json", report_of({"experts-ratio": result}))
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(file.name for file in files)
    assert [file.name for file in files] == ["r.json", "r.md", "r-latency-against-k.svg"]
    document = json.loads(files[0].read_text())
    assert document["results"]["experts-ratio"]["curves"][0]["exponents"] == {"dense": pytest.approx(1.0)}
    page = files[1].read_text()
    assert "| x\\|y | 1.25 |" in page
    assert "| --- | ---: |" in page
    assert "![latency against K](r-latency-against-k.svg)" in page
    assert "| 1.03 | 1.200 ± 0.010 | missed by 0.170 (of tiny encoders" in page
    assert "Not run: no top-1." in page
    assert ">dense, p = 1.00</text>" in files[2].read_text()


def test_the_machine() -> None:
    found = describe_machine()
    json.dumps(found, allow_nan=False)
    assert {"cpu", "cores", "governor", "power_mode", "gpus", "int8_instructions", "versions", "load"} <= set(found)
    assert found["cores"] >= 1


# --- the command ---


def call(*arguments: object) -> int:
    return suite.main([str(argument) for argument in arguments])


def test_some_benchmarks_from_the_command_line(
    workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--size", "tiny", "--quick", "--threads", 1, "--work", workshop.settings.folder]
    assert call("fp32-ratio", *common, "--out", tmp_path / "r.json") == 0
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    document = json.loads((tmp_path / "r.json").read_text())
    (name,) = document["results"]
    found = document["results"][name]
    assert name == "fp32-ratio"
    assert {"fp32-vit-1", "fp32-vit-8"} <= set(found["values"])
    assert set(found["values"]) | set(found["not_run"]) == {
        f"fp32-{kind}-{b}" for kind in ("vit", "swin") for b in (1, 8)
    }
    table, vit = found["tables"][0], workshop.settings.encoders.names["vit"]
    shown = {
        row[1]: row[table["columns"].index("÷ bare")] for row in table["rows"] if row[0] == vit and row[2] == "MoPE"
    }
    assert shown == {batch: f"{found['values'][f'fp32-vit-{batch}']['value']:.3f}" for batch in (1, 8)}
    assert document["settings"]["size"] == "tiny"
    assert str(tmp_path) not in json.dumps(document["settings"])
    lines = [line for line in out.splitlines() if line.startswith("fp32-")]
    assert len(lines) == 4
    assert "text-main" not in out
    assert "wrote" in err


def test_every_benchmark_gives_its_targets(workshop: Workshop) -> None:
    """Those that need no process of their own and few graphs; the others are run below."""
    for name in ("cached-y", "int8-ratio", "int8-speed", "eager-ratio", "growth", "operators"):
        result = suite._function(name)(workshop)
        json.dumps(result.to_dict(), allow_nan=False)
        wanted = {target.name for target in TARGETS if target.benchmark == name}
        assert set(result.values) | set(result.not_run) == wanted, name
        assert result.tables
        for table in result.tables:
            assert table.rows
            assert {len(row) for row in table.rows} == {len(table.columns)}
    growing = suite._function("growth")(workshop)
    assert [curve.quantity for curve in growing.curves] == ["batch size", "text length", "K", "L"]
    assert all(len(points) == 2 for curve in growing.curves for points in curve.series.values())


@pytest.mark.slow
def test_every_other_benchmark_gives_its_targets(workshop: Workshop) -> None:
    for name in ("text-main", "experts-ratio", "device-process", "training-step", "memory"):
        result = suite._function(name)(workshop)
        wanted = {target.name for target in TARGETS if target.benchmark == name}
        assert set(result.values) | set(result.not_run) == wanted, name
        for table in result.tables:
            assert {len(row) for row in table.rows} == {len(table.columns)}


def test_one_that_fails_does_not_stop_the_others(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(_: Workshop) -> Result:
        raise RuntimeError("out of luck")

    chosen = {
        "text-main": fails,
        "cached-y": lambda _: Result(about="fine", values={"cached-y": {"value": 1.0, "error": None}}),
    }
    monkeypatch.setattr(suite, "_function", chosen.__getitem__)
    with pytest.raises(MopeError, match="text-main: RuntimeError: out of luck"):
        suite.run(list(chosen), workshop.settings, to=tmp_path / "r.json")
    document = json.loads((tmp_path / "r.json").read_text())
    assert document["results"]["text-main"] == {"error": "RuntimeError: out of luck"}
    rows = {row["name"]: row for row in document["targets"]}
    assert (rows["cached-y"]["verdict"], rows["text-main"]["note"]) == ("met", "RuntimeError: out of luck")
    assert "Failed: RuntimeError: out of luck" in (tmp_path / "r.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["all", "--form", "fused"], "token or prefix"),
        (["all", "--size", "huge"], "tiny or small or base"),
        (["all", "--out", "report.txt"], "a file ending in .json"),
        (["all", "--out", "nowhere/report.json"], "in a folder that is there"),
        (["all", "--work", "nowhere"], "expected a folder"),
        (["fp32-rati"], "fp32-ratio"),
    ],
)
def test_misuse(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(*arguments) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_there_is_not_run(workshop: Workshop) -> None:
    with pytest.raises(NotRun, match="no encoder family resnet"):
        workshop.encoders.image("resnet")
