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
app.command("run")(run)
app.command("eval")(evaluate)
for command in (verify, build, info, bench):
    app.command()(command)


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
