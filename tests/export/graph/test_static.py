"""The rewrite computes what the trained model computes and leaves it alone, however prompts enter its layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from export.graph.static import to_static
from export.limits import FOLDS
from tests.export.conftest import KINDS, make_model
from tests.tiny import tiny_inputs, tiny_model


@pytest.mark.parametrize("fold", FOLDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("batch", "length"), [(1, 3), (5, 7), (3, 40)])
def test_computes_what_the_model_computes(kind: str, fold: str, vit: Path, bert: Path, batch: int, length: int) -> None:
    model = make_model(kind, vit, bert)
    static = to_static(model, fold=fold)
    inputs = tiny_inputs(batch, length, seed=batch)
    with torch.no_grad():
        expected, found = model(inputs, form="token"), static(inputs)
    assert static.output_names == (("logits",) if kind == "unrouted" else ("logits", "routing"))
    for name, tensor in zip(static.output_names, found, strict=True):
        wanted = getattr(expected, name)
        assert tensor.shape == wanted.shape
        # In token form the dense row is the same arithmetic; all else is summed in another order.
        exact = fold == "token" and kind in ("dense", "unrouted")
        assert (tensor - wanted).abs().max() <= (0.0 if exact else 1e-5) * wanted.abs().max(), name


@pytest.mark.parametrize("kind", KINDS)
def test_leaves_the_trained_model_as_it_is(kind: str, vit: Path, bert: Path) -> None:
    model = make_model(kind, vit, bert).train()
    modes = {name: module.training for name, module in model.named_modules()}
    before = {name: tensor.clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    names, trainable = list(model.state_dict()), set(model.trained_parameters())

    static = to_static(model)
    with torch.no_grad():
        static(tiny_inputs())

    assert {name: module.training for name, module in model.named_modules()} == modes
    assert list(model.state_dict()) == names
    assert set(model.trained_parameters()) == trainable
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert torch.equal(tensor, before[name]), name
    assert not any(module.training for module in static.modules())


@pytest.mark.parametrize("fold", FOLDS)
def test_shares_the_weights_and_copies_none_of_the_encoders(fold: str, vit: Path, bert: Path) -> None:
    model = make_model("dense", vit, bert)
    places = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    static = to_static(model, fold=fold)
    own = {
        name.rpartition(".")[2]
        for name, tensor in (*static.named_parameters(), *static.named_buffers())
        if tensor.untyped_storage().data_ptr() not in places
    }
    folded = {
        "tables": {"keys", "values"},
        "gram": {"keys", "values", "table", "offset", "gram"},
        "mixed": {"keys", "values", "table", "offset", "centred"},
    }
    assert own - {"numbers"} == folded.get(fold, {"keys", "values"} if fold == "auto" else set())


def test_has_neither_noise_nor_dropout_however_the_model_is_left(vit: Path, bert: Path) -> None:
    model = tiny_model(vit, bert, noise=1.0, prompt_dropout=0.5).train()
    static, inputs = to_static(model), tiny_inputs()
    with torch.no_grad():
        first, second = static(inputs)[0], static(inputs)[0]
        trained = model(inputs).logits
    assert torch.equal(first, second)
    assert not torch.equal(first, trained)  # the model itself is in training mode, where both act


@pytest.mark.parametrize("kind", ["dense", "top2", "top1"])
def test_every_expert_is_in_it_whichever_the_examples_choose(kind: str, vit: Path, bert: Path) -> None:
    model = make_model(kind, vit, bert)
    static = to_static(model, fold="none")
    for i, layer in enumerate(model.layers):
        table = static.get_buffer(f"layers.{i}.dynamic.table")
        assert torch.equal(table, layer.experts.prompts.flatten(1))


def test_swapped_experts_would_be_seen(vit: Path, bert: Path) -> None:
    model = make_model("top1", vit, bert)
    static, inputs = to_static(model, fold="none"), tiny_inputs(20, 9)
    used = model(inputs).routing[:, 0].argmax(-1).bincount(minlength=5).argsort(descending=True)[:2]
    with torch.no_grad():
        table = static.layers[0].dynamic.table.clone()
        static.layers[0].dynamic.table = table[torch.arange(5).scatter(0, used, used.flip(0))]
        assert (static(inputs)[0] - model(inputs).logits).abs().max() > 1e-3


def test_one_expert_and_all_experts_are_cases_like_any_other(vit: Path, bert: Path) -> None:
    for options in ({"experts": 1}, {"experts": 1, "top_k": 1}, {"experts": 3, "top_k": 3}):
        model = tiny_model(vit, bert, **options)
        with torch.no_grad():
            found, expected = to_static(model)(tiny_inputs()), model(tiny_inputs())
        torch.testing.assert_close(found[0], expected.logits, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[1], expected.routing, rtol=1e-5, atol=1e-6)


def test_routing_can_be_left_out(vit: Path, bert: Path) -> None:
    static = to_static(make_model("dense", vit, bert), routing_output=False)
    assert static.output_names == ("logits",)
    assert len(static(tiny_inputs())) == 1
