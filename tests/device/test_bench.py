"""``mope bench``: structure, arithmetic and failures. No test looks at a time."""

from __future__ import annotations

import io
import json
import re
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mope_deploy import cli, console
from mope_deploy.bench import measure as measuring
from mope_deploy.bench.measure import measure
from mope_deploy.bundle import Bundle, write_bundle
from mope_deploy.engines import open_session
from mope_deploy.errors import EngineError, ParityError, UsageError
from tests.device import tiny
from tests.device.sensors import Steady, bare_board

pytestmark = pytest.mark.device


@pytest.fixture(scope="module")
def two_graphs(graph_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with a second graph, and a third one that only TensorRT takes."""
    document = tiny.manifest()
    first = document["graphs"][0]
    document["graphs"] += [
        {**first, "name": "model-b", "file": "b.onnx"},
        {**first, "name": "model-trt", "file": "b.onnx", "runs_on": "tensorrt"},
    ]
    target = tmp_path_factory.mktemp("bundles") / "two"
    write_bundle(target, files={**tiny.files(graph_file), "b.onnx": graph_file}, manifest=document)
    return target


@pytest.fixture
def mope(capsys: pytest.CaptureFixture[str]):
    def call(*arguments: object) -> tuple[int, str, str]:
        code = console.run_app(cli.app, ["bench", *(str(argument) for argument in arguments)])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return call


def test_all_variants_in_one_process(two_graphs: Path) -> None:
    found = measure(two_graphs, variants=None, threads=1, seconds=0.1, batch=8, board=bare_board())
    json.dumps(found, allow_nan=False)
    assert (found["format"], found["schema"]) == ("mope-bench", 1)
    assert found["bundle"] == {"name": "tiny", "sha256": Bundle.open(two_graphs).sha256}
    assert [row["graph"] for row in found["variants"]] == ["model", "model-b"]
    assert list(found["unusable"]) == ["model-trt"]
    assert "expected tensorrt" in found["unusable"]["model-trt"]
    calls = set()
    for row in found["variants"]:
        assert row["bytes"] == (two_graphs / "model.onnx").stat().st_size
        for kind in ("engine", "end_to_end"):
            assert 0 < row[kind]["p50_ms"] <= row[kind]["p95_ms"] <= row[kind]["p99_ms"]
            assert row[kind]["samples_per_s"] > 0
            calls.add(row[kind]["calls"])
        assert row["energy"] == {}
    assert len(calls) == 1
    assert calls.pop() >= 5
    assert found["variants"][0]["engine"]["ratio_to_first"]["value"] == 1.0
    second = found["variants"][1]["engine"]
    assert second["ratio_to_first"]["value"] == second["p50_ms"] / found["variants"][0]["engine"]["p50_ms"]
    assert found["settings"]["text_length"] == tiny.MAX_LENGTH  # the longest of the golden texts
    assert found["board"] == {"celsius": {}, "megahertz": {}}
    assert found["memory"]["peak_bytes"] > 2**20


def test_what_is_run(two_graphs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The arrays that the engine gets are the golden texts cut or lengthened, as many as asked for; spinning is off."""
    fed, opened = [], []

    def watched(*arguments: Any, **how: Any) -> Any:
        session = open_session(*arguments, **how)
        opened.append(session)
        run = session.run
        session.run = lambda feeds, outputs=None: (fed.append(feeds), run(feeds, outputs))[1]  # type: ignore[method-assign]
        return session

    monkeypatch.setattr(measuring, "open_session", watched)
    measure(two_graphs, variants=["model-b"], threads=1, batch=7, text_length=9, seconds=0.01, board=bare_board())
    shapes = {feeds["input_ids"].shape for feeds in fed}
    assert shapes == {(len(tiny.SAMPLES), tiny.MAX_LENGTH), (7, 9)}  # the golden check, then what is measured
    assert all((feeds["attention_mask"] == 1).all() for feeds in fed if feeds["input_ids"].shape == (7, 9))
    distinct = {feeds["input_ids"].tobytes() + feeds["pixel_values"].tobytes() for feeds in fed}
    assert len(distinct) == 2  # engine only and end to end run on the same arrays
    options = opened[0]._session.get_session_options()
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert options.intra_op_num_threads == 1
    opened.clear()
    measure(two_graphs, spinning=True, seconds=0.01, board=bare_board())
    options = opened[0]._session.get_session_options()
    with pytest.raises(Exception, match="allow_spinning"):
        options.get_session_config_entry("session.intra_op.allow_spinning")


def test_energy_per_sample(two_graphs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "_ENERGY_S", 0.06)
    found = measure(two_graphs, variants=["model", "model-b"], batch=2, seconds=0.2, board=Steady())
    assert found["idle_w"]["VDD_IN"] == pytest.approx(6.0)
    for row in found["variants"]:
        assert set(row["energy"]) == {"package-0", "VDD_IN"}
        rail, counter = row["energy"]["VDD_IN"], row["energy"]["package-0"]
        assert rail["watts"] == pytest.approx(6.0)
        # both sources saw the same samples and the same seconds
        assert rail["joules_per_sample"] / rail["watts"] == pytest.approx(
            counter["joules_per_sample"] / counter["watts"]
        )
    heat = found["board"]["celsius"]["cpu"]
    assert heat["first"] == heat["least"] < heat["greatest"] == heat["last"]


def test_energy_is_shared_among_the_samples_of_all_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[str] = Counter()
    monkeypatch.setattr(measuring, "_ENERGY_S", 0.03)
    monkeypatch.setattr(measuring, "_run", lambda variant, arrays: (calls.update([variant.name]), time.sleep(0.002)))
    two: Any = [SimpleNamespace(name="a"), SimpleNamespace(name="b")]
    found = measuring._energy(two, {}, 4, Steady(), 10.0, lambda _: None)
    for name in ("a", "b"):  # the counter gains 2 J from the look before to the look after
        assert found[name]["package-0"]["joules_per_sample"] == pytest.approx(2.0 / (4 * calls[name]))


def test_wrong_outputs_are_not_measured(bundle_copy: Path, graph_file: Path, tmp_path: Path) -> None:
    files = tiny.files(graph_file)
    outputs = {name: array.copy() for name, array in np.load(io.BytesIO(files["golden/outputs.npz"])).items()}  # type: ignore[arg-type]
    outputs["logits"][0] += 1
    write_bundle(tmp_path / "wrong", files={**files, "golden/outputs.npz": tiny.npz(outputs)}, manifest=tiny.manifest())
    with pytest.raises(ParityError, match="logits are not the golden ones"):
        measure(tmp_path / "wrong", seconds=0.01, board=bare_board())


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"variants": ["modl"]}, UsageError, "did you mean 'model'"),
        ({"engine": "onnx"}, UsageError, "auto or tensorrt, onnxruntime"),
        ({"engine": "onnx", "variants": None}, UsageError, "auto or tensorrt, onnxruntime"),
        ({"engine": "tensorrt"}, EngineError, "TensorRT"),
        ({"batch": 0}, UsageError, "at least 1"),
        ({"text_length": 13}, UsageError, "received 13; expected 1 to 12 tokens"),
        ({"text_length": 2}, UsageError, "more than the tokenizer's 2 special tokens"),
        ({"providers": ["tpu"]}, UsageError, "tpu"),
    ],
)
def test_misuse(bundle_path: Path, arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        measure(bundle_path, seconds=0.01, board=bare_board(), **arguments)


# --- the command ---


def test_the_command(mope, two_graphs: Path, tmp_path: Path) -> None:
    code, out, err = mope(
        two_graphs, "--variants", "all", "--duration", "0.1", "--threads", "1", "--batch", "2",
        "--json", tmp_path / "figures.json", "--plot", tmp_path / "figures.svg",
    )  # fmt: skip
    assert code == 0
    found = json.loads((tmp_path / "figures.json").read_text())
    lines = out.splitlines()
    assert lines[0].endswith("batch 2, texts of 7 tokens, 1 thread, arena on, spinning off")
    for row in found["variants"]:
        (line,) = [line for line in lines if line.split()[:2] == [row["graph"], "onnxruntime"]]
        assert f"{row['engine']['p50_ms']:.3f}" in line
    for what in ("energy", "clocks", "temperature", "power mode", "memory"):
        assert any(line.startswith(f"{what}: ") for line in lines), what
    assert "note: model-trt cannot be used here" in err
    ElementTree.fromstring((tmp_path / "figures.svg").read_bytes())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures.json", "figures.svg"]


def test_absent_sensors_are_said_to_be(
    mope, bundle_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(measuring, "Board", bare_board)
    code, out, _ = mope(bundle_path, "--duration", "0.1", "--plot", tmp_path / "a.PNG", "--text-len", "5")
    assert code == 0
    assert "energy: not reported\nclocks: not reported\ntemperature: not reported\n" in out
    assert "power mode: not reported; governor: not reported" in out
    assert re.search(r"texts of 5 tokens, \d+ threads?, arena on, spinning off", out)
    with Image.open(tmp_path / "a.PNG") as image:
        assert image.format == "PNG"


def test_present_sensors_are_shown(mope, bundle_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "Board", Steady)
    monkeypatch.setattr(measuring, "_ENERGY_S", 0.05)
    code, out, _ = mope(bundle_path, "--duration", "0.1")
    assert code == 0
    assert "model: energy of VDD_IN: " in out
    assert "clocks: CPU 1,000 to 1,000 MHz" in out
    assert "temperature: cpu 41 to " in out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--plot", "figures.pdf"], 2, "expected a file ending in .svg or .png"),
        (["--plot", "nowhere/a.svg"], 2, "--plot nowhere/a.svg"),
        (["--json", "nowhere/a.json"], 2, "--json nowhere/a.json"),
        (["--json", "."], 2, "expected a file to write"),
        (["--variants", " , "], 2, "names of graphs, or all"),
        (["--duration", "0"], 2, "0.1"),
        (["--text-len", "99"], 2, "1 to 12 tokens"),
    ],
)
def test_misuse_of_the_command(
    mope,
    bundle_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    found, out, err = mope(bundle_path, *arguments)
    assert (found, out) == (code, "")
    assert words in err
    assert list(tmp_path.iterdir()) == []


def test_a_plot_without_matplotlib_is_refused_before_measuring(
    mope, bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "measure", lambda *_, **__: pytest.fail("measured"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    code, out, err = mope(bundle_path, "--plot", tmp_path / "a.svg")
    assert (code, out) == (2, "")
    assert err.startswith(
        "error: --plot needs the package 'matplotlib', which is not installed; run: pip install 'mope-"
    )
    assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_no_bundle(mope, tmp_path: Path) -> None:
    code, _, err = mope(tmp_path)
    assert code == 2
    assert len(err.strip().splitlines()) == 1


def test_a_failure_leaves_the_old_file(
    mope, bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "figures.json").write_text("old")

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mope_deploy.files.whole.os.replace", fails)
    code, _, err = mope(bundle_path, "--duration", "0.1", "--json", tmp_path / "figures.json")
    assert code == 1
    assert "No space left" in err
    assert (tmp_path / "figures.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
