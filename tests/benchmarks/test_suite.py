"""The benchmark suite on tiny encoders: what it compares, and the command. No test looks at a time."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from benchmarks import __main__ as suite
from benchmarks.child import run_child
from benchmarks.comparisons import COMPARISONS
from benchmarks.encoders import BarePair, Encoders
from benchmarks.graphs import Workshop, make_feeds
from benchmarks.result import Result
from benchmarks.settings import SIZES, Settings, Spec
from benchmarks.targets import TARGETS
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


@pytest.mark.parametrize("name", COMPARISONS)
def test_every_comparison(name: str, workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is opened, and that all targets are judged, with static int8 too; nothing is exported for it."""
    opened = []

    def fake(spec: Spec) -> Callable[[object], object]:
        opened.append(spec)
        return lambda feeds: None

    whole = Workshop(dataclasses.replace(workshop.settings, few=False))
    monkeypatch.setattr(whole, "open", fake)
    monkeypatch.setattr(whole, "feeds", lambda spec, **_: {})
    monkeypatch.setattr(whole, "graph", lambda spec: Path(__file__))
    monkeypatch.setattr("benchmarks.ratios.int8_instructions", lambda: ["i8mm"])
    groups = COMPARISONS[name].groups
    result = check(name, suite._function(name)(whole))
    assert opened == [spec for group in groups for spec in group.graphs.values()]
    assert len(result.tables[0].rows) == sum(len(group.graphs) * len(group.batches) for group in groups)
    assert "{" not in result.about
    # A comparison is fair where one thing alone is different.
    for group in groups:
        first, *others = group.graphs.values()
        if name in ("fp32-ratio", "int8-ratio"):
            assert [dataclasses.replace(spec, kind="bare") for spec in others] == [first]


def test_int8_is_judged_where_the_cpu_has_it(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.ratios.int8_instructions", list)
    result = check("int8-speed", suite._function("int8-speed")(workshop))
    assert result.not_run == {"int8-speed": "this CPU has no VNNI"}
    assert "int8 instructions: none." in result.about


def check(name: str, result: Result) -> Result:
    """It has a value for each of its targets, or a reason, and tables with all their cells."""
    json.dumps(result.to_dict(), allow_nan=False)
    wanted = {target.name for target in TARGETS if target.benchmark == name}
    assert set(result.values) | set(result.not_run) == wanted
    assert result.tables
    for table in result.tables:
        assert table.rows
        assert {len(row) for row in table.rows} == {len(table.columns)}
    return result


# Of those that start several processes the first is real.
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in suite.BENCHMARKS if name != "fp32-ratio"])
def test_every_other_benchmark(name: str, workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Really run, but for graphs that differ from another one in K, top-k or L alone: that one is measured twice."""
    found: list[dict[str, Any]] = []

    def once(*arguments: Any, **how: Any) -> dict[str, Any]:
        found[:] = found or [run_child(*arguments, **how)]
        return found[0]

    for module in ("training_step", "memory"):
        monkeypatch.setattr(f"benchmarks.{module}.run_child", once)
    graph = workshop.graph
    monkeypatch.setattr(
        workshop, "graph", lambda spec: graph(dataclasses.replace(spec, experts=16, top_k=0, prompt_length=6))
    )
    result = check(name, suite._function(name)(workshop))
    if name == "growth":
        assert [curve.quantity for curve in result.curves] == ["batch size", "text length", "K", "L"]
        assert all(len(points) == 2 for curve in result.curves for points in curve.series.values())


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
