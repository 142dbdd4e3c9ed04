"""Routing embeddings, noise, dense and top-k routing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mope_deploy.model.router import routing_embeddings, straight_through_top_k
from tests.tiny import tiny_inputs, tiny_model


@pytest.mark.parametrize(("K", "d"), [(1, 10), (4, 10), (10, 10)])
def test_few_embeddings_are_orthonormal(K: int, d: int) -> None:
    U = routing_embeddings(experts=K, width=d, seed=0, layer=0).double()
    torch.testing.assert_close(U @ U.T, torch.eye(K, dtype=torch.float64), atol=1e-7, rtol=0)


@pytest.mark.parametrize(("K", "d"), [(11, 10), (16, 10), (64, 3)])
def test_many_embeddings_are_unit_norm_frames(K: int, d: int) -> None:
    U = routing_embeddings(experts=K, width=d, seed=0, layer=0).double()
    torch.testing.assert_close(U.norm(dim=1), torch.ones(K, dtype=torch.float64), atol=1e-7, rtol=0)
    assert torch.linalg.matrix_rank(U) == d
    assert (U @ U.T - torch.eye(K)).abs().max() < 1 - 1e-6, "two experts would always be chosen together"


def test_embeddings_are_the_same_on_every_machine() -> None:
    """Values computed once and written down: the checkpoint relies on them for ever."""
    U = routing_embeddings(experts=3, width=4, seed=7, layer=2)
    expected = [
        ["-0x1.4ed58e0000000p-1", "-0x1.200e680000000p-1", "0x1.bd7fe40000000p-5", "0x1.0172260000000p-1"],
        ["-0x1.1313120000000p-1", "-0x1.8c63b80000000p-4", "-0x1.4dfc120000000p-2", "-0x1.8b24220000000p-1"],
        ["0x1.13fa880000000p-3", "0x1.6b72ae0000000p-6", "-0x1.e30a220000000p-1", "0x1.355ece0000000p-2"],
    ]
    assert [[value.hex() for value in row] for row in U.tolist()] == expected
    assert not torch.equal(U, routing_embeddings(experts=3, width=4, seed=7, layer=1))
    assert not torch.equal(U, routing_embeddings(experts=3, width=4, seed=8, layer=2))


@pytest.mark.parametrize("k", [1, 2, 5])
def test_top_k_keeps_the_largest_and_renormalises(k: int) -> None:
    soft = torch.softmax(torch.randn(64, 5, generator=torch.Generator().manual_seed(0)), dim=-1)
    weights = straight_through_top_k(soft, k)
    for row, kept in zip(weights, soft, strict=True):
        order = sorted(range(5), key=lambda index: -float(kept[index]))
        total = sum(float(kept[index]) for index in order[:k])
        for place, index in enumerate(order):
            assert float(row[index]) == pytest.approx(float(kept[index]) / total if place < k else 0.0, abs=1e-6)
    assert int((weights > 0).sum()) == 64 * k


def test_top_1_passes_the_gradient_of_the_soft_scores() -> None:
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    value = torch.randn(4, generator=torch.Generator().manual_seed(1))
    (straight_through_top_k(torch.softmax(logits, -1), 1) @ value).sum().backward()
    hard_path, logits.grad = logits.grad, None
    (torch.softmax(logits, -1) @ value).sum().backward()
    torch.testing.assert_close(hard_path, logits.grad)
    assert hard_path.abs().sum() > 0


def test_noise_has_the_configured_spread(vit: Path, bert: Path) -> None:
    model = tiny_model(vit, bert, experts=4, d_x=0)
    assert model.config.sigma == 0.25
    router = model.layers[0].router.train()
    y = torch.zeros(20_000, 16)
    with torch.no_grad():
        soft = router(torch.zeros(20_000, 32), {"text": y}).soft  # all scores 0: only noise is left
    spread = (soft.log() - soft.log().mean(dim=-1, keepdim=True)).std()
    assert float(spread) == pytest.approx(0.25 * (3 / 4) ** 0.5, rel=0.02)  # the mean over 4 is taken out


def test_top_k_of_all_experts_is_dense_routing(vit: Path, bert: Path) -> None:
    inputs = tiny_inputs()
    with torch.no_grad():
        dense = tiny_model(vit, bert)(inputs)
        everything = tiny_model(vit, bert, top_k=5)(inputs)
    torch.testing.assert_close(everything.logits, dense.logits)


def test_routing_depends_on_x_and_on_y(vit: Path, bert: Path) -> None:
    model = tiny_model(vit, bert)
    inputs = tiny_inputs(batch=2, text_length=5)
    with torch.no_grad():
        routing = model(inputs).routing
        other_text = model({**inputs, "input_ids": inputs["input_ids"].flip(0)}).routing
        other_image = model({**inputs, "pixel_values": inputs["pixel_values"].flip(0)}).routing
    assert not torch.equal(routing[:, 0], other_text[:, 0])
    assert not torch.equal(routing[:, 1], other_image[:, 1])


def test_a_stand_in_does_not_drown_the_first_step(vit: Path, bert: Path) -> None:
    """Of a zero y the cosine has a gradient of 1e10; clipped to a norm, nothing else would train."""
    model = tiny_model(vit, bert, missing=("text",), similarity="cosine", d_x=0).train()
    inputs = tiny_inputs(batch=4) | {"text_present": torch.tensor([1, 0, 1, 0])}
    model(inputs).logits.square().sum().backward()
    norms = {name: value.grad.norm().item() for name, value in model.trained_parameters().items()}
    stand_in = norms.pop("stand_ins.text")
    assert 0 < stand_in < max(norms.values())
    others = tiny_model(vit, bert, similarity="cosine", d_x=0).trained_parameters()
    assert all(torch.equal(value, model.trained_parameters()[name]) for name, value in others.items())
