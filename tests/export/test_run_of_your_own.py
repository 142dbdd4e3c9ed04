"""The gate on a run of your own: ``pytest -m parity --run RUN``. Without ``--run``, on the tiny random model.

It exports the run into a temporary folder, repeats the gate on the bundle's own files with other random inputs and
other samples, and plants a fault to see that the gate would notice one in this very model.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from export import export_bundle
from export.gate.cases import generated_cases
from export.gate.parity import measure
from export.gate.parity_report import require_parity
from export.graph.exporter_config import exporter_config
from export.pipeline import check_bundle
from export.source import find_source
from mope_deploy import load
from mope_deploy.bundle import Bundle
from mope_deploy.model import MoPE

pytestmark = pytest.mark.parity


def test_the_option_is_understood_wherever_the_run_lies(run: Path) -> None:
    """pytest takes an unknown option's value for the root of the tests; ours is known from the start."""
    checkout = Path(__file__).parents[2]
    command = [sys.executable, "-m", "pytest", "-m", "parity", "--run", str(run), "--collect-only"]
    command += [f"--ignore={checkout / 'tests'}"]  # importing them all would take long and show no more
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=checkout)
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED, done.stderr
    assert f"rootdir: {run}" in done.stdout  # what cannot be helped, and was the trouble
    assert not (run / ".pytest_cache").exists()


@dataclass(frozen=True)
class Subject:
    model: MoPE
    data: Path
    bundle: Path


@pytest.fixture(scope="module")
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    given: Path | None = request.config.getoption("--run")
    folder = tmp_path_factory.mktemp("own")
    if given is None:
        source, bundle = find_source(request.getfixturevalue("run")), request.getfixturevalue("bundle")
    else:
        source = find_source(given)
        bundle = export_bundle(given, folder / "bundle", overwrite=True)
    yield Subject(source.load(), source.data, bundle)
    shutil.rmtree(folder)  # a model of your own may be large


@pytest.mark.parametrize("seed", [1, 2])
def test_the_saved_file_computes_what_the_model_computes(subject: Subject, seed: int) -> None:
    reports = check_bundle(subject.model, Bundle.open(subject.bundle), data=subject.data, seed=seed)
    for report in reports.values():
        require_parity(report)


def test_the_device_side_reproduces_the_golden_samples(subject: Subject) -> None:
    assert load(subject.bundle).verify().samples >= 1


def test_the_gate_would_notice_a_fault_in_this_model(subject: Subject, tmp_path: Path) -> None:
    """Every logit moved by a thousandth of the largest: far below what a glance at predictions would show."""
    bundle = Bundle.open(subject.bundle)
    graph = onnx.load(bundle.file(bundle.manifest.graphs[0].file))
    bias = next(tensor for tensor in graph.graph.initializer if tensor.name == "head.classifier.bias")
    array = numpy_helper.to_array(bias)
    largest = max(float(np.abs(logits).max()) for logits in (array, bundle.golden()[1]["logits"]))
    bias.CopyFrom(numpy_helper.from_array((array + np.float32(1e-3 * largest)), bias.name))
    onnx.save(graph, tmp_path / "faulty.onnx", save_as_external_data=True, location="faulty.onnx.data")
    config = exporter_config(subject.model, routing_output=bundle.manifest.routing is not None)
    assert not measure(subject.model, tmp_path / "faulty.onnx", config, generated_cases(config.graph)).passed
