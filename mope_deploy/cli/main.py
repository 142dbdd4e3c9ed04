"""``mope``: run, evaluate, verify, build, measure and describe a bundle. No torch.

Results go to standard output, everything else to standard error, so that output can be piped. Exit codes: 0 success,
1 failure, 2 misuse. Commands import what they need when they run: ``mope --help`` answers at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from mope_deploy import __version__, console
from mope_deploy.cli.bench import bench
from mope_deploy.cli.build import build
from mope_deploy.cli.evaluate import evaluate
from mope_deploy.cli.info import info
from mope_deploy.cli.run import run
from mope_deploy.cli.verify import verify

__all__ = ["app", "main"]

app = typer.Typer(
    name="mope",
    help="Run a bundle: a multimodal model exported by mope-export. Needs no PyTorch.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for name, command, short in (  # what a docstring's first sentence says, short enough to stand in a list uncut
    ("run", run, "Predict one sample, or every row of a file."),
    ("eval", evaluate, "Compare predictions with the labels of a file."),
    ("verify", verify, "Check every file, repeat the golden samples."),
    ("build", build, "Build the TensorRT engine for this device."),
    ("info", info, "Say what a bundle is, and what could run it."),
    ("bench", bench, "Measure latency, memory and energy here."),
):
    app.command(name, short_help=short)(command)


def _version(asked: bool) -> None:
    if asked:
        console.out.print(f"mope {__version__}", markup=False)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Options of ``mope`` itself."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 success, 1 failure, 2 misuse."""
    return console.run_app(app, argv)
