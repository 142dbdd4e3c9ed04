"""``mope``, the device's command line: one file a command."""

from mope_deploy.cli.main import app, main

__all__ = ["app", "main"]
