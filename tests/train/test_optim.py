"""Parameter groups and learning rates, against PyTorch's own schedulers and closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from tests.tiny import tiny_model
from train.config import OptimSection
from train.optim import learning_rate_factor, optimiser, parameter_groups


@pytest.fixture(scope="module")
def parameters(tiny):  # type: ignore[no-untyped-def]
    model = tiny_model(tiny / "vit", tiny / "bert", train_embeddings=True)
    return model.trained_parameters()


def test_every_trained_tensor_is_in_exactly_one_group_with_its_sides_rate(parameters) -> None:  # type: ignore[no-untyped-def]
    section = OptimSection(lr_main=0.1, lr_complementary=0.2, weight_decay=0.3)
    groups = parameter_groups(parameters, section)
    name_of = {id(parameter): name for name, parameter in parameters.items()}
    rate, decay = {}, {}
    for group in groups:
        for parameter in group["params"]:
            assert name_of[id(parameter)] not in rate
            rate[name_of[id(parameter)]] = group["lr"]
            decay[name_of[id(parameter)]] = group["weight_decay"]
    assert rate.keys() == parameters.keys()
    assert {name for name in rate if rate[name] == 0.2} == {
        name for name in parameters if name.startswith("complementary.")
    }
    assert len({name for name in rate if rate[name] == 0.2}) == 2
    undecayed = {name for name in decay if decay[name] == 0.0}
    assert undecayed == {name for name in parameters if name.endswith((".bias", ".embeddings"))}
    assert any(name.endswith(".embeddings") for name in undecayed)


def test_groups_without_parameters_are_left_out(tiny) -> None:  # type: ignore[no-untyped-def]
    model = tiny_model(tiny / "vit", tiny / "bert", prompts=0)
    groups = parameter_groups(model.trained_parameters(), OptimSection())
    assert [group["name"] for group in groups] == ["main", "main, no decay"]


def rates(section: OptimSection, *, steps: int, steps_per_epoch: int) -> list[float]:
    factor = learning_rate_factor(section, steps=steps, steps_per_epoch=steps_per_epoch)
    return [factor(step) for step in range(steps)]


def test_multistep_is_pytorchs_stepped_once_an_epoch() -> None:
    found = rates(OptimSection(schedule="multistep"), steps=50, steps_per_epoch=5)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[3, 6], gamma=0.4)
    expected = []
    for _ in range(10):
        expected += [scheduler.get_last_lr()[0]] * 5
        optimizer.step()
        scheduler.step()
    assert found == pytest.approx(expected)
    assert sorted(set(found)) == pytest.approx([0.16, 0.4, 1.0])


def test_cosine_warms_up_linearly_and_ends_at_zero() -> None:
    found = rates(OptimSection(schedule="cosine", warmup_steps=4), steps=24, steps_per_epoch=6)
    assert found[:4] == [0.25, 0.5, 0.75, 1.0]
    assert found[4:] == pytest.approx([0.5 * (1 + math.cos(math.pi * i / 20)) for i in range(20)])
    factor = learning_rate_factor(OptimSection(schedule="cosine", warmup_steps=4), steps=24, steps_per_epoch=6)
    assert factor(24) == pytest.approx(0.0)


def test_constant_and_a_warm_up_longer_than_training() -> None:
    assert rates(OptimSection(schedule="constant"), steps=3, steps_per_epoch=3) == [1.0] * 3
    assert rates(OptimSection(schedule="cosine", warmup_steps=9), steps=3, steps_per_epoch=3) == [1 / 9, 2 / 9, 3 / 9]


def test_one_step_is_adamws_own(parameters) -> None:  # type: ignore[no-untyped-def]
    """The fused, grouped optimiser against a plain AdamW on copies."""
    section = OptimSection(lr_main=0.01, lr_complementary=0.02, weight_decay=0.5)
    copies = {name: parameter.detach().clone().requires_grad_() for name, parameter in parameters.items()}
    generator = torch.Generator().manual_seed(0)
    for name, parameter in parameters.items():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
        copies[name].grad = parameter.grad.clone()
    optimiser(parameters, section).step()
    for name, copy in copies.items():
        decays = copy.ndim > 1 and not name.endswith("embeddings")
        rate = 0.02 if name.startswith("complementary") else 0.01
        torch.optim.AdamW([copy], lr=rate, weight_decay=0.5 if decays else 0.0, foreach=False, fused=False).step()
        torch.testing.assert_close(parameters[name].detach(), copy.detach(), rtol=1e-5, atol=1e-6)
