"""On a GPU: the eager model computes what it computes on a CPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mope_deploy.model import MoPE, MoPEOutput
from tests.tiny import tiny_inputs, tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]

ROUTING = ({}, {"top_k": 2, "mapper_per_layer": True}, {"top_k": 1, "similarity": "cosine"}, {"dynamic": False})


@pytest.fixture(autouse=True)
def float32_is_float32() -> Iterator[None]:
    """PyTorch rounds float32 convolutions to TF32 unless it is told not to."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def run(model: MoPE, inputs: dict[str, torch.Tensor]) -> MoPEOutput:
    parameter = next(model.parameters())
    moved = {name: x.to(parameter.device) for name, x in inputs.items()}
    moved = {name: x.to(parameter.dtype) if x.is_floating_point() else x for name, x in moved.items()}
    with torch.inference_mode():
        return model(moved)


@pytest.mark.parametrize("options", ROUTING, ids=str)
def test_computes_what_the_cpu_computes(options: dict[str, object], vit: Path, bert: Path) -> None:
    """A GPU may be as far from float64 as four times what this CPU is, and every choice of experts is the same."""
    model = tiny_model(vit, bert, **options)
    exact, there = copy.deepcopy(model).double(), copy.deepcopy(model).cuda()
    inputs = tiny_inputs(64, 11)
    found, cpu, want = run(there, inputs), run(model, inputs), run(exact, inputs)
    for name in ("logits", "routing"):
        ours, theirs, right = (getattr(out, name) for out in (found, cpu, want))
        if right is None:
            assert ours is None
            continue
        assert right.numel() >= 128
        assert ours.device.type == "cuda"
        # Root mean squares: the largest of few roundings differs by twice from one processor to another.
        allowed = 4 * (theirs.double() - right).norm() + 1e-7 * right.norm()
        assert (ours.cpu().double() - right).norm() <= allowed, name
    assert torch.equal(found.logits.argmax(-1).cpu(), cpu.logits.argmax(-1))
    if found.routing is not None and cpu.routing is not None:
        assert torch.equal(found.routing.argmax(-1).cpu(), cpu.routing.argmax(-1))


def test_the_same_input_gives_the_same_bits(vit: Path, bert: Path) -> None:
    model = tiny_model(vit, bert).cuda()
    inputs = tiny_inputs(9, 7)
    assert torch.equal(run(model, inputs).logits, run(model, inputs).logits)


def test_a_sample_does_not_depend_on_its_batch(vit: Path, bert: Path) -> None:
    model = tiny_model(vit, bert).cuda()
    inputs = tiny_inputs(9, 7)
    together = run(model, inputs).logits
    for i in range(9):
        alone = run(model, {name: x[i : i + 1] for name, x in inputs.items()}).logits
        torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-5)


def test_training_it_moves_what_trains_and_nothing_else(vit: Path, bert: Path) -> None:
    model = tiny_model(vit, bert).cuda().train()
    frozen = {name: x.clone() for name, x in model.named_parameters() if not x.requires_grad}
    inputs = {name: x.cuda() for name, x in tiny_inputs(12, 7).items()}
    model(inputs).logits.square().mean().backward()
    for name, parameter in model.trained_parameters().items():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name
    assert all(x.grad is None for x in model.parameters() if not x.requires_grad)
    assert all(torch.equal(x, frozen[name]) for name, x in model.named_parameters() if name in frozen)
