"""Tiny models of every kind of routing; each is traced once a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import torch

from export.graph.exporter_config import MoPEExporterConfig, exporter_config
from export.graph.static import to_static
from export.graph.to_onnx import save, trace
from export.pipeline import export_bundle
from mope_deploy.model import MoPE
from tests.encoders import bert, vit
from tests.export.runs import write_data, write_run
from tests.tiny import tiny_inputs, tiny_model

__all__ = ["bert", "vit"]  # fixtures

KINDS = ("dense", "top2", "top1", "unrouted")
OPSETS = {"dense": 18, "top2": 17, "top1": 20, "unrouted": 19}


@dataclass(frozen=True)
class Export:
    """A model and the graph saved of it."""

    model: MoPE
    config: MoPEExporterConfig
    graph: ir.Model
    file: Path

    def proto(self) -> onnx.ModelProto:
        """The saved graph, a fresh copy."""
        return onnx.load(self.file)


def make_model(kind: str, vit: Path, bert: Path) -> MoPE:
    """One of :data:`KINDS`; between them they use every option that changes the graph."""
    if kind == "dense":
        return tiny_model(vit, bert)
    if kind == "top2":
        return tiny_model(vit, bert, top_k=2, static=False, mapper_per_layer=True, seed=1)
    if kind == "top1":
        options = {"top_k": 1, "similarity": "cosine", "y_norm": "standardise", "d_x": 0, "train_embeddings": True}
        model = tiny_model(vit, bert, seed=2, **options)
        with torch.no_grad():
            model.fit_statistics(model.encode_complementary(tiny_inputs(20, 9)))
        return model
    assert kind == "unrouted"
    return tiny_model(vit, bert, dynamic=False, prompts=0, task="multi-label", labels=("a", "b", "c", "d"), seed=3)


class Exports(dict[str, Export]):
    """Models and graphs by kind, each made when it is first asked for: a worker traces only what its tests need."""

    def __init__(self, vit: Path, bert: Path, folder: Path) -> None:
        super().__init__()
        self.vit, self.bert, self.folder = vit, bert, folder

    def __missing__(self, kind: str) -> Export:
        model = make_model(kind, self.vit, self.bert)
        config = exporter_config(model)
        graph = trace(to_static(model), config, opset=OPSETS[kind])
        save(graph, self.folder / f"{kind}.onnx")
        self[kind] = Export(model, config, graph, self.folder / f"{kind}.onnx")
        return self[kind]


@pytest.fixture(scope="session")
def exports(vit: Path, bert: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Export]:
    """Every kind of model with its graph on disk."""
    return Exports(vit, bert, tmp_path_factory.mktemp("graphs"))


@pytest.fixture
def use_graph(monkeypatch: pytest.MonkeyPatch) -> Callable[[Export], None]:
    """Let an export use a graph that was traced before: tracing is most of its time and tested by itself."""

    def use(export: Export) -> None:
        monkeypatch.setattr("export.variants.trace", lambda *_, **__: ir.load(export.file))

    return use


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "data")


@pytest.fixture(scope="session")
def run(vit: Path, bert: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the dense model."""
    return write_run(tmp_path_factory.mktemp("runs") / "tiny", make_model("dense", vit, bert), data)


@pytest.fixture(scope="session")
def bundle(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That run exported from Python, with the fused variant."""
    return export_bundle(run, tmp_path_factory.mktemp("bundles") / "tiny", fuse=True)
