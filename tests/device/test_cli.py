"""The ``mope`` command, as a user meets it: through console.run_app, exit codes and streams included."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

import mope_deploy
from mope_deploy import cli, console
from mope_deploy.bundle import write_bundle
from mope_deploy.predictor import load
from tests.device import tiny

pytestmark = pytest.mark.device


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def mope(capsys: pytest.CaptureFixture[str]):
    def call(*arguments: object) -> Result:
        code = console.run_app(cli.app, [str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return Result(code, out, err)

    return call


def rest(err: str) -> str:
    """Standard error without its first line, which says the engine that was chosen and why."""
    first, _, more = err.partition("\n")
    assert re.match(r"engine: onnxruntime on CPUExecutionProvider, \d+ threads?, arena on: no TensorRT ", first)
    assert first.endswith("this onnxruntime has no CUDA")
    return more


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    tiny.picture(0, (11, 9)).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def test_run_one(mope, bundle_path: Path, picture: Path) -> None:
    want = load(bundle_path).predict(image=picture, text="the card is red")
    done = mope("run", bundle_path, "--image", picture, "--text", "the card is red")
    assert done.code == 0
    assert done.out.splitlines()[0] == want.label
    for label, probability in want.probabilities.items():
        assert [label, f"{probability:.4f}"] in [line.split() for line in done.out.splitlines()]
    assert rest(done.err) == ""


def test_run_one_json(mope, bundle_path: Path, picture: Path) -> None:
    want = load(bundle_path).predict(image=picture, text="café " * 50, routing=True)
    done = mope("run", bundle_path, "--image", picture, "--text", "café " * 50, "--routing", "--json")
    assert done.code == 0
    assert json.loads(done.out) == want.to_dict()
    assert np.array(json.loads(done.out)["routing"]).shape == (tiny.LAYERS, tiny.EXPERTS)
    assert json.loads(done.out)["notices"] == ["text truncated from 52 to 12 tokens"]


def test_run_one_with_routing_and_a_notice(mope, bundle_path: Path, picture: Path) -> None:
    done = mope("run", bundle_path, "--image", picture, "--text", "red " * 50, "--routing")
    assert rest(done.err) == "note: text truncated from 52 to 12 tokens\n"
    assert f"layer {tiny.LAYERS} " in done.out
    assert f"expert {tiny.EXPERTS}" in done.out


def test_run_file(mope, bundle_path: Path, data_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    done = mope("run", bundle_path, "--data", data_file, "--out", out, "--batch-size", 4, "--routing")
    assert (done.code, done.out) == (0, "")
    assert "1 texts were truncated to 12 tokens" in done.err
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["line"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["image"] for row in rows] == [f"{i}.png" for i in range(6)]
    assert [row["text"] for row in rows] == [text for text, _ in tiny.SAMPLES]
    predictor = load(bundle_path)
    for row in rows:
        want = predictor.predict(image=data_file.parent / row["image"], text=row["text"])
        assert row["label"] == want.label
        assert row["probability"] == pytest.approx(want.probability, abs=1e-6)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl", "rows"]
    assert mope("run", bundle_path, "--data", data_file, "--batch-size", 4, "--routing").out == out.read_text()


def test_a_failed_run_leaves_the_old_output(mope, bundle_path: Path, data_file: Path, tmp_path: Path) -> None:
    (data_file.parent / "5.png").write_bytes(b"")
    out = tmp_path / "out.jsonl"
    out.write_text("before")
    done = mope("run", bundle_path, "--data", data_file, "--out", out, "--batch-size", 2)
    assert done.code == 1
    assert rest(done.err) == f"error: {data_file}:6: image {data_file.parent / '5.png'} is empty (0 bytes)\n"
    assert out.read_text() == "before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl", "rows"]


def test_skip_bad(mope, bundle_path: Path, data_file: Path, tmp_path: Path) -> None:
    (data_file.parent / "5.png").write_bytes(b"no image")
    (data_file.parent / "1.png").unlink()
    out = tmp_path / "out.jsonl"
    done = mope("run", bundle_path, "--data", data_file, "--out", out, "--skip-bad")
    assert done.code == 0
    assert [json.loads(line)["line"] for line in out.read_text().splitlines()] == [1, 3, 4, 5]
    skipped = [line for line in done.err.splitlines() if line.startswith("skipped")]
    assert f"{data_file}:2: image" in skipped[0]
    assert f"{data_file}:6: image" in skipped[1]
    assert skipped[2] == "skipped 2 of 6 rows"


def test_nothing_left_to_predict(mope, bundle_path: Path, data_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    for i in range(6):
        (data_file.parent / f"{i}.png").unlink()
    done = mope("run", bundle_path, "--data", data_file, "--out", out, "--skip-bad")
    assert done.code == 1
    assert "no row to predict; received 6 rows skipped" in done.err
    assert not out.exists()
    data_file.write_text("\n")
    assert mope("eval", bundle_path, data_file).code == 1


def test_output_may_be_a_device_and_keeps_links(mope, bundle_path: Path, data_file: Path, tmp_path: Path) -> None:
    assert mope("run", bundle_path, "--data", data_file, "--out", "/dev/null").code == 0
    assert not Path("/dev/null").is_file()
    (tmp_path / "real.jsonl").touch()
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "real.jsonl")
    assert mope("run", bundle_path, "--data", data_file, "--out", tmp_path / "link.jsonl").code == 0
    assert (tmp_path / "link.jsonl").is_symlink()
    assert len((tmp_path / "real.jsonl").read_text().splitlines()) == 6


def test_a_full_disk(mope, bundle_path: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    done = mope("run", bundle_path, "--data", data_file, "--out", tmp_path / "o.jsonl")
    assert done.code == 1
    assert "o.jsonl cannot be written; received No space left on device" in done.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rows"]


def test_eval(mope, bundle_path: Path, data_file: Path) -> None:
    predictor = load(bundle_path)
    rows = [json.loads(line) for line in data_file.read_text().splitlines()]
    labels = [predictor.predict(image=data_file.parent / row["image"], text=row["text"]).label for row in rows]
    right = sum(row["label"] == label for row, label in zip(rows, labels, strict=True))
    done = mope("eval", bundle_path, data_file, "--json")
    found = json.loads(done.out)
    assert done.code == 0
    assert found["accuracy"] == pytest.approx(right / 6)
    assert found["samples"] == 6
    assert found["skipped"] == 0
    confusion = np.array(found["confusion_matrix"])
    for row, label in zip(rows, labels, strict=True):
        confusion[tiny.LABELS.index(row["label"]), tiny.LABELS.index(label)] -= 1
    assert not confusion.any()
    table = mope("eval", bundle_path, data_file)
    assert f"6 samples: accuracy {right / 6:.4f}" in table.out
    assert "rows: true, columns: predicted" in table.out


def test_eval_needs_known_labels(mope, bundle_path: Path, data_file: Path) -> None:
    data_file.write_text(data_file.read_text().replace('"neutral"', '"neutrl"', 1))
    done = mope("eval", bundle_path, data_file)
    assert done.code == 1
    assert "data.jsonl:2: unknown label" in done.err
    assert "did you mean 'neutral'?" in done.err
    assert "skipped 1 of 6 rows" in mope("eval", bundle_path, data_file, "--skip-bad").err


def test_eval_multi_label(mope, graph_file: Path, tmp_path: Path) -> None:
    task = {"type": "multi-label", "labels": list(tiny.LABELS), "threshold": 0.5}
    bundle = write_bundle(tmp_path / "b", files=tiny.files(graph_file), manifest=tiny.manifest(task=task)).path
    (tmp_path / "rows").mkdir()
    labels = [["entailment"], [], ["neutral", "contradiction"], ["contradiction"], [], ["contradiction"]]
    data = tiny.write_samples(tmp_path / "rows", labels=labels)
    predictor, exact = load(bundle), 0
    for i, (text, _) in enumerate(tiny.SAMPLES):
        found = predictor.predict(image=tmp_path / "rows" / f"{i}.png", text=text)
        exact += sorted(found.label) == sorted(labels[i])
    assert json.loads(mope("eval", bundle, data, "--json").out)["accuracy"] == pytest.approx(exact / 6)
    assert "confusion" not in mope("eval", bundle, data).out
    assert mope("run", bundle, "--image", tmp_path / "rows/0.png", "--text", "red").code == 0


def test_verify(mope, bundle_path: Path) -> None:
    done = mope("verify", bundle_path)
    assert (done.code, done.err) == (0, "")
    assert "12 files: SHA-256 as in the manifest" in done.out
    assert "6 golden samples" in done.out
    found = json.loads(mope("verify", bundle_path, "--json").out)
    assert found["graphs"][0]["graph"] == "model"
    assert 0 < found["graphs"][0]["logits_error"] < 1e-6


def test_verify_runs_every_graph(mope, graph_file: Path, tmp_path: Path) -> None:
    (graph,) = tiny.manifest()["graphs"]
    manifest = tiny.manifest(graphs=[graph, {**graph, "name": "fused", "runs_on": "onnxruntime"}])
    bundle = write_bundle(tmp_path / "b", files=tiny.files(graph_file), manifest=manifest).path
    names = [entry["graph"] for entry in json.loads(mope("verify", bundle, "--json").out)["graphs"]]
    assert names == ["model", "fused"]
    names = [entry["graph"] for entry in json.loads(mope("verify", bundle, "--graph", "model", "--json").out)["graphs"]]
    assert names == ["model"]


def test_a_variant_that_this_engine_cannot_run_is_a_note(mope, graph_file: Path, tmp_path: Path) -> None:
    """Fused for a newer engine, say; the canonical graph must run, and so must one that is asked for."""
    (graph,) = tiny.manifest()["graphs"]
    files = {**tiny.files(graph_file), "fused.onnx": b"of a future release"}
    graphs = [graph, {**graph, "name": "fused", "file": "fused.onnx", "runs_on": "onnxruntime"}]
    bundle = write_bundle(tmp_path / "b", files=files, manifest=tiny.manifest(graphs=graphs)).path
    done = mope("verify", bundle)
    assert done.code == 0
    assert done.err.startswith("note: fused cannot be used here")
    found = json.loads(mope("verify", bundle, "--json").out)
    assert [entry["graph"] for entry in found["graphs"]] == ["model"]
    assert list(found["unusable"]) == ["fused"]
    assert mope("run", bundle, "--image", bundle / "golden/0.png", "--text", "red").code == 0
    assert mope("verify", bundle, "--graph", "fused").code == 1
    graphs[0]["file"], graphs[1]["file"] = graphs[1]["file"], graphs[0]["file"]
    bundle = write_bundle(tmp_path / "c", files=files, manifest=tiny.manifest(graphs=graphs)).path
    assert mope("verify", bundle).code == 1


def test_a_bundle_for_tensorrt_alone_is_verified_as_far_as_it_can_be(mope, graph_file: Path, tmp_path: Path) -> None:
    """bf16, which ONNX Runtime's CPU lacks: files and preprocessing are checked, and what was not is said."""
    (graph,) = tiny.manifest()["graphs"]
    half = {**graph, "name": "model-bf16", "precision": "bf16", "runs_on": "tensorrt"}
    files = tiny.files(graph_file)
    bundle = write_bundle(tmp_path / "b", files=files, manifest=tiny.manifest(graphs=[half])).path
    for arguments in ((), ("--graph", "model-bf16"), ("--json",)):
        done = mope("verify", bundle, *arguments)
        assert (done.code, done.out) == (1, "")
        assert done.err.count("\n") == 1
        assert "its 12 files and its preprocessing are as exported, but none of its graphs could be run" in done.err
        assert "model-bf16: no TensorRT" in done.err
    assert mope("verify", bundle, "--engine", "onnxruntime").code == 2
    assert mope("verify", bundle, "--graph", "model").code == 2
    both = write_bundle(tmp_path / "c", files=files, manifest=tiny.manifest(graphs=[half, graph])).path
    done = mope("verify", both)
    assert done.code == 0
    assert "note: model-bf16 cannot be used here" in done.err
    files["golden/0.png"] = files["golden/1.png"]
    other = write_bundle(tmp_path / "d", files=files, manifest=tiny.manifest(graphs=[half])).path
    done = mope("verify", other)
    assert done.code == 1
    assert "does not give the golden pixel_values" in done.err


def test_a_variant_with_other_numbers_fails(mope, bundle_path: Path, graph_file: Path, tmp_path: Path) -> None:
    (graph,) = tiny.manifest()["graphs"]
    wrong = graph_file.read_bytes().replace(tiny.weights()["head"].tobytes(), (2 * tiny.weights()["head"]).tobytes())
    assert wrong != graph_file.read_bytes()
    graphs = [graph, {**graph, "name": "fused", "file": "fused.onnx", "runs_on": "onnxruntime"}]
    files = {**tiny.files(graph_file), "fused.onnx": wrong}
    bundle = write_bundle(tmp_path / "b", files=files, manifest=tiny.manifest(graphs=graphs)).path
    done = mope("verify", bundle)
    assert done.code == 1
    assert "graph fused: logits are not the golden ones" in done.err


def test_verify_mentions_files_that_do_not_belong(mope, bundle_copy: Path) -> None:
    (bundle_copy / "notes.txt").write_text("mine")
    done = mope("verify", bundle_copy)
    assert done.code == 0
    assert done.err == "note: 1 files are not part of the bundle: notes.txt\n"


def test_verify_finds_damage(mope, bundle_copy: Path) -> None:
    with (bundle_copy / "model.onnx").open("r+b") as file:
        file.seek(500)
        file.write(b"\x55\xaa\x55")
    done = mope("verify", bundle_copy)
    assert done.code == 1
    assert "model.onnx was altered" in done.err


def test_info(mope, bundle_path: Path) -> None:
    done = mope("info", bundle_path)
    assert (done.code, done.err) == (0, "")
    for words in ("tiny", "entailment, neutral, contradiction", "dense, 4 experts in each of 3 layers", "opset 18"):
        assert words in done.out
    assert max(map(len, done.out.splitlines())) > 80  # the hash, whole
    assert mope("info", bundle_path, "--json").out == (bundle_path / "manifest.json").read_text()


def test_markup_in_names_is_shown_as_it_is(mope, graph_file: Path, tmp_path: Path, picture: Path) -> None:
    task = {"type": "single-label", "labels": ["[red]a[/red]", "[/]", ":smile:"], "threshold": None}
    manifest = tiny.manifest(task=task, name="[bold]n[/bold]")
    bundle = write_bundle(tmp_path / "b", files=tiny.files(graph_file), manifest=manifest).path
    for arguments in (("run", bundle, "--image", picture, "--text", "red"), ("info", bundle)):
        done = mope(*arguments)
        assert done.code == 0
        for label in task["labels"]:
            assert label in done.out


def test_version(mope) -> None:
    assert mope("--version") == (0, f"mope {mope_deploy.__version__}\n", "")


def test_shells_complete_commands_and_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a shell asks, as it asks it: with the words so far in the environment of a process of ours."""
    for words, found in (("mope ver", "verify"), ("mope run --prov", "--provider")):
        asked = {"_MOPE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        code = "import sys; from mope_deploy.cli import main; sys.argv[0] = 'mope'; sys.exit(main())"
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **asked}, check=True
        )
        assert done.stdout.split() == [found]


MISUSE = [
    (("run", "{bundle}"), "--image and --text missing; expected --image and --text, or --data"),
    (("run", "{bundle}", "--image", "{picture}"), "--text missing"),
    (("run", "{bundle}", "--text", "red"), "--image missing"),
    (("run", "{bundle}", "--image", "{picture}", "--data", "{data}"), "one of the two"),
    (("run", "{bundle}", "--image", "{picture}", "--text", "a", "--out", "x"), "--out belongs to --data"),
    (("run", "{bundle}", "--image", "{picture}", "--text", "a", "--skip-bad"), "--skip-bad belongs to --data"),
    (("run", "{bundle}", "--data", "{data}", "--out", "{data}"), "--out is the file that --data reads"),
    (("run", "{bundle}", "--data", "{data}", "--out", "{folder}"), "cannot be written; received Is a directory"),
    (("run", "{bundle}", "--data", "{data}", "--out", "{folder}/no/x"), "cannot be written; received No such file"),
    (("run", "{bundle}", "--data", "{folder}/no.jsonl"), "no.jsonl does not exist"),
    (("run", "{bundle}", "--data", "{folder}"), "is not a file"),
    (("run", "{bundle}", "--data", "{data}", "--batch-size", "0"), "batch-size"),
    (("run", "{bundle}", "--imag", "x"), "--image"),
    (("run", "{folder}/none", "--data", "{data}"), "is not a bundle; received nothing there"),
    (("run", "{picture}", "--data", "{data}"), "is not a bundle; received a file"),
    (("verify", "{folder}/checkpoint"), "a checkpoint"),
    (("info", "{folder}/run"), "a training run; expected a bundle"),
    (("verify", "{bundle}", "--engine", "tensorflow"), "expected auto or tensorrt, onnxruntime"),
    (("verify", "{bundle}", "--graph", "modle"), "did you mean 'model'?"),
    (("eval", "{bundle}"), "DATA"),
    (("infoo", "{bundle}"), "infoo"),
    ((), "Usage"),
]


@pytest.mark.parametrize(("arguments", "words"), MISUSE, ids=[words for _, words in MISUSE])
def test_misuse(mope, bundle_path, data_file, picture, tmp_path, arguments, words) -> None:
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "model.safetensors").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").touch()
    names = {"bundle": bundle_path, "data": data_file, "picture": picture, "folder": tmp_path}
    done = mope(*(argument.format(**names) for argument in arguments))
    assert done.code == 2
    assert words in " ".join((done.out + done.err).split())


def test_failures_are_one_line_and_exit_1(mope, bundle_path: Path, tmp_path: Path) -> None:
    Image.new("L", (20_000, 2)).save(tmp_path / "wide.png")
    for image, text, words in (
        (tmp_path / "none.png", "a", "none.png does not exist"),
        (tmp_path / "wide.png", "a", "20,000 x 2 pixels"),
        (bundle_path / "golden/0.png", " ", "text is empty"),
    ):
        done = mope("run", bundle_path, "--image", image, "--text", text)
        assert done.code == 1
        assert rest(done.err).startswith("error: ")
        assert rest(done.err).count("\n") == 1
        assert words in done.err
