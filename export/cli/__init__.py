"""``mope-export``: one file a command."""

from export.cli.main import main

__all__ = ["main"]
