"""``mope bench``: structure, arithmetic, sensors on made-up file trees, and failures. No test looks at a time."""

from __future__ import annotations

import ctypes
import io
import json
import re
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
from mope_deploy.bench.board import Board, Reading, peak_memory, resident_memory
from mope_deploy.bench.chart import Bar, draw_png, draw_svg
from mope_deploy.bench.energy import EnergyMeter
from mope_deploy.bench.measure import measure
from mope_deploy.bench.nvml import gpus
from mope_deploy.bench.timing import interleave, ratio_of_medians, summary, warm_up
from mope_deploy.bundle import Bundle, write_bundle
from mope_deploy.engines import open_session
from mope_deploy.errors import EngineError, ParityError, UsageError
from tests.device import tiny

pytestmark = pytest.mark.device

NOWHERE = Path("/nonexistent")


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


def bare_board() -> Board:
    return Board(NOWHERE, gpus_here=[])


# --- timing ---


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


# --- sensors ---


def lay(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


JETSON = {
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
    "var/lib/nvpmodel/status": "pmode:0002\n",
    "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=15W >\nCPU_ONLINE CORE_0 1\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n",
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
    "sys/class/thermal/thermal_zone0/temp": "48500\n",
    "sys/class/thermal/thermal_zone1/type": "cv0-thermal\n",
    "sys/class/thermal/thermal_zone1/temp": "-256000\n",
    "sys/class/thermal/thermal_zone10/type": "cpu-thermal\n",
    "sys/class/thermal/thermal_zone10/temp": "50000\n",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_cur_freq": "1510400\n",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_governor": "schedutil\n",
    "sys/devices/system/cpu/cpufreq/policy4/scaling_cur_freq": "729600\n",
    "sys/devices/system/cpu/cpufreq/policy4/scaling_governor": "schedutil\n",
    "sys/class/devfreq/17000000.gpu/cur_freq": "624750000\n",
    "sys/class/devfreq/15340000.vic/cur_freq": "115200000\n",
    "sys/class/hwmon/hwmon1/name": "ina3221\n",
    "sys/class/hwmon/hwmon1/in1_label": "VDD_IN\n",
    "sys/class/hwmon/hwmon1/in1_input": "5000\n",
    "sys/class/hwmon/hwmon1/curr1_input": "1200\n",
    "sys/class/hwmon/hwmon1/in2_label": "VDD_CPU_GPU_CV\n",
    "sys/class/hwmon/hwmon1/in2_input": "4960\n",
    "sys/class/hwmon/hwmon1/curr2_input": "250\n",
    "sys/class/hwmon/hwmon1/curr3_input": "10\n",
}
RAPL = {
    "proc/cpuinfo": "processor\t: 0\nmodel name\t: Imaginary CPU 9000\n",
    "sys/firmware/acpi/platform_profile": "balanced\n",
    "sys/class/powercap/intel-rapl:0/name": "package-0\n",
    "sys/class/powercap/intel-rapl:0/energy_uj": "9000000\n",
    "sys/class/powercap/intel-rapl:0/max_energy_range_uj": "10000000\n",
    "sys/class/powercap/intel-rapl:0:0/name": "core\n",
    "sys/class/powercap/intel-rapl:0:0/energy_uj": "5000000\n",
    "sys/class/powercap/intel-rapl:0:1/name": "dram\n",
    "sys/class/powercap/intel-rapl:0:1/energy_uj": "250000\n",
    "sys/class/powercap/intel-rapl:0:1/max_energy_range_uj": "10000000\n",
    "sys/class/powercap/intel-rapl-mmio:0/name": "package-0\n",
    "sys/class/powercap/intel-rapl-mmio:0/energy_uj": "9000000\n",
    "sys/class/hwmon/hwmon0/name": "amdgpu\n",
    "sys/class/hwmon/hwmon0/power1_average": "31000000\n",
}


def test_a_jetson(tmp_path: Path) -> None:
    board = Board(lay(tmp_path, JETSON), gpus_here=[])
    described = board.describe()
    assert described["model"] == "NVIDIA Jetson Orin Nano Developer Kit"
    assert (described["power_mode"], described["governor"]) == ("MAXN_SUPER (2)", "schedutil")
    state = board.read()
    assert state.celsius == {"cpu-thermal": 48.5, "cpu-thermal 2": 50.0}  # and nothing of the sensor that is off
    assert state.megahertz == pytest.approx({"CPU policy0": 1510.4, "CPU policy4": 729.6, "17000000.gpu": 624.75})
    assert state.watts == pytest.approx({"VDD_IN": 6.0, "VDD_CPU_GPU_CV": 1.24})  # the third rail has no voltage
    assert state.joules == {}


def test_power_mode_without_its_names(tmp_path: Path) -> None:
    board = Board(lay(tmp_path, {"var/lib/nvpmodel/status": "pmode:0012"}), gpus_here=[])
    assert board.describe()["power_mode"] == "12"


def test_a_pc(tmp_path: Path) -> None:
    root = lay(tmp_path, RAPL)
    board = Board(root, gpus_here=[])
    assert (board.describe()["cpu"], board.describe()["power_mode"]) == ("Imaginary CPU 9000", "balanced")
    before = board.read()
    assert before.joules == {"package-0": 9.0, "package-0 dram": 0.25}  # cores are in the package, mmio is it again
    assert before.watts == {"amdgpu power1": 31.0}
    lay(root, {f"sys/class/powercap/{zone}/energy_uj": "750000\n" for zone in ("intel-rapl:0", "intel-rapl:0:1")})
    spent = board.joules_between(before, board.read())
    assert spent == pytest.approx({"package-0": 1.75, "package-0 dram": 0.5})  # the first began anew at 10 J


def test_counters_that_cannot_be_read_are_not_reported(tmp_path: Path) -> None:
    root = lay(tmp_path, {name: text for name, text in RAPL.items() if not name.endswith("rapl:0/energy_uj")})
    (root / "sys/class/powercap/intel-rapl:0/energy_uj").mkdir()  # reading it fails, for root too
    board = Board(root, gpus_here=[])
    assert board.unreadable == ["package-0"]
    assert board.read().joules == {"package-0 dram": 0.25}


def test_a_machine_without_any_sensor() -> None:
    board = bare_board()
    assert board.read() == Reading({}, {}, {}, {})
    described = board.describe()
    assert described.pop("gpus") == []
    assert set(described.values()) == {None}
    assert resident_memory(NOWHERE) is None


def test_memory_of_this_process(tmp_path: Path) -> None:
    root = lay(tmp_path, {"proc/self/status": "Name:\tpython\nVmHWM:\t   2048 kB\nVmRSS:\t    1024 kB\n"})
    assert (peak_memory(root), resident_memory(root)) == (2 * 2**20, 2**20)
    here, most = resident_memory(), peak_memory()
    assert here is not None
    assert most is not None
    assert 2**20 < here <= most


class Steady(Board):
    """6 W at one rail, and a counter that gains 2 J with every look."""

    def __init__(self) -> None:
        super().__init__(NOWHERE, gpus_here=[])
        self.looks = 0

    def watts(self) -> dict[str, float]:
        return {"VDD_IN": 6.0}

    def read(self) -> Reading:
        self.looks += 1
        return Reading({"cpu": 40.0 + self.looks}, {"CPU": 1000.0}, {"package-0": 2.0 * self.looks}, self.watts())


def test_energy_is_counted_or_integrated() -> None:
    with EnergyMeter(Steady()) as meter:
        time.sleep(0.12)
    assert meter.joules["package-0"] == 2.0
    assert meter.joules["VDD_IN"] / meter.seconds == pytest.approx(6.0)


class FakeNvml:
    """A library with one GPU; ``without`` are functions that the GPU does not support."""

    class Function:
        def __init__(self, act: Any) -> None:
            self.act, self.argtypes, self.restype = act, (), None

        def __call__(self, *arguments: Any) -> int:
            return self.act(*arguments)

    def __init__(self, without: tuple[str, ...] = (), count: int = 1) -> None:
        def put(value: int):
            def act(*arguments: Any) -> int:
                arguments[-1]._obj.value = value
                return 0

            return act

        def name(handle: Any, buffer: Any, size: int) -> int:
            buffer.value = b"NVIDIA Imaginary"
            return 0

        def clock(handle: Any, kind: int, value: Any) -> int:
            value._obj.value = {1: 1980, 2: 2619}[kind]
            return 0

        acts = {
            "nvmlInit_v2": lambda: 0,
            "nvmlDeviceGetCount_v2": put(count),
            "nvmlDeviceGetHandleByIndex_v2": lambda index, handle: 0,
            "nvmlDeviceGetName": name,
            "nvmlDeviceGetTemperature": put(37),
            "nvmlDeviceGetClockInfo": clock,
            "nvmlDeviceGetPowerUsage": put(71_500),
            "nvmlDeviceGetTotalEnergyConsumption": put(12_345_678),
            "nvmlDeviceGetEnforcedPowerLimit": put(700_000),
        }
        for function, act in acts.items():
            setattr(self, function, self.Function((lambda *_: 3) if function in without else act))


def test_gpus_by_nvml() -> None:
    (gpu,) = gpus(FakeNvml())
    assert (gpu.name, gpu.model, gpu.power_limit) == ("GPU 0", "NVIDIA Imaginary", 700.0)
    state = Board(NOWHERE, gpus_here=[gpu]).read()
    assert state.celsius == {"GPU 0": 37.0}
    assert state.megahertz == {"GPU 0 SM": 1980.0, "GPU 0 memory": 2619.0}
    assert state.joules == {"GPU 0": 12345.678}
    assert state.watts == {}  # its counter is better
    (old,) = gpus(FakeNvml(without=("nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetClockInfo")))
    state = Board(NOWHERE, gpus_here=[old]).read()
    assert (state.watts, state.joules, state.megahertz) == ({"GPU 0": 71.5}, {}, {})
    assert gpus(FakeNvml(without=("nvmlInit_v2",))) == []
    assert gpus(ctypes.CDLL(None)) == []  # a library without these functions


# --- measuring ---


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


# --- the picture ---

BARS = [Bar("model, onnxruntime", "engine only", 1.0, 2.0, 4.0), Bar("a & <b>", "end to end", 3.0, 3.5, 8.0)]


def test_svg_is_to_scale() -> None:
    root = ElementTree.fromstring(draw_svg("tiny & <co>", BARS))
    space = "{http://www.w3.org/2000/svg}"
    texts = [element.text for element in root.iter(f"{space}text")]
    assert {"tiny & <co>", "model, onnxruntime", "a & <b>", "1 ms", "3 ms", "engine only", "end to end"} <= set(texts)
    by_colour: dict[str, list[float]] = {}
    for box in root.iter(f"{space}rect"):
        if box.get("height") == "20.0":
            by_colour.setdefault(str(box.get("fill")), []).append(float(str(box.get("width"))))
    (one,), (three,) = by_colour.values()
    assert three == pytest.approx(3 * one, abs=0.2)


@pytest.mark.parametrize("largest", [0.0123, 0.999, 1.0, 7.0, 345.0, 99_999.0])
def test_the_grid_has_a_few_lines(largest: float) -> None:
    root = ElementTree.fromstring(draw_svg("", [Bar("x", "y", largest / 3, largest / 2, largest)]))
    lines = [box for box in root.iter("{http://www.w3.org/2000/svg}rect") if box.get("fill") == "#dddddd"]
    assert 4 <= len(lines) <= 9


def test_png() -> None:
    with Image.open(io.BytesIO(draw_png("tiny · 数", BARS))) as image:
        assert image.format == "PNG"
        assert len(image.convert("RGB").getcolors(1 << 20)) > 4


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

    monkeypatch.setattr("mope_deploy.bench.command.os.replace", fails)
    code, _, err = mope(bundle_path, "--duration", "0.1", "--json", tmp_path / "figures.json")
    assert code == 1
    assert "No space left" in err
    assert (tmp_path / "figures.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
