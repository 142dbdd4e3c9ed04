"""The command line that makes digits-ve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mope_deploy.console import out
from train.embedded.digits_ve.generate import ensure_digits_ve

__all__ = ["app"]

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def digits_ve(
    folder: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder to make; one that holds the same data is kept.")
    ],
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    train_pairs: Annotated[int, typer.Option(help="Picture-sentence pairs to train on.")] = 20_000,
    validation_pairs: Annotated[int, typer.Option(help="Pairs to validate on.")] = 2_000,
    test_pairs: Annotated[int, typer.Option(help="Pairs to test on.")] = 2_000,
) -> None:
    """Make digits-ve: visual entailment over coloured cards with real handwritten digits."""
    ensure_digits_ve(
        folder, seed=seed, train_pairs=train_pairs, validation_pairs=validation_pairs, test_pairs=test_pairs
    )
    pairs = json.loads((folder / "info.json").read_text(encoding="utf-8"))["pairs"]
    out.print(f"{folder}: " + ", ".join(f"{count} {split} pairs" for split, count in pairs.items()), markup=False)
