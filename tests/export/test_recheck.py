"""``mope-export check`` on a run's own bundle: it passes what is faithful, and notices a fault in this very model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto

from export.cli import main
from export.recheck import check_bundle
from mope_deploy.bundle import MANIFEST, Bundle, write_bundle
from mope_deploy.errors import UsageError
from mope_deploy.model import MoPE
from tests.export.gate.faults import edit
from tests.tiny import tiny_model


def test_repeats_the_gate_on_the_bundles_own_files(bundle: Path, run: Path, data: Path) -> None:
    model = MoPE.from_pretrained(run / "best")
    reports = check_bundle(model, Bundle.open(bundle), data=data, seed=5)
    assert {name: report.passed for name, report in reports.items()} == {"model": True, "model-fused": True}
    assert reports["model"].sha256 == Bundle.open(bundle).manifest.files["model.onnx"].sha256
    with torch.no_grad():
        model.head.classifier.weight[0, 0] += 1e-3
    reports = check_bundle(model, Bundle.open(bundle), data=data)
    assert {name: report.passed for name, report in reports.items()} == {"model": False, "model-fused": False}


@pytest.mark.parametrize("seed", [1, 2])
def test_other_batches_and_samples_agree_too(seed: int, bundle: Path, run: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    assert main(["check", str(run), str(bundle), "--seed", str(seed), "--report", str(report)]) == 0
    found = json.loads(report.read_text())
    assert {name: graph["passed"] for name, graph in found.items()} == {"model": True, "model-fused": True}


def faulty(bundle: Path, target: Path, fault: Callable[[ModelProto], None]) -> Path:
    """The bundle with another canonical graph, and a manifest that is right about it."""
    target = Path(shutil.copytree(bundle, target))
    graph = onnx.load(target / "model.onnx")
    fault(graph)
    (target / "model.onnx.data").unlink()
    onnx.save(graph, target / "model.onnx", save_as_external_data=True, location="model.onnx.data")
    document: dict[str, Any] = json.loads((target / MANIFEST).read_text())
    document["graphs"] = document["graphs"][:1]
    names = [name for name in document.pop("files") if name != "model.fused.onnx"]
    return write_bundle(
        target.with_name("faulty"), files={name: target / name for name in names}, manifest=document
    ).path


def test_a_fault_far_below_what_predictions_show_is_noticed(
    bundle: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every logit moved by a thousandth of the largest."""
    largest = float(np.abs(Bundle.open(bundle).golden()[1]["logits"]).max())

    def fault(graph: ModelProto) -> None:
        edit(graph, "head.classifier.bias", lambda bias: bias + np.float32(1e-3 * max(largest, np.abs(bias).max())))

    path = faulty(bundle, tmp_path / "copy", fault)
    assert main(["check", str(run), str(path)]) == 1
    assert "model.onnx does not compute what the model computes: logits" in capsys.readouterr().err


def test_a_bundle_of_another_task_is_refused(bundle: Path, vit: Path, bert: Path, data: Path) -> None:
    other = tiny_model(vit, bert, labels=("neutral", "entailment", "contradiction"))
    with pytest.raises(UsageError, match="of a model with other labels; received entailment, neutral"):
        check_bundle(other, Bundle.open(bundle), data=data)
