"""``optimum-cli export mope RUN BUNDLE``: mope-export as a command of optimum's own command line.

optimum runs every module it finds in the namespace ``optimum.commands.register``. This file is installed there; none
of the folders above it may have an ``__init__.py``. It loads at every start of ``optimum-cli``, so it imports nothing
heavy.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class MoPEExportCommand(BaseOptimumCLICommand):
    """Hands its arguments to ``mope-export``."""

    COMMAND = CommandInfo(name="mope", help="Export a MoPE model to a bundle, verified against PyTorch.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the arguments: those of ``mope-export``, with the target as a positional one, as optimum has it."""
        parser.add_argument("run", metavar="RUN", help="run folder, checkpoint folder or hub id")
        parser.add_argument("bundle", metavar="BUNDLE", help="folder to make")
        parser.add_argument("--data", help="JSONL of real samples for the comparison; default: the run's test split")
        parser.add_argument("--opset", help="version of the ONNX operators, 17 to 20")
        parser.add_argument("--samples", help="how many real samples to compare on")
        parser.add_argument("--name", help="what the bundle calls itself; default: the run's name")
        parser.add_argument("--fuse", action="store_true", help="also write a variant fused for ONNX Runtime")
        parser.add_argument("--split", action="store_true", help="each complementary encoder in a file of its own")
        parser.add_argument("--no-routing", action="store_true", help="no output of the experts' weights")
        parser.add_argument("--overwrite", action="store_true", help="replace the bundle that is there")

    def run(self) -> None:
        """Export, and leave with ``mope-export``'s exit code."""
        from export.cli import main

        arguments = [self.args.run, "--out", self.args.bundle]
        for option in ("data", "opset", "samples", "name"):
            value = getattr(self.args, option)
            arguments += [] if value is None else [f"--{option}", value]
        for flag in ("fuse", "split", "no_routing", "overwrite"):
            arguments += [f"--{flag.replace('_', '-')}"] if getattr(self.args, flag) else []
        # A run folder called check is a folder here, never the command of that name.
        sys.exit(main(["./check" if arguments[0] == "check" else arguments[0], *arguments[1:]]))


REGISTER_COMMANDS = [(MoPEExportCommand, ExportCommand)]
