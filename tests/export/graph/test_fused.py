"""The variant for ONNX Runtime: every attention fused, weights shared, and as faithful as the raw graph."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest

from export.gate.cases import generated_cases
from export.gate.parity import measure
from export.graph.files import save
from export.graph.fused import attention_layers, fuse, routers
from mope_deploy.errors import ExportError
from tests.export.conftest import KINDS, Export
from tests.tiny import tiny_model


def data_files(file: Path) -> set[str]:
    graph = onnx.load(file, load_external_data=False).graph
    return {entry.value for tensor in graph.initializer for entry in tensor.external_data if entry.key == "location"}


@pytest.mark.parametrize("kind", KINDS)
def test_fuses_every_attention_and_stays_faithful(kind: str, exports: dict[str, Export], tmp_path: Path) -> None:
    export = exports[kind]
    raw, fused = tmp_path / "model.onnx", tmp_path / "model.fused.onnx"
    save(export.graph, raw, external=True)
    before = raw.read_bytes(), (tmp_path / "model.onnx.data").read_bytes()
    # Without dynamic prompts the text still conditions the image through the mapped one: four attentions in any case.
    own = fuse(raw, fused, layers=attention_layers(export.model), routers=routers(export.model))
    assert own["MultiHeadAttention"] + own["Attention"] == 4
    assert (raw.read_bytes(), (tmp_path / "model.onnx.data").read_bytes()) == before
    assert data_files(fused) == data_files(raw) == {"model.onnx.data"}
    report = measure(export.model, fused, export.config, generated_cases(export.config.graph))
    assert report.passed, report.problems()
    nodes = [node.name for node in onnx.load(fused, load_external_data=False).graph.node]
    assert len(set(nodes)) == len(nodes)


@pytest.mark.parametrize(("layers", "kept"), [(5, 2), (4, 1), (4, 3)])
def test_any_other_count_is_an_error_and_leaves_no_file(
    layers: int, kept: int, exports: dict[str, Export], tmp_path: Path
) -> None:
    save(exports["dense"].graph, tmp_path / "model.onnx", external=True)
    with pytest.raises(ExportError, match=r"received 4 fused and -?\d left; expected at least \d, .* without --fuse"):
        fuse(tmp_path / "model.onnx", tmp_path / "model.fused.onnx", layers=layers, routers=kept)
    assert not (tmp_path / "model.fused.onnx").exists()


def test_an_attention_that_cannot_be_matched_is_noticed(exports: dict[str, Export], tmp_path: Path) -> None:
    """Fusing never says what it did not match: take one softmax out of its pattern and count."""
    save(exports["dense"].graph, tmp_path / "model.onnx", external=True)
    model = onnx.load(tmp_path / "model.onnx")
    softmax = next(n for n in model.graph.node if n.op_type == "Softmax" and n.name.startswith("main.encoder.blocks.0"))
    between = onnx.helper.make_node("Abs", [softmax.output[0]], ["between"])
    for node in model.graph.node:
        node.input[:] = ["between" if name == softmax.output[0] else name for name in node.input]
    model.graph.node.insert(list(model.graph.node).index(softmax) + 1, between)
    (tmp_path / "model.onnx.data").unlink()
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=True, location="model.onnx.data")
    with pytest.raises(ExportError, match=r"did not find every attention layer; received 3 fused and 1 left"):
        fuse(tmp_path / "model.onnx", tmp_path / "model.fused.onnx", layers=4, routers=2)


def test_an_encoder_that_conditions_nothing_has_no_attention_in_the_graph(vit: Path, bert: Path) -> None:
    counts = {}
    for options in ({}, {"dynamic": False}, {"mapped": False}, {"dynamic": False, "mapped": False}):
        model = tiny_model(vit, bert, **options)
        counts[tuple(options)] = attention_layers(model), routers(model)
    assert counts == {(): (4, 2), ("dynamic",): (4, 0), ("mapped",): (4, 2), ("dynamic", "mapped"): (2, 0)}


def test_the_raw_graph_has_no_operators_of_a_single_engine(exports: dict[str, Export]) -> None:
    domains = Counter(node.domain for kind in KINDS for node in exports[kind].proto().graph.node)
    assert set(domains) == {""}
    assert np.prod(list(domains.values())) > 0
