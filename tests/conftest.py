"""Options of the whole suite."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--run",
        type=Path,
        metavar="RUN",
        help="repeat the export gate on this run (pytest -m parity --run RUN); without it, on a tiny random model",
    )
