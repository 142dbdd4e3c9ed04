"""The command line that makes the embedded encoders anew."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

import mope_deploy
from mope_deploy.console import out
from mope_deploy.errors import UsageError
from mope_deploy.extras import require

__all__ = ["BATCH", "app"]

BATCH = 128  # scenes or sentences a step

app = typer.Typer(add_completion=False, rich_markup_mode=None, no_args_is_help=True)

_EMBEDDED = Path(mope_deploy.__file__).parent / "model" / "backbones" / "embedded"

_Out = Annotated[
    Path | None, typer.Option("--out", help="Folder to write; the shipped weights are replaced if not given.")
]
_Threads = Annotated[int, typer.Option(help="Processor threads; 0 leaves the choice to torch.")]
_Seed = Annotated[int, typer.Option(help="Of weights and of all that is drawn.")]


@app.callback()
def pretrain() -> None:
    """Pretrain the tiny encoders of digits-ve, each on its own modality alone."""


@app.command()
def vit(
    folder: _Out = None,
    scenes: Annotated[int, typer.Option(help="Scenes to train on.")] = 400_000,
    threads: _Threads = 0,
    seed: _Seed = 0,
) -> None:
    """The image encoder: about 8 minutes on two cores."""
    _run("vit", folder, threads, seed, scenes=scenes)


@app.command()
def bert(
    folder: _Out = None,
    sentences: Annotated[int, typer.Option(help="Sentences to train on.")] = 200_000,
    threads: _Threads = 0,
    seed: _Seed = 0,
) -> None:
    """The text encoder: about 3 minutes on two cores."""
    _run("bert", folder, threads, seed, sentences=sentences)


def _run(encoder: str, folder: Path | None, threads: int, seed: int, **amount: int) -> None:
    """All that can be wrong is said before any work."""
    for name, count in amount.items():
        if count < BATCH:
            raise UsageError(f"--{name} is too small", received=count, expected=f"at least one batch of {BATCH}")
    for name, value in (("threads", threads), ("seed", seed)):
        if value < 0:
            raise UsageError(f"--{name} is negative", received=value, expected="0 or more")
    module = require(f"train.embedded.pretrain.{encoder}", extra="train", purpose="pretraining an encoder")
    if threads:
        require("torch", extra="train", purpose="pretraining an encoder").set_num_threads(threads)
    folder, began = folder or _EMBEDDED / f"digits-ve-{encoder}", time.monotonic()
    accuracy = asdict(getattr(module, f"pretrain_{encoder}")(folder, **amount, batch=BATCH, seed=seed))
    figures = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in accuracy.items())
    out.print(f"{folder}: written after {time.monotonic() - began:.0f} s; read linearly: {figures}", markup=False)
