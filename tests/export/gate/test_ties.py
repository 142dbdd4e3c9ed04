"""Good models that a comparison could trip over: constants and ties. None of them makes an export fail."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto

from export.gate.cases import generated_cases
from export.gate.parity import measure
from export.graph.exporter_config import exporter_config
from export.graph.files import save
from export.graph.static import to_static
from export.graph.to_onnx import trace
from mope_deploy.model import MoPE
from tests.export.conftest import Export
from tests.export.gate.faults import edit
from tests.tiny import tiny_model


def keys_of(proto: ModelProto) -> list[str]:
    return [tensor.name for tensor in proto.graph.initializer if ".router.keys" in tensor.name]


def with_twins(export: Export, by: float) -> tuple[MoPE, ModelProto]:
    """Experts 0 and 1 score alike in every layer, in the file but for a part in a million."""
    model, proto = copy.deepcopy(export.model), export.proto()
    with torch.no_grad():
        for layer in model.layers:
            layer.router.embeddings[1] = layer.router.embeddings[0]

    def tie(stored: np.ndarray) -> np.ndarray:
        keys = stored if stored.shape[0] == export.model.config.experts else stored.T
        keys[1] = keys[0] * np.float32(1 + by)
        return stored

    assert len(keys_of(proto)) == 2
    for name in keys_of(proto):
        edit(proto, name, tie)
    return model, proto


@pytest.mark.parametrize("kind", ["top1", "top2"])
def test_between_experts_that_tie_either_is_right(kind: str, exports: dict[str, Export], tmp_path: Path) -> None:
    export, tied = exports[kind], []
    for by in (1e-6, -1e-6):
        model, proto = with_twins(export, by)
        onnx.save(proto, tmp_path / "tied.onnx")
        cases = generated_cases(export.config.graph)
        report = measure(model, tmp_path / "tied.onnx", export.config, cases)
        assert report.passed, report.problems()
        tied.append(report.tied)
    assert max(tied) > 0  # the other expert was selected, whose table is another one
    experts = next(found for found in report.decisions if found.kind == "experts")
    assert experts.compared == 2 * sum(case.batch for case in cases)
    # A tie excuses nothing but the choice: the expert that was chosen instead has to be the trained one.
    edit(
        proto, "layers.0.dynamic.table", lambda table: table + np.float32(0.01) * (np.arange(len(table)) == 1)[:, None]
    )
    onnx.save(proto, tmp_path / "bad.onnx")
    assert not measure(model, tmp_path / "bad.onnx", export.config, cases).passed


@pytest.mark.parametrize("kind", ["dense", "top1"])
def test_a_router_that_scores_all_experts_alike(kind: str, exports: dict[str, Export], tmp_path: Path) -> None:
    export = exports[kind]
    model, proto = copy.deepcopy(export.model), export.proto()
    with torch.no_grad():
        for layer in model.layers:
            for name, parameter in layer.router.named_parameters():
                if name.startswith("project"):
                    parameter.zero_()
    for tensor in list(proto.graph.initializer):
        if ".router.project" in tensor.name:
            edit(proto, tensor.name, np.zeros_like)
    onnx.save(proto, tmp_path / "tied.onnx")
    report = measure(model, tmp_path / "tied.onnx", export.config, generated_cases(export.config.graph))
    assert report.passed, report.problems()


@pytest.mark.parametrize("experts", [1])
def test_a_single_expert_in_a_shallow_encoder(experts: int, vit: Path, bert: Path, tmp_path: Path) -> None:
    """Two values of routing a sample: there were "only 108 values of 128 needed"."""
    model = tiny_model(vit, bert, experts=experts)
    config = exporter_config(model)
    file = save(trace(to_static(model), config), tmp_path / "model.onnx")[0]
    report = measure(model, file, config, generated_cases(config.graph))
    assert report.passed, report.problems()
    assert report.experts == report.selected == 2
