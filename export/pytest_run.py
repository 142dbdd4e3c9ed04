"""``pytest -m parity --run RUN``: the option ``--run``, for checkouts of this repository only.

It cannot live in a conftest.py: until pytest knows the option it takes RUN for a place to collect tests from, reads its
settings from there and never sees ours. Installed as a pytest plugin it is known from the start; outside a checkout it
adds nothing.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

__all__ = ["pytest_addoption", "pytest_configure", "pytest_unconfigure"]

_CACHE = ".pytest_cache"


def _checkout() -> Path | None:
    here = Path.cwd()
    return here if (here / "tests" / "export" / "test_run_of_your_own.py").is_file() else None


def pytest_addoption(parser: Any) -> None:
    """Declare ``--run``."""
    if _checkout() is not None:
        parser.addoption(
            "--run",
            type=Path,
            metavar="RUN",
            help="repeat the export gate on this run (pytest -m parity --run RUN); without it, on a tiny random model",
        )


def pytest_configure(config: Any) -> None:
    """Bring our markers where pytest took RUN for the root of the tests."""
    checkout = _checkout()
    if checkout is None or config.inipath is not None:
        return
    import tomllib  # Python 3.11; this module is imported by pytest on a device's 3.10 as well

    settings = tomllib.loads((checkout / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"]
    for name in ("markers", "filterwarnings"):
        for line in settings.get(name, []):
            config.addinivalue_line(name, line)


def pytest_unconfigure(config: Any) -> None:
    """Leave nothing of pytest's own in the run."""
    run = config.getoption("--run", default=None)
    if run is not None and config.rootpath == run.resolve():
        shutil.rmtree(run / _CACHE, ignore_errors=True)
