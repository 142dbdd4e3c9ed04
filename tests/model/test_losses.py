"""The importance loss, against loops, at its edges and across two processes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from mope_deploy.model import importance_loss


def by_loops(r: Tensor, threshold: float) -> float:
    B, layers, K = r.shape
    total = 0.0
    for i in range(layers):
        importance = [sum(float(r[b, i, k]) for b in range(B)) for k in range(K)]
        mean = sum(importance) / K
        cv2 = sum((value - mean) ** 2 for value in importance) / K / mean**2
        total += cv2 if cv2 > threshold else 0.0
    return total / layers


def routing(B: int, layers: int, K: int, sharpness: float) -> Tensor:
    return torch.softmax(sharpness * torch.randn(B, layers, K, generator=torch.Generator().manual_seed(B + K)), -1)


@pytest.mark.parametrize(("B", "layers", "K"), [(1, 1, 1), (7, 3, 4), (2, 2, 16), (33, 5, 3)])
@pytest.mark.parametrize("threshold", [0.0, 0.1])
def test_equals_the_loops(B: int, layers: int, K: int, threshold: float) -> None:
    r = routing(B, layers, K, 3.0)
    assert float(importance_loss(r, threshold)) == pytest.approx(by_loops(r, threshold), rel=1e-5, abs=1e-7)


def test_one_expert_gives_zero_and_no_nan() -> None:
    r = torch.ones(4, 2, 1, requires_grad=True)
    loss = importance_loss(r)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.isfinite(r.grad).all()


def test_balanced_one_hot_routing_of_a_small_batch_costs_k_over_b_minus_1() -> None:
    r = torch.eye(8)[:2].unsqueeze(1)
    assert float(importance_loss(r)) == pytest.approx(8 / 2 - 1)


def test_counts_only_above_the_threshold() -> None:
    r = torch.tensor([[[0.6, 0.4]]])  # CV² = 0.04
    assert float(importance_loss(r, 0.1)) == 0.0
    assert float(importance_loss(r, 0.03)) == pytest.approx(0.04)


def _worker(rank: int, file: str, r: Tensor, results: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    part = r[rank * 3 : rank * 3 + 3].clone().requires_grad_()
    loss = importance_loss(part)
    loss.backward()
    torch.save({"loss": loss.detach(), "grad": part.grad}, f"{results}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_share_one_importance(tmp_path: Path) -> None:
    """Each process sees half the batch; loss and gradients (averaged as data parallelism does) are the whole's."""
    r = routing(6, 2, 4, 3.0)
    mp.spawn(_worker, args=(str(tmp_path / "store"), r, str(tmp_path)), nprocs=2)
    whole = r.clone().requires_grad_()
    loss = importance_loss(whole)
    loss.backward()
    halves = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for half in halves:
        torch.testing.assert_close(half["loss"], loss.detach())
    # Data parallelism divides summed gradients by the number of processes.
    torch.testing.assert_close(torch.cat([half["grad"] for half in halves]) / 2, whole.grad)
    assert whole.grad.abs().sum() > 0
