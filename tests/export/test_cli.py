"""``mope-export`` as a user meets it: exit codes, one line for every mistake, nothing written unless it succeeds."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import onnx
import onnx_ir as ir
import pytest
import tomllib
from onnx import numpy_helper
from setuptools import find_namespace_packages

import mope_deploy.cli
from export.cli import main
from mope_deploy.console import run_app
from tests.export.conftest import Export
from tests.export.runs import write_run
from tests.export.test_pipeline import contents, tiny_model_like


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def mope_export(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    def call(*arguments: object) -> Result:
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return Result(code, out, err)

    return call


MISUSE = {
    ("{run}", "--format", "onnxx"): "there is no format 'onnxx'; expected one of: onnx, trt, triton; did you mean onnx",
    ("{run}", "--format", "zip"): "there is no format 'zip'",
    ("{run}", "--format", "onnx,onnx"): "each name once",
    ("{run}", "--format", ","): "format; received nothing",
    ("{run}", "--format", "tr"): "did you mean trt?",
    ("{run}", "--precision", "int4"): "there is no precision 'int4'; expected one of: fp32, fp16, bf16, int8",
    ("{run}", "--precision", "fp32,int-8"): "did you mean int8?",
    ("{run}", "--precision", "int8", "--fuse"): "add fp32 to --precision, or leave --fuse out",
    ("{run}", "--threshold", "labels"): "--threshold; received 'labels'; expected like labels=0.98",
    ("{run}", "--threshold", "lables=0.9"): "there is no threshold 'lables'; expected one of: labels, routing, metric",
    ("{run}", "--threshold", "labels=98"): "the threshold labels; received 98.0; expected a share from 0 to 1",
    ("{run}", "--threshold", "labels=nan"): "expected a share from 0 to 1",
    ("{run}", "--calib-method", "minmax"): "there is no calibration method 'minmax'",
    ("{run}", "--calib", "0"): "Invalid value for '--calib'",
    ("{run}", "--calib-data", "nowhere.jsonl"): "--calib-data nowhere.jsonl is not a file",
    ("{run}", "--target", "orin"): "--target; received 'orin'; expected one of cpu, rtx, server, orin-nano",
    ("{run}", "--target", "cpu", "--precision", "bf16"): "no bfloat16 MatMul",
    ("{run}", "--target", "orin-nano", "--precision", "int8-dynamic"): "the precision for --target orin-nano",
    ("{run}", "--target", "orin-nano", "--precision", "fp8"): "compute capability 8.7 and FP8 needs 8.9",
    ("{run}", "--target", "cpu", "--format", "trt"): "--target cpu has no TensorRT",
    (
        "{run}",
        "--target",
        "orin-nano",
        "--format",
        "trt",
        "--backend",
        "tensorrt_rtx",
    ): "on the device: mope build BUNDLE",
    ("{run}", "--format", "trt", "--precision", "int8-dynamic"): "--format trt has nothing to build",
    ("{run}", "--backend", "tensorrt_rtx"): "--backend belongs to --format trt; received --format onnx",
    ("{run}", "--triton", "repository"): "--triton belongs to --format triton",
    ("{run}", "--format", "trt", "--backend", "tensorflow"): "tensorflow",
    ("{run}", "--format", "trt", "--compute", "9.9"): "--compute",
    ("{run}", "--batch", "4:1:8"): "1 <= min <= opt <= max",
    ("{run}", "--batch", "1:x:4"): "--batch; received '1:x:4'; expected min:opt:max",  # no emoji
    ("{run}", "--batch", "1:2:4", "--precision", "int8-dynamic"): "--batch is for TensorRT engines, which no graph of",
    ("{run}", "--workspace", "64", "--split"): "--workspace is for TensorRT engines",
    ("{run}", "--calib", "9"): "--calib is for precision int8, and would change nothing here; leave it out",
    ("{run}", "--calib-method", "entropy", "--precision", "fp16"): "--calib-method is for precision int8",
    ("{run}", "--threshold", "labels=0.9"): "--threshold is for precisions below fp32",
    ("{run}", "--gate-samples", "9"): "--gate-samples is for precisions below fp32",
    ("{run}", "--split", "--format", "onnx,trt"): "--split with --format onnx,trt; export two bundles",
    ("{run}", "--split", "--format", "triton"): "--split with --format triton",
    ("{run}", "--split", "--precision", "bf16"): "bf16 is for TensorRT alone; received --split with bf16",
    ("{run}", "--cpu-threads", "5000"): "--cpu-threads; received 5000; expected 1 to 512",
    ("{run}", "--text-len", "short"): "--text-len; received 'short'",
    ("{run}", "--workspace", "0"): "Invalid value for '--workspace'",
    ("{run}", "--opset", "23"): "the opset; received 23; expected 17 to 20",
    ("{run}", "--samples", "0"): "Invalid value for '--samples'",
    ("{run}", "--name", " "): "the bundle's name",
    ("{run}", "--data", "nowhere.jsonl"): "--data nowhere.jsonl is not a file",
    ("{run}", "--out", "{run}"): "exists and is not a bundle, so it is not replaced",
    ("{run}", "--out", "{bundle}"): "exists; choose another name with --out, or add --overwrite",
    ("{bundle}",): "is a bundle, exported already",
    ("nowhere",): "there is nothing at nowhere",
    ("{run}", "--frmat", "onnx"): "No such option: --frmat",
    (): "Missing argument 'RUN'",
    ("check", "{run}"): "Missing argument 'BUNDLE'",
    ("check", "{run}", "{run}"): "is not a bundle; received a training run",
    ("check", "{bundle}", "{bundle}"): "is a bundle, exported already",
}


@pytest.mark.parametrize("arguments", MISUSE, ids=" ".join)
def test_misuse_is_one_line_with_exit_code_2(
    arguments: tuple[str, ...],
    mope_export: Callable[..., Result],
    run: Path,
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = contents(run), contents(bundle)
    done = mope_export(*(argument.format(run=run, bundle=bundle) for argument in arguments))
    assert done.code == 2
    assert MISUSE[arguments] in done.err
    assert done.out == ""
    if done.err.startswith("error:"):
        assert done.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
    assert (contents(run), contents(bundle)) == before


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda run: (run / "run.json").write_text("{"), "run.json cannot be read"),
        (lambda run: (run / "best" / "model.safetensors").write_bytes(b"no"), "model.safetensors cannot be read"),
        (lambda run: (run / "best" / "config.json").write_text("{}"), "describes no MoPE checkpoint"),
    ],
)
def test_a_damaged_run_is_one_line_with_exit_code_1(
    break_it: Callable[[Path], object],
    message: str,
    mope_export: Callable[..., Result],
    exports: dict[str, Export],
    data: Path,
    tmp_path: Path,
) -> None:
    run = write_run(tmp_path / "mine", exports["dense"].model, data)
    break_it(run)
    done = mope_export(run, "--out", tmp_path / "b")
    assert done.code == 1
    assert message in done.err.splitlines()[-1]
    assert not (tmp_path / "b").exists()


def test_a_dry_run_says_everything_and_writes_nothing(
    mope_export: Callable[..., Result],
    run: Path,
    bundle: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = contents(run)
    done = mope_export(run, "--dry-run", "--fuse", "--opset", "20")
    assert done.code == 0
    for part in (
        "image conditioned by text, L = 3, K = 5, dense routing, 3 labels",
        "pixel_values (batch, 3, 32, 24), input_ids (batch, text_length)",
        "logits (batch, 3), routing (batch, 2, 5)",
        "opset 20",
        "a variant fused for ONNX Runtime",
        str(data),
        "bundles/tiny, called 'tiny'",
        "dry run: nothing was written",
    ):
        assert part in done.out
    assert list(tmp_path.iterdir()) == []
    assert contents(run) == before
    done = mope_export(
        run, "--dry-run", "--no-routing", "--split", "--precision", "fp16,int8", "--calib", "9", "--out", bundle
    )
    assert done.code == 0
    assert "routing" not in done.out.splitlines()[2]
    for part in (
        "a main file, and one of text",
        "append in 2 of 2 layers",
        "labels 0.99, routing 0.99, metric 0.01, probability 0.25, mean_probability 0.03, logits 0.1; ranges of up to",
        "MB or more, with what is kept in fp32; judged on up to 1,000 of",
        f"{bundle}, called 'tiny', which is there already: --overwrite would be needed",
    ):
        assert part in done.out


def test_success_ends_with_commands_that_work(
    mope_export: Callable[..., Result],
    use_graph: Callable[[Export], None],
    exports: dict[str, Export],
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    use_graph(exports["dense"])
    monkeypatch.chdir(tmp_path)
    target = "bundles/with a space"
    done = mope_export(run, "--format", "onnx", "--out", target, "--report", "report.json")
    assert done.code == 0, done.err
    assert "model.onnx against the eager model" in done.out
    assert "FAIL" not in done.out
    lines = done.out.splitlines()
    assert any(line.startswith(f"bundle      {target} (") and "MB in 15 files" in line for line in lines)
    assert any(line.startswith("took") and line.endswith(" s") for line in lines)
    assert json.loads(Path("report.json").read_text())["model.onnx"]["passed"] is True
    commands = [line.removeprefix("next").strip() for line in lines[-3:]]
    assert [command.split()[1] for command in commands] == ["verify", "run", "eval"]
    for command in commands:
        assert run_app(mope_deploy.cli.app, shlex.split(command)[1:]) == 0, command
    capsys.readouterr()
    again = mope_export("check", run, target, "--report", "again.json")
    assert again.code == 0
    assert "computes what" in again.out.splitlines()[-1]
    assert json.loads(Path("again.json").read_text())["model"]["passed"] is True


def test_a_failed_gate_shows_the_table_writes_the_report_and_no_bundle(
    mope_export: Callable[..., Result],
    exports: dict[str, Export],
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = exports["dense"].proto()
    table = next(tensor for tensor in model.graph.initializer if tensor.name == "layers.0.dynamic.table")
    table.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(table)[::-1].copy(), table.name))
    monkeypatch.setattr("export.variants.trace", lambda *_, **__: ir.from_proto(model))
    done = mope_export(run, "--out", tmp_path / "b", "--report", tmp_path / "report.json")
    assert done.code == 1
    assert "FAIL" in done.out
    assert done.err.splitlines()[-1].startswith("error: model.onnx does not compute what the model computes: logits")
    assert json.loads((tmp_path / "report.json").read_text())["model.onnx"]["passed"] is False
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_check_notices_another_model_and_an_altered_file(
    mope_export: Callable[..., Result], bundle: Path, run: Path, data: Path, exports: dict[str, Export], tmp_path: Path
) -> None:
    other = write_run(tmp_path / "other", tiny_model_like(exports["dense"]), data)
    done = mope_export("check", other, bundle)
    assert done.code == 1
    assert "does not compute what the model computes" in done.err
    assert "FAIL" in done.out
    altered = Path(shutil.copytree(bundle, tmp_path / "altered"))
    graph = onnx.load(altered / "model.onnx", load_external_data=False)
    graph.producer_name = "x"
    onnx.save(graph, altered / "model.onnx")
    done = mope_export("check", run, altered)
    assert done.code == 1
    assert "model.onnx was altered" in done.err


def test_a_run_folder_called_check(
    mope_export: Callable[..., Result],
    exports: dict[str, Export],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "check", exports["dense"].model, data)
    for arguments in (("check",), ("check", "--format", "onnx")):
        done = mope_export(*arguments)
        assert done.code == 2
        assert "the folder of that name is written ./check" in done.err
    assert "bundles/check, called 'check'" in mope_export("./check", "--dry-run").out


def test_help_names_both_commands(mope_export: Callable[..., Result]) -> None:
    done = mope_export("--help")
    assert done.code == 0
    assert "Usage: mope-export " in done.out
    assert "mope-export check runs/mine bundles/mine" in done.out
    assert "written ./check" in done.out
    assert "Usage: mope-export check " in mope_export("check", "--help").out


@pytest.mark.parametrize("arguments", [("--version",), ("check", "--version")], ids=" ".join)
def test_the_version(arguments: tuple[str, ...], mope_export: Callable[..., Result]) -> None:
    done = mope_export(*arguments)
    assert done == (0, f"mope-export {mope_deploy.__version__}\n", "")


def test_a_process_of_its_own_says_nothing_that_a_user_cannot_act_on(run: Path, bundle: Path, tmp_path: Path) -> None:
    """torch's exporter, transformers and ONNX Runtime are talkative. And the same run gives the same bytes."""
    command = [sys.executable, "-m", "export.cli", str(run), "--out", "b", "--fuse"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert "model.onnx against the eager model" in done.stdout
    steps = done.stderr.splitlines()
    assert all(line.endswith("…") for line in steps)
    assert len(steps) >= 5
    for name in ("model.onnx", "model.onnx.data", "model.fused.onnx", "golden/outputs.npz"):
        assert (tmp_path / "b" / name).read_bytes() == (bundle / name).read_bytes(), name


def test_what_is_installed_is_ours_alone() -> None:
    """Another distribution's namespace (``optimum``) is not written to."""
    root = Path(__file__).parents[2]
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    where = settings["find"]["where"]
    assert where == ["."]
    found = find_namespace_packages(str(root), include=settings["find"]["include"])
    assert {name.partition(".")[0] for name in found} == {"mope_deploy", "export", "train"}
