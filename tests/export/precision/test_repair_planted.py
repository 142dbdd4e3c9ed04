"""One bad layer planted in a real model, real lowerings: it is found, and alone kept.

The planted weights leave the model what it was in fp32. They are outliers of weights for int8, and overflow for fp16.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from export.gate import Evaluation, PrecisionReport, Thresholds, measure_precision
from export.graph.exporter_config import exporter_config
from export.graph.files import save
from export.graph.static import to_static
from export.graph.to_onnx import trace
from export.pack.golden import pick_samples
from export.precision import lowering
from export.precision.repair import Lowered, lower_within_gate
from mope_deploy.model import EncoderSpec, MoPE, MoPEConfig, build_model
from tests.export.conftest import Export
from tests.export.runs import write_data
from tests.tiny import LABELS

BAD = 2  # the layer of the image encoder
ASKED = Thresholds(labels=0.9, routing=0.9, metric=0.1)


@dataclass(frozen=True)
class Small:
    """The embedded encoders with random prompts around them, traced once."""

    export: Export
    data: Path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    folder = tmp_path_factory.mktemp("planted")
    config = MoPEConfig(
        main=EncoderSpec(modality="image", source="embedded:digits-ve-vit"),
        complementary=(EncoderSpec(modality="text", source="embedded:digits-ve-bert", prompts=2),),
        labels=LABELS,
        prompt_length=2,
        experts=4,
        temperature=1.0,
    )
    model = build_model(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.trained_parameters().items():
            if name.endswith((".tokens", ".prompts")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    data = write_data(folder / "data", rows=60)
    batches = list(Evaluation(model, pick_samples(data, model, 60)).batches())
    with torch.no_grad():  # without this nearly every sample has the same label, which no damage would change
        model.head.classifier.bias -= torch.from_numpy(np.concatenate([b.eager["logits"] for b in batches]).mean(0))
    described = exporter_config(model)
    graph = trace(to_static(model), described)
    save(graph, folder / "model.onnx")
    return Small(Export(model, described, graph, folder / "model.onnx"), data)


def outlier_weights(block: nn.Module) -> None:
    """One column of the weights a thousand times the others, its input a thousandth."""
    block.attn.qkv.weight[:, 7] *= 1024
    block.norm1.weight[7] /= 1024
    block.norm1.bias[7] /= 1024


def overflowing_activations(block: nn.Module) -> None:
    """Queries beyond the range of fp16, though no weight is; keys smaller by as much."""
    D = block.attn.qkv.in_features
    scale = 2.0 ** np.floor(np.log2(6e4 / float(block.attn.qkv.weight[:D].abs().max())))
    for rows, factor in ((slice(0, D), scale), (slice(D, 2 * D), 1 / scale)):
        block.attn.qkv.weight[rows] *= factor
        block.attn.qkv.bias[rows] *= factor


def plant(small: Small, change: Callable[[nn.Module], None], path: Path) -> Export:
    """Change one block of the model, and trace it: keys and values of prompts are made of its weights, too."""
    model: MoPE = copy.deepcopy(small.export.model)
    with torch.no_grad():
        change(model.main.encoder.blocks[BAD])
    save(trace(to_static(model), small.export.config), path)
    return replace(small.export, model=model, file=path)


def repair(export: Export, small: Small, folder: Path, precision: str) -> Lowered:
    evaluation = Evaluation(export.model, pick_samples(small.data, export.model, 60))
    lower = lowering(export.file, precision, calibration=[batch.feeds for batch in evaluation.batches()])

    def judge(file: Path) -> PrecisionReport:
        return measure_precision(
            evaluation,
            file,
            export.config,
            precision=precision,
            thresholds=ASKED,
            mark=lower.runtime_mark,
        )

    folder.mkdir()
    feeds = [batch.feeds for batch in itertools.islice(evaluation.batches(), 4)]  # 36 samples
    return lower_within_gate(lower, judge, folder, f"model.{precision}.onnx", feeds=lambda: feeds)


@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_nothing_is_kept_of_a_sound_model(precision: str, small: Small, tmp_path: Path) -> None:
    assert repair(small.export, small, tmp_path / "out", precision).kept == ()


def test_outlier_weights_are_found_and_alone_kept_by_int8(small: Small, tmp_path: Path) -> None:
    export = plant(small, outlier_weights, tmp_path / "planted.onnx")
    done = repair(export, small, tmp_path / "out", "int8")
    bad = [f"main.encoder.blocks.{BAD}.attn.{name}" for name in ("q_proj", "k_proj", "v_proj")]
    assert done.kept == tuple(bad)
    assert not done.history[0].passed
    assert done.report.passed
    assert done.files == (tmp_path / "out" / "model.int8.onnx",)
    stored = {tensor.name: tensor for tensor in onnx.load(done.files[0]).graph.initializer}
    weights = [name for name in stored if name.endswith("weight.T") or ".weight.T." in name]
    kept = [name for name in weights if stored[name].data_type == onnx.TensorProto.FLOAT and "encoder" in name]
    assert [name for name in kept if not name.endswith(".scale")] == [f"{name}.weight.T" for name in bad]


def test_overflow_is_found_and_alone_kept_by_fp16(small: Small, tmp_path: Path) -> None:
    export = plant(small, overflowing_activations, tmp_path / "planted.onnx")
    done = repair(export, small, tmp_path / "out", "fp16")
    assert done.kept
    assert all(name.startswith(f"main.encoder.blocks.{BAD}") for name in done.kept)
    assert done.errors[f"main.encoder.blocks.{BAD}"] == np.inf
    assert sum(np.isinf(error) for name, error in done.errors.items() if name.count(".") == 3) == 1  # no other layer
    first = done.history[0]
    assert not first.passed
    assert np.isnan(first.logits)
    assert "gives NaN or infinities" in done.explain()
    assert done.report.mark == "emulated"
    assert done.report.passed
