"""Run under torchrun by test_distributed.py: a run that only its second process is told to stop, then the rest."""

from __future__ import annotations

import os
import signal
import sys

import pytest
import torch.distributed as dist
from accelerate.state import AcceleratorState

from tests.train.tools import signal_at
from train.recipe import load_recipe
from train.run import fit
from train.run_folder import open_run


def main(recipe: str, meeting_point: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        if os.environ["RANK"] == "1":
            signal_at(patch, 9, signal.SIGTERM)
        first = fit(load_recipe(recipe), command="first")
    assert first.status == "interrupted", first.status
    # As processes that start anew: no state of accelerate's, and a meeting point of their own, which is no port.
    AcceleratorState._reset_state(reset_partial_state=True)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=size)
    run, again = open_run(first.run.folder, recipe=None, overrides=())
    second = fit(again, command="second", resume=run)
    assert second.status == "finished", second.status
    # Only the process that writes evaluates.
    assert bool(second.evaluation) == (rank == 0)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
