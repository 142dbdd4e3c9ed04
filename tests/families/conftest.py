"""Tiny models of every row, in each of its roles, and their graphs; each is made once, when first asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from export.graph.exporter_config import MoPEExporterConfig, exporter_config
from export.graph.files import save
from export.graph.static import to_static
from export.graph.to_onnx import trace
from mope_deploy.model import EncoderSpec, MoPE, MoPEConfig, build_model
from tests.families.table import GRAPHS, Family, by_name
from tests.tiny import LABELS, tiny_inputs

# Of routing. A graph costs seconds, so one of each row has both kinds: dense in layers 0, 2, … and top-2 in the others.
OPTIONS: dict[str, dict[str, int]] = {"dense": {}, "top2": {"top_k": 2}, "both": {"top_k": 2}}


@dataclass(frozen=True)
class Graph:
    """A model and the graph saved of it."""

    model: MoPE
    config: MoPEExporterConfig
    file: Path


def build(main: Path, complementary: Path, rows: tuple[Family, Family], **options: object) -> MoPE:
    """A tiny MoPE of two rows, its trained tensors large enough to matter."""
    config = MoPEConfig(
        main=EncoderSpec(modality=rows[0].modality, source=f"dir:{main}", max_seconds=seconds(rows[0])),
        # An encoder that cannot be run layer by layer has no prompts of its own.
        complementary=(
            EncoderSpec(
                modality=rows[1].modality,
                source=f"dir:{complementary}",
                prompts=3 if rows[1].main else 0,
                max_seconds=seconds(rows[1]),
            ),
        ),
        labels=LABELS,
        **{"prompt_length": 3, "experts": 5, "d_x": 2, "d_y": 4, "temperature": 1.0} | options,  # type: ignore[arg-type]
    )
    model = build_model(config)
    generator = torch.Generator().manual_seed(100)
    with torch.no_grad():
        for name, parameter in model.trained_parameters().items():
            if name.endswith((".tokens", ".prompts")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def seconds(family: Family) -> float | None:
    """Longest clip of a tiny encoder that has no length of its own."""
    return 0.3 if family.modality == "audio" and family.name != "Whisper" else None


def inputs_of(
    model: MoPE,
    batch: int,
    text_length: int = 7,
    *,
    audio_length: int = 150,
    seed: int = 0,
    double: bool = False,
) -> dict[str, Tensor]:
    """Random inputs: images and clips of the model's sizes, texts of 1 to ``text_length`` real tokens.

    Clips of any length have ``audio_length`` samples, and 37 fewer in every further row down to one frame.
    """
    made = model.preprocessing
    size = (8, 8) if made.image is None else (made.image.height, made.image.width)
    inputs = tiny_inputs(batch, text_length, seed=seed, size=size)
    generator = torch.Generator().manual_seed(seed)
    for name, (dtype, shape) in made.tensors.items():
        if dtype == "float32" and name != "pixel_values":
            sizes = [{"batch": batch, "audio_length": audio_length}.get(str(axis), axis) for axis in shape]
            inputs[name] = torch.randn(sizes, generator=generator)  # type: ignore[arg-type]
        if name == "audio_mask":
            real = torch.tensor([max(made.audio.min_samples, audio_length - 37 * i) for i in range(batch)])
            inputs[name] = (torch.arange(audio_length)[None] < real[:, None]).long()
            inputs["audio_values"] = torch.where(inputs[name] > 0, inputs["audio_values"], 0.0)
    inputs = {name: inputs[name] for name in model.input_names}
    return {name: value.double() if double and value.is_floating_point() else value for name, value in inputs.items()}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Family], Path]:
    """The folder of a row's tiny encoder."""

    @cache
    def make(family: Family) -> Path:
        return family.make(tmp_path_factory.mktemp("encoders") / "encoder")

    return make


@pytest.fixture(scope="session")
def model(folder: Callable[[Family], Path]) -> Callable[..., MoPE]:
    """``model(main, complementary, kind)`` by names of rows: shared by tests, which leave it as it was."""

    @cache
    def make(main: str, complementary: str, kind: str = "dense") -> MoPE:
        rows = by_name(main), by_name(complementary)
        built = build(folder(rows[0]), folder(rows[1]), rows, **OPTIONS[kind])
        if kind == "both":
            for layer in built.layers[::2]:
                layer.router.top_k = 0
        return built

    return make


@pytest.fixture(scope="session")
def graph(model: Callable[..., MoPE], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Graph]:
    """``graph(main, complementary)``: the graph of a model with both kinds of routing, its weights beside it."""

    @cache
    def make(main: str, complementary: str) -> Graph:
        trained = model(main, complementary, "both")
        config = exporter_config(trained)
        file = tmp_path_factory.mktemp("graphs") / "model.onnx"
        save(trace(to_static(trained), config), file, external=True)
        return Graph(trained, config, file)

    return make


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of one graph stand together, so that one worker runs them and traces it once."""
    places = [i for i, item in enumerate(items) if _names(item) in GRAPHS]
    found = sorted((items[i] for i in places), key=lambda item: GRAPHS.index(_names(item)))
    for i, item in zip(places, found, strict=True):
        items[i] = item


def _names(item: pytest.Item) -> Any:
    """Of the graph that a test is given."""
    return (
        item.callspec.params.get("names") if isinstance(item, pytest.Function) and hasattr(item, "callspec") else None
    )
