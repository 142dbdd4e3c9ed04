"""NVIDIA's own parser and compiler take every pair of encoder families that can be exported, at every precision.

A new family is one line of FAMILIES, a new precision one of PRECISIONS. Encoders have one layer, as compiling another
one shows nothing new. A pair shares nothing but y, a vector, and routing is the same for all pairs: so each is traced
once, and the ways to route and the variants of a family take turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import pytest
from numpy.typing import NDArray

from export.exporter_config import exporter_config
from export.precision import lowering
from export.static import to_static
from export.to_onnx import save, trace
from mope_deploy.engines.backends import open_backend
from mope_deploy.engines.log import shared_log
from mope_deploy.engines.worker import _build
from mope_deploy.errors import EngineError
from mope_deploy.model import EncoderSpec, MoPE, MoPEConfig, build_model
from tests.export.conftest import Export
from tests.tiny import LABELS, bert_folder, scatter_weights, tiny_inputs, vit_folder


@dataclass(frozen=True)
class Family:
    """Encoders of one kind: how each variant is written as a folder, and how many linear layers it has."""

    name: str
    modality: str
    variants: tuple[Callable[[Path], Path], ...]
    linear: int


vit = partial(vit_folder, depth=1)
bert = partial(bert_folder, num_hidden_layers=1)

FAMILIES = (
    Family("vit", "image", (vit, partial(vit, class_token=False, global_pool="avg", reg_tokens=2)), 4),
    Family("bert", "text", (bert,), 6),
    Family("roberta", "text", (partial(bert, model_type="roberta", pad_token_id=1),), 6),
    Family("xlm-roberta", "text", (partial(bert, model_type="xlm-roberta"),), 6),
    Family("camembert", "text", (partial(bert, model_type="camembert"),), 6),
    Family("distilbert", "text", (partial(bert, model_type="distilbert", hidden_dim=24),), 6),
    Family("electra", "text", (partial(bert, model_type="electra"),), 6),
)
PRECISIONS = ("fp32", "fp16", "bf16", "int8")
ROUTING: tuple[dict[str, Any], ...] = (
    {},
    {"top_k": 2, "mapper_per_layer": True},
    {"top_k": 1, "similarity": "cosine", "y_norm": "standardise"},
    {"static": False, "mapped": False},
)
LONGEST = 24


def pairs() -> Iterator[Any]:
    """Every (main, complementary) of different modalities, with a way to route and a turn among variants."""
    found = [(x, y) for x in FAMILIES for y in FAMILIES if x.modality != y.modality]
    for turn, (main, complementary) in enumerate(found):
        yield pytest.param(main, complementary, turn, id=f"{main.name}+{complementary.name}")


def make(main: Family, complementary: Family, turn: int, folder: Path) -> MoPE:
    def spec(family: Family, prompts: int) -> EncoderSpec:
        source = family.variants[turn % len(family.variants)](folder / family.name)
        return EncoderSpec(modality=family.modality, source=f"dir:{source}", prompts=prompts, max_length=LONGEST)

    model = build_model(
        MoPEConfig(
            main=spec(main, 0),
            complementary=(spec(complementary, turn % 2 * 3),),
            labels=LABELS,
            prompt_length=3,
            experts=5,
            d_y=4,
            **ROUTING[turn % len(ROUTING)],
        )
    )
    scatter_weights(model, seed=turn)
    return model


def feeds() -> Iterator[dict[str, NDArray[Any]]]:
    """To calibrate on."""
    for seed in range(4):
        yield {name: tensor.numpy() for name, tensor in tiny_inputs(4, 9, seed=seed).items()}


def described(file: Path) -> dict[str, list[dict[str, Any]]]:
    """Inputs and outputs as the worker's request has them."""
    names = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.INT64: "int64"}
    graph = onnx.load(file, load_external_data=False).graph
    return {
        kind: [
            {
                "name": value.name,
                "dtype": names[value.type.tensor_type.elem_type],
                "shape": [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim],
            }
            for value in values
        ]
        for kind, values in (("inputs", graph.input), ("outputs", graph.output))
    }


def build(file: Path, precision: str, engine: Path) -> dict[str, Any]:
    """What `mope build` has its worker do, in this process."""
    shared_log(open_backend("tensorrt_rtx")).clear()
    request = {
        "backend": "tensorrt_rtx",
        "onnx": str(file),
        "engine": str(engine),
        "precision": precision,
        "profile": {"batch": [1, 2, 8], "text_length": [1, 8, LONGEST]},
        "compute_capabilities": ["8.6"],
        "tf32": False,
        "workspace": None,
    }
    return _build(request | described(file), lambda _: None)


@pytest.mark.parametrize(("main", "complementary", "turn"), pairs())
def test_every_pair_is_built_at_every_precision(main: Family, complementary: Family, turn: int, tmp_path: Path) -> None:
    model = make(main, complementary, turn, tmp_path)
    graph = trace(to_static(model), exporter_config(model))
    save(graph, tmp_path / "fp32.onnx")
    linear = main.linear + complementary.linear
    for precision in PRECISIONS:
        file = tmp_path / f"{precision}.onnx"
        if precision != "fp32":
            lowering(tmp_path / "fp32.onnx", precision, calibration=feeds()).write(file)
        found = build(file, precision, tmp_path / f"{precision}.engine")
        assert (tmp_path / f"{precision}.engine").stat().st_size > 10_000
        products, quantised = found["precision"]["products"], found["precision"]["quantised"]
        lowered = {"fp16": "float16", "bf16": "bfloat16"}.get(precision, "float32")
        assert products[lowered] > linear
        assert set(products) <= {lowered, "float32"}
        if precision == "int8":  # the weights of each, and its input: q, k and v share one, quantised and read back
            assert quantised > 2 * linear
        else:
            assert quantised == 0


def test_every_family_stands_on_both_sides() -> None:
    """The table has every family that the library takes, so that a new one cannot be forgotten here."""
    from mope_deploy.model.backbones.bert import _MODEL_TYPES

    names = {family.name for family in FAMILIES}
    assert set(_MODEL_TYPES) <= names
    sides = [{one.values[side].name for one in pairs()} for side in (0, 1)]
    assert sides == [names, names]
    assert {one.values[2] % len(ROUTING) for one in pairs()} == set(range(len(ROUTING)))


def test_a_graph_that_is_not_lowered_is_refused(exports: dict[str, Export], tmp_path: Path) -> None:
    """What the pairs are built with finds a graph of another precision than it is called by."""
    for precision in PRECISIONS[1:]:
        with pytest.raises(EngineError, match=f"called {precision} and is something else"):
            build(exports["dense"].file, precision, tmp_path / "e.engine")
    assert not (tmp_path / "e.engine").exists()
