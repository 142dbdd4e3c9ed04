"""Layers and products are read from names, whatever the encoder's family."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from export.graph.files import read
from export.precision.layout import layout
from mope_deploy.errors import ExportError
from tests.export.conftest import KINDS, Export

TEXT = "complementary.text.backbone.encoder.encoder.layer"


def graph(*nodes: tuple[str, str, str | None]) -> ir.Graph:
    """Nodes in a row from (module, operator, weight name); without a weight a product multiplies its input twice."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([2, 2]))
    made, weights, last = [], {}, x
    for i, (module, op, weight) in enumerate(nodes):
        inputs = [last]
        if weight is not None:
            weights.setdefault(
                weight, ir.Value(name=weight, const_value=ir.tensor([[1.0, 2.0], [3.0, 4.0]], name=weight))
            )
            inputs.append(weights[weight])
        elif op == "MatMul":
            inputs.append(last)
        made.append(ir.node(op, inputs, name=f"{module}/{op}_{i}"))
        last = made[-1].outputs[0]
    return ir.Graph([x], [last], nodes=made, initializers=list(weights.values()))


def linear(module: str) -> tuple[str, str, str]:
    return module, "MatMul", f"{module}.weight.T"


def attention(module: str) -> list[tuple[str, str, str | None]]:
    return [linear(f"{module}.qkv"), (module, "MatMul", None), (module, "Softmax", None), linear(f"{module}.proj")]


@pytest.mark.parametrize("kind", KINDS)
def test_finds_layers_and_linear_layers_of_vit_and_bert(kind: str, exports: dict[str, Export]) -> None:
    found = layout(read(exports[kind].file).graph)
    bert = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
    vit = ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.proj")
    parts = {
        **{f"{TEXT}.{i}": (*bert, "intermediate.dense", "output.dense") for i in (0, 1)},
        **{f"main.encoder.blocks.{i}": (*vit, "mlp.fc1", "mlp.fc2") for i in (0, 1)},
    }
    assert found.layers == tuple(parts)
    assert list(found.products) == [f"{layer}.{part}" for layer, names in parts.items() for part in names]
    assert all(len(product.nodes) == 1 for product in found.products.values())
    assert found.products["main.encoder.blocks.1.mlp.fc2"].layer == "main.encoder.blocks.1"
    assert found.products["main.encoder.blocks.1.mlp.fc2"].weight == "main.encoder.blocks.1.mlp.fc2.weight.T"
    assert found.multiplying["main.encoder.patch_embed"] == ("main.encoder.patch_embed.proj",)
    assert "main.encoder.blocks.0.attn" in found.multiplying["main.encoder.blocks.0"]
    assert "complementary.text.backbone.encoder.embeddings" in found.parts


def test_stages_hold_blocks_and_what_stands_between_them() -> None:
    nodes = []
    for stage in (0, 1):
        if stage:
            nodes.append(linear(f"main.encoder.layers.{stage}.downsample.reduction"))
        for block in (0, 1):
            nodes += attention(f"main.encoder.layers.{stage}.blocks.{block}.attn")
            nodes += [linear(f"main.encoder.layers.{stage}.blocks.{block}.mlp.fc1")]
    found = layout(graph(linear("main.encoder.patch_embed.proj"), *nodes))
    assert found.layers == (
        "main.encoder.layers.0.blocks.0",
        "main.encoder.layers.0.blocks.1",
        "main.encoder.layers.1.downsample",
        "main.encoder.layers.1.blocks.0",
        "main.encoder.layers.1.blocks.1",
    )
    assert found.products["main.encoder.layers.1.downsample.reduction"].layer == "main.encoder.layers.1.downsample"
    assert found.parts == ("main.encoder.patch_embed",)
    assert "main.encoder.patch_embed.proj" not in found.products


def test_numbers_inside_a_layer_are_not_layers() -> None:
    mlp = [linear("main.encoder.blocks.3.mlp.0"), linear("main.encoder.blocks.3.mlp.2.inner")]
    front = [("main.encoder.extractor.conv_layers.0.conv", "Conv", "main.encoder.extractor.conv_layers.0.conv.weight")]
    found = layout(graph(*front, *attention("main.encoder.blocks.3.attn"), *mlp))
    assert found.layers == ("main.encoder.blocks.3",)
    assert list(found.products)[-2:] == ["main.encoder.blocks.3.mlp.0", "main.encoder.blocks.3.mlp.2.inner"]
    assert found.parts == ("main.encoder.extractor",)


def test_a_folded_constant_is_no_linear_layer() -> None:
    positions = (f"{TEXT}.0.attention", "MatMul", "val_53")  # keys of relative positions, folded by the exporter
    found = layout(graph(*attention(f"{TEXT}.0.attention"), positions))
    assert list(found.products) == [f"{TEXT}.0.attention.qkv", f"{TEXT}.0.attention.proj"]


def test_routers_mappers_prompts_and_head_are_no_part_of_an_encoder() -> None:
    outside = ("layers.0.router.project_x", "mappers.text.down", "head.classifier", "complementary.text.prompts.0")
    found = layout(graph(*attention("main.encoder.blocks.0.attn"), *[linear(name) for name in outside]))
    assert list(found.products) == ["main.encoder.blocks.0.attn.qkv", "main.encoder.blocks.0.attn.proj"]
    assert found.parts == ()


def test_a_shared_module_is_one_product_of_several_nodes() -> None:
    found = layout(graph(*attention("main.encoder.group.0.attn"), *attention("main.encoder.group.0.attn")))
    assert found.layers == ("main.encoder.group.0",)
    assert {name: len(product.nodes) for name, product in found.products.items()} == {
        "main.encoder.group.0.attn.qkv": 2,
        "main.encoder.group.0.attn.proj": 2,
    }


def test_an_unknown_name_to_keep_names_the_nearest(exports: dict[str, Export]) -> None:
    found = layout(read(exports["dense"].file).graph)
    with pytest.raises(ExportError, match=r"received main.encoder.block.1; expected main.encoder.blocks.1"):
        found.check_known(["main.encoder.block.1"], found.layers)
