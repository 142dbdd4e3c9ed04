"""Run under torchrun by test_distributed.py: a run that only its second process is told to stop, then the rest."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from accelerate.state import AcceleratorState

import train.run
from train.callbacks import ProgressLines
from train.recipe import load_recipe
from train.run_folder import open_run


class StopTheSecond(ProgressLines):
    """Sends SIGTERM to process 1 during step 10."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 9 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)


def main(recipe: str, port: str) -> int:
    train.run.ProgressLines = StopTheSecond  # type: ignore[misc]
    first = train.run.fit(load_recipe(recipe), command="first")
    assert first.status == "interrupted", first.status
    # A process that starts anew: no state of accelerate's, and a meeting point of its own.
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ |= {"MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "False"}
    train.run.ProgressLines = ProgressLines  # type: ignore[misc]
    run, again = open_run(first.run.folder, recipe=None, overrides=())
    second = train.run.fit(again, command="second", resume=run)
    assert second.status == "finished", second.status
    # Only the process that writes evaluates.
    assert bool(second.evaluation) == (os.environ["RANK"] == "0")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
