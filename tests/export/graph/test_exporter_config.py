"""optimum finds our description of a MoPE graph, and it describes the graph."""

from __future__ import annotations

import dataclasses

import pytest
from optimum.exporters.tasks import TasksManager

from export.graph.exporter_config import MODEL_TYPE, TASK, MoPEExporterConfig, MoPEGraph
from tests.export.conftest import Export


def test_the_tasks_manager_knows_it() -> None:
    tasks = TasksManager.get_supported_tasks_for_model_type(MODEL_TYPE, "onnx", library_name="transformers")
    assert list(tasks) == [TASK]
    constructor = TasksManager.get_exporter_config_constructor(
        "onnx", model_type=MODEL_TYPE, task=TASK, library_name="transformers"
    )
    assert constructor.func is MoPEExporterConfig


def test_describes_inputs_outputs_and_tolerance(exports: dict[str, Export]) -> None:
    config = exports["dense"].config
    assert config.inputs == {
        "pixel_values": {0: "batch"},
        "input_ids": {0: "batch", 1: "text_length"},
        "attention_mask": {0: "batch", 1: "text_length"},
    }
    assert config.outputs == {"logits": {0: "batch"}, "routing": {0: "batch"}}
    assert config.tolerance == 1e-5
    assert config.values_override is None
    assert list(exports["unrouted"].config.outputs) == ["logits"]


@pytest.mark.parametrize("longest", [3, 7, 512])
def test_examples_have_different_sizes_on_different_axes(exports: dict[str, Export], longest: int) -> None:
    graph: MoPEGraph = dataclasses.replace(exports["dense"].config.graph, max_length=longest)
    examples = MoPEExporterConfig(graph, TASK).generate_dummy_inputs()
    batch, length = examples["input_ids"].shape
    assert batch != length
    assert length <= longest
    assert examples["pixel_values"].shape == (batch, 3, 32, 24)
    assert examples["attention_mask"].shape == (batch, length)
    assert examples["attention_mask"].sum(1).min() >= 1
    assert int(examples["input_ids"].max()) < graph.vocab_size


def test_sizes_can_be_asked_for(exports: dict[str, Export]) -> None:
    examples = exports["dense"].config.generate_dummy_inputs(framework="np", batch_size=5, sequence_length=11)
    assert {name: array.shape for name, array in examples.items()} == {
        "pixel_values": (5, 3, 32, 24),
        "input_ids": (5, 11),
        "attention_mask": (5, 11),
    }
