"""Building models leaves the process as it was, in threads too."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from time import sleep

import pytest
import torch

from mope_deploy.model import MoPE, build_model
from mope_deploy.model.backbones import FrozenEncoder
from mope_deploy.model.backbones.sources import quiet_transformers
from mope_deploy.model.backbones.vit import ViTEncoder
from tests.tiny import bert_folder, tiny_config, tiny_model, vit_folder

WORKERS = 2


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(WORKERS) as made:
        yield made


def test_random_states_stay(tmp_path: Path, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of GPUs, which ``torch.manual_seed`` sets and ``fork_rng`` of no device does not put back."""
    config = tiny_config(vit_folder(tmp_path / "vit"), bert_folder(tmp_path / "bert"))
    alone = build_model(config, seed=3).trained_parameters()
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("every GPU was seeded"))
    before, threads, together = torch.get_rng_state(), torch.get_num_threads(), Barrier(WORKERS)

    def build(_: int) -> dict[str, torch.Tensor]:
        together.wait()
        return build_model(config, seed=3).trained_parameters()

    for found in pool.map(build, range(WORKERS)):
        assert all(torch.equal(found[name], value) for name, value in alone.items())
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads


def test_loading_checkpoints_leaves_the_random_state(
    vit: Path, bert: Path, tmp_path: Path, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What wraps an encoder may draw too; and no thread is in while another is."""
    tiny_model(vit, bert).save_pretrained(tmp_path / "saved")
    wrap, inside, most = ViTEncoder.wrap, [], []

    def drawing(*args: object) -> FrozenEncoder:
        inside.append(1)
        most.append(len(inside))
        torch.rand(1)
        sleep(0.05)
        inside.pop()
        return wrap(*args)

    monkeypatch.setattr(ViTEncoder, "wrap", drawing)
    before = torch.get_rng_state()
    list(pool.map(MoPE.from_pretrained, [tmp_path / "saved"] * WORKERS))
    assert most == [1] * WORKERS
    assert torch.equal(torch.get_rng_state(), before)


def test_logs_and_bars_of_transformers_stay(pool: ThreadPoolExecutor) -> None:
    from transformers.utils import logging

    before, together = (logging.get_verbosity(), logging.is_progress_bar_enabled()), Barrier(WORKERS)

    def quiet(_: int) -> None:
        together.wait()
        for _ in range(200):
            with quiet_transformers():
                pass

    list(pool.map(quiet, range(WORKERS)))
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
