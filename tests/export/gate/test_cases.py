"""What the gate feeds: enough of it, awkward, and nothing undefined."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from export.gate.cases import generated_cases, rows_needed, sample_cases
from export.graph.exporter_config import EXAMPLE_BATCH, EXAMPLE_LENGTH, MoPEGraph
from export.limits import MIN_VALUES
from mope_deploy.data import open_samples
from tests.export.conftest import Export

GRAPH = MoPEGraph(
    input_names=("pixel_values", "input_ids", "attention_mask"),
    image_size=(8, 6),
    vocab_size=30,
    max_length=20,
    num_labels=3,
    num_layers=2,
    num_experts=4,
    routing_output=True,
)


@pytest.mark.parametrize("labels", [1, 2, 3, 23, 101, 1000])
@pytest.mark.parametrize("longest", [3, 5, 7, 128])
def test_enough_values_in_sizes_that_were_not_traced(labels: int, longest: int) -> None:
    cases = generated_cases(dataclasses.replace(GRAPH, num_labels=labels, max_length=longest))
    assert sum(case.batch for case in cases) * labels >= MIN_VALUES
    sizes = {case.inputs["input_ids"].shape for case in cases}
    assert 1 in {batch for batch, _ in sizes}
    assert len({batch for batch, _ in sizes}) >= 4
    assert len({length for _, length in sizes}) >= (1 if longest == 3 else 2)
    assert all(length <= longest for _, length in sizes)
    assert (EXAMPLE_BATCH, EXAMPLE_LENGTH) not in sizes


@pytest.mark.parametrize(("layers", "experts"), [(1, 1), (2, 1), (1, 2), (12, 16)])
def test_enough_values_of_routing_too(layers: int, experts: int) -> None:
    cases = generated_cases(dataclasses.replace(GRAPH, num_layers=layers, num_experts=experts))
    assert sum(case.batch for case in cases) * layers * experts >= MIN_VALUES
    assert sum(case.batch for case in cases) * GRAPH.num_labels >= MIN_VALUES


def test_rows_are_padded_but_never_masked_altogether() -> None:
    cases = generated_cases(GRAPH)
    for case in cases:
        mask = case.inputs["attention_mask"]
        assert (mask.sum(1) >= 1).all()
        assert (np.diff(mask, axis=1) <= 0).all()  # padding behind the text
        assert case.inputs["input_ids"].min() >= 0
        assert case.inputs["input_ids"].max() < 30
        assert not case.inputs["input_ids"][mask == 0].any()
    masks = {case.name: case.inputs["attention_mask"] for case in cases}
    assert any(mask.all() for name, mask in masks.items() if "unpadded" in name)
    assert any(not mask[:, -1].any() for name, mask in masks.items() if "all rows" in name)
    assert any(mask.all(1).any() and not mask.all() for mask in masks.values())


def test_one_case_is_nearly_constant() -> None:
    """Down to pictures of one value alone, and texts of one word."""
    case = next(case for case in generated_cases(GRAPH) if "nearly constant" in case.name)
    spread = case.inputs["pixel_values"].reshape(case.batch, -1).std(axis=1)
    assert (spread < 5e-3).all()
    assert spread[-1] == 0 < spread[0]
    for ids, mask in zip(case.inputs["input_ids"], case.inputs["attention_mask"], strict=True):
        assert len(set(ids[mask > 0].tolist())) == 1
        assert not ids[mask == 0].any()


def test_the_same_seed_gives_the_same_cases() -> None:
    first, second, other = generated_cases(GRAPH), generated_cases(GRAPH), generated_cases(GRAPH, seed=1)
    assert all(np.array_equal(a.inputs[k], b.inputs[k]) for a, b in zip(first, second, strict=True) for k in a.inputs)
    assert not np.array_equal(first[1].inputs["pixel_values"], other[1].inputs["pixel_values"])


def test_real_samples_come_as_preprocessing_makes_them(exports: dict[str, Export], data: Path) -> None:
    preprocessing = exports["dense"].model.preprocessing
    samples = list(open_samples(data))[:21]
    cases = list(sample_cases(preprocessing, samples))
    assert [case.batch for case in cases] == [1, 3, 16, 1]
    expected = preprocessing.collate([sample.load(preprocessing) for sample in samples[1:4]])
    for name, array in cases[1].inputs.items():
        assert np.array_equal(array, expected[name])


def test_rows_needed_leave_room_for_near_ties() -> None:
    assert rows_needed(3) * 3 > MIN_VALUES * 1.2
    assert rows_needed(1000) == 1
