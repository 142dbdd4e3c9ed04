"""Folding: exact in every form, chosen by what it costs, and nothing stored twice."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from export.graph.exporter_config import exporter_config
from export.graph.files import save
from export.graph.folding import AppendedExperts, Cost, FoldedExperts, LayerSize, Mixture, choose, constants, costs
from export.graph.split import part_inputs, split
from export.graph.static import to_static
from export.graph.to_onnx import trace
from export.limits import FOLDS
from export.options import Options
from mope_deploy.errors import UsageError
from mope_deploy.model import MoPE
from mope_deploy.model.backbones.prefix import PrefixKV, Projection
from tests.tiny import bert_folder, tiny_inputs, tiny_model, vit_folder

VIT_B = {"length": 6, "width": 768, "inner": 768, "product": 3 * 768, "norm": "layer"}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def projection(width: int, inner: int, *, norm: bool, dtype: torch.dtype = torch.float64) -> Projection:
    layer = nn.LayerNorm(width, eps=1e-3, dtype=dtype)
    layer.weight.data, layer.bias.data = random(width, seed=1, dtype=dtype), random(width, seed=2, dtype=dtype)
    weight = random(2 * inner, width, seed=3, dtype=dtype)
    return Projection(layer if norm else None, weight, random(2 * inner, seed=4, dtype=dtype), product=3 * inner)


def mixture(r: Tensor, top_k: int) -> Mixture:
    if not top_k:
        return Mixture(r, None, None)
    values, chosen = r.topk(top_k, dim=-1)
    values = values / values.sum(dim=-1, keepdim=True)
    return Mixture(torch.zeros_like(r).scatter(-1, chosen, values), values.unsqueeze(-1), chosen)


def stacked(made: PrefixKV) -> np.ndarray:
    """Keys and values as one array (B, 2, L, inner)."""
    return np.stack([torch.cat(parts, dim=1).numpy() for parts in made], axis=1)


def by_loops(p: Projection, experts: Tensor, weights: Tensor) -> np.ndarray:
    """Keys and values (B, 2, L, inner): mix, normalise, project; a number at a time where it matters."""
    E, W, b = experts.double().numpy(), p.weight.double().detach().numpy(), p.bias.double().detach().numpy()
    out = np.zeros((len(weights), 2, E.shape[1], len(W) // 2))
    for i, r in enumerate(weights.double().numpy()):
        for l in range(E.shape[1]):  # noqa: E741
            token = sum(r[k] * E[k, l] for k in range(len(r)))
            if p.norm is not None:
                centred = token - token.mean()
                token = centred / np.sqrt((centred**2).mean() + p.norm.eps)
                token = token * p.norm.weight.double().detach().numpy() + p.norm.bias.double().detach().numpy()
            out[i, :, l] = (W @ token + b).reshape(2, -1)
    return out


@pytest.mark.parametrize(
    ("form", "norm", "top_k"),
    [
        *(("table", False, k) for k in (0, 1, 2)),
        *((form, True, k) for form in ("gram", "mixed") for k in (0, 1, 2)),
        ("table", True, 1),
    ],
)
def test_every_form_is_exact(form: str, norm: bool, top_k: int) -> None:
    K, L, D, inner = 7, 3, 10, 8
    p, E = projection(D, inner, norm=norm), random(K, L, D, seed=5) * 3 + 1  # a mean, so that centring matters
    mixed = mixture(torch.softmax(random(4, K, seed=6), dim=-1), top_k)
    folded = FoldedExperts(p, E, form)
    expected = by_loops(p, E, mixed.weights)
    np.testing.assert_allclose(stacked(folded(mixed)), expected, rtol=0, atol=1e-12 * np.abs(expected).max())
    np.testing.assert_allclose(p(AppendedExperts(E)(mixed)).detach().numpy(), expected, rtol=0, atol=1e-12 * 50)
    other = copy.deepcopy(folded)
    other.table *= 1.0001
    assert np.abs(stacked(other(mixed)) - expected).max() > 1e-6


@pytest.mark.parametrize("form", ["gram", "mixed"])
def test_experts_that_cancel_leave_the_offset_and_no_nan(form: str) -> None:
    """The variance of such a mixture is 0, and may round to below that."""
    p = projection(10, 8, norm=True, dtype=torch.float32)
    one = random(1, 2, 10, seed=7, dtype=torch.float32) * 100
    folded = FoldedExperts(p, torch.cat([one, -one, one]), form)
    found = stacked(folded(mixture(torch.tensor([[0.3, 0.5, 0.2]]), 0)))
    scale = float(p(one).detach().abs().max())
    assert np.abs(found - folded.offset.numpy()).max() < 1e-3 * scale


def test_float32_tables_are_the_rounded_float64_ones() -> None:
    """Not what float32 makes of them, which is further off."""
    p, E = projection(64, 64, norm=True, dtype=torch.float32), random(3, 2, 64, dtype=torch.float32)
    wide = Projection(copy.deepcopy(p.norm).double(), p.weight.double(), p.bias.double(), p.product)
    with torch.no_grad():
        assert torch.equal(constants(p, E), wide(E.double()).float())
        assert not torch.equal(p(E), wide(E.double()).float())


@pytest.mark.parametrize(
    ("experts", "top_k", "form"),
    [(4, 0, "gram"), (16, 0, "gram"), (256, 0, "append"), (16, 1, "table"), (256, 1, "table"), (256, 2, "mixed")],
)
def test_the_cheapest_form_of_a_vit_b(experts: int, top_k: int, form: str) -> None:
    """As measured: at K = 256 mixing first beats the Gram matrix, at K = 16 the other way round."""
    size = LayerSize(experts=experts, top_k=top_k, **VIT_B)
    assert choose("auto", size) == form
    assert costs(size)[form].total == min(cost.total for cost in costs(size).values())


def test_costs_by_hand() -> None:
    size = LayerSize(experts=16, top_k=0, **VIT_B)
    assert costs(size) == {
        "append": Cost(16 * 6 * 768 + 6 * 768 * 2304, 4 * 16 * 6 * 768),
        "gram": Cost(16 * 6 * 1536 + 6 * 256, 4 * (16 * 6 * 1536 + 6 * 256)),
        "mixed": Cost(16 * 6 * 1536 + 16 * 6 * 768 + 6 * 768, 4 * 16 * 6 * 3 * 768),
    }
    one = LayerSize(experts=16, top_k=1, **VIT_B)
    assert costs(one)["table"] == Cost(0, 4 * 6 * 1536)


@pytest.mark.parametrize(
    ("norm", "top_k", "forms"),
    [
        ("layer", 0, {"tables": "append", "gram": "gram", "mixed": "mixed", "none": "append"}),
        ("layer", 1, {"tables": "table", "gram": "table", "mixed": "table", "none": "append"}),
        ("none", 0, {"tables": "table", "gram": "table", "mixed": "table", "none": "append"}),
        ("other", 0, {"auto": "append", "tables": "append", "gram": "append", "mixed": "append"}),
        ("other", 1, {"auto": "table", "tables": "table"}),
    ],
)
def test_what_can_be_asked_for(norm: str, top_k: int, forms: dict[str, str]) -> None:
    size = LayerSize(experts=16, top_k=top_k, **VIT_B | {"norm": norm})
    assert {fold: choose(fold, size) for fold in forms} == forms


def test_an_unknown_way_to_fold_is_refused() -> None:
    with pytest.raises(UsageError, match=r"there is no --fold 'gramm'; expected one of: auto, .* did you mean gram\?"):
        Options(fold="gramm")
    for fold in FOLDS:
        assert Options(fold=fold).fold == fold


def graph_of(model: MoPE, file: Path, **options: Any) -> onnx.ModelProto:
    save(trace(to_static(model, **options), exporter_config(model)), file)
    return onnx.load(file)


def stored(proto: onnx.ModelProto, prefix: str = "") -> int:
    return sum(numpy_helper.to_array(t).nbytes for t in proto.graph.initializer if t.name.startswith(prefix))


def test_no_weight_is_stored_twice(tmp_path: Path) -> None:
    """An encoder as wide as ViT-B and BERT-base: the file is the bare pair's and the tables', within 2 %."""
    vit = vit_folder(
        tmp_path / "vit", img_size=32, patch_size=16, embed_dim=768, num_heads=12, mlp_ratio=4, depth=1, qkv_bias=True
    )
    bert = bert_folder(
        tmp_path / "bert", hidden_size=768, num_attention_heads=12, intermediate_size=3072, num_hidden_layers=1
    )
    model = tiny_model(vit, bert, prompt_length=6, experts=16, prompts=4)
    proto = graph_of(model, tmp_path / "model.onnx")
    encoders = (model.main.encoder, model.complementary["text"].backbone.encoder)
    bare = sum(tensor.nbytes for encoder in encoders for tensor in encoder.parameters())
    tables = stored(proto, "layers.") + stored(proto, "mappers.") + stored(proto, "complementary.text.prompts.")
    assert stored(proto, "layers.0.dynamic.") >= 16 * 6 * 1536 * 4
    assert not [t.name for t in proto.graph.initializer if "experts" in t.name or t.name.endswith("tokens")]
    size = (tmp_path / "model.onnx").stat().st_size
    assert size <= 1.02 * (bare + tables)
    assert size >= 0.98 * (bare + tables)  # and nothing is missing: the comparison is with what is there
    # In parts, neither file holds what the other one does.
    probes = [{name: t.numpy() for name, t in tiny_inputs(b, 5 + b, size=(32, 32)).items()} for b in (1, 2)]
    cut = split(tmp_path / "model.onnx", tmp_path / "split", part_inputs(model), probes)
    pieces = [path.stat().st_size for path in (cut.main[0], *cut.part_files)]
    assert sum(pieces) <= 1.01 * size
    assert pieces[1] >= 0.98 * sum(t.nbytes for t in encoders[1].parameters())


def test_fewer_operations_than_in_token_form(tmp_path: Path) -> None:
    """Multiplications of all linear layers, on one sample."""
    vit, bert = vit_folder(tmp_path / "vit"), bert_folder(tmp_path / "bert")
    model = tiny_model(vit, bert)
    rows: dict[str, int] = {}
    inputs = tiny_inputs(1, 7)
    for fold in ("token", "none", "tables", "gram"):
        static, count = to_static(model, fold=fold), [0]

        def add(module: Any, args: Any, out: Any, count: list[int] = count) -> None:
            count[0] += args[0].numel() * module.out_features

        for module in static.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(add)
        with torch.no_grad():
            static(inputs)
        rows[fold] = count[0]
    assert rows["token"] > rows["none"] > rows["tables"] > rows["gram"]
