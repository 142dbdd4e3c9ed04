"""``mope-export RUN --format onnx,trt,triton`` and ``mope-export check RUN BUNDLE``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from export.cli.check import check_app
from export.cli.export import export_app
from mope_deploy.console import err, run_app

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 success, 1 failure, 2 misuse."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] != ["check"]:
        return run_app(export_app, arguments, name="mope-export", last=argv is None)
    named = [argument for argument in arguments[1:] if not argument.startswith("-")]
    if Path("check").is_dir() and len(named) < 2 and "--help" not in arguments:
        err.print("error: check is a command of mope-export; the folder of that name is written ./check", markup=False)
        return 2
    return run_app(check_app, arguments[1:], name="mope-export check", last=argv is None)
