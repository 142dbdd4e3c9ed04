"""The command line that makes the embedded encoders anew."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

import mope_deploy
from mope_deploy.console import out, run_app
from mope_deploy.errors import UsageError
from mope_deploy.extras import require

__all__ = ["BATCH", "main"]

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
    _check(scenes=scenes, threads=threads, seed=seed)
    module = require("train.embedded.pretrain.vit", extra="train", purpose="pretraining an encoder")
    _run(
        lambda to: module.pretrain_vit(to, scenes=scenes, batch=BATCH, seed=seed),
        folder or _EMBEDDED / "digits-ve-vit",
        threads,
    )


@app.command()
def bert(
    folder: _Out = None,
    sentences: Annotated[int, typer.Option(help="Sentences to train on.")] = 200_000,
    threads: _Threads = 0,
    seed: _Seed = 0,
) -> None:
    """The text encoder: about 3 minutes on two cores."""
    _check(sentences=sentences, threads=threads, seed=seed)
    module = require("train.embedded.pretrain.bert", extra="train", purpose="pretraining an encoder")
    _run(
        lambda to: module.pretrain_bert(to, sentences=sentences, batch=BATCH, seed=seed),
        folder or _EMBEDDED / "digits-ve-bert",
        threads,
    )


def _check(*, threads: int, seed: int, **amount: int) -> None:
    """All that can be wrong is said before any work."""
    for name, count in amount.items():
        if count < BATCH:
            raise UsageError(f"--{name} is too small", received=count, expected=f"at least one batch of {BATCH}")
    for name, value in (("threads", threads), ("seed", seed)):
        if value < 0:
            raise UsageError(f"--{name} is negative", received=value, expected="0 or more")


def _run(pretrain: Callable[[Path], Any], folder: Path, threads: int) -> None:
    torch = require("torch", extra="train", purpose="pretraining an encoder")
    if threads:
        torch.set_num_threads(threads)
    began = time.monotonic()
    accuracy = asdict(pretrain(folder))
    figures = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in accuracy.items())
    out.print(f"{folder}: written after {time.monotonic() - began:.0f} s; read linearly: {figures}", markup=False)


def main() -> int:
    return run_app(app)
