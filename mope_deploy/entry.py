"""Where the installed commands begin: what stands in the way of importing them is one line, not a traceback.

A base dependency may be missing on a device, and ``train`` and ``export`` are names that a user's own file may have.
Nothing but the standard library is imported here before the command itself.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path

__all__ = ["mope", "mope_export", "mope_train"]

_HERE = Path(__file__).resolve().parent.parent


def mope() -> int:
    """``mope``. Returns its exit code."""
    return _start("mope_deploy.cli")


def mope_export() -> int:
    """``mope-export``. Returns its exit code."""
    return _start("export.cli", least=(3, 11))


def mope_train() -> int:
    """``mope-train``. Returns its exit code."""
    return _start("train.cli", least=(3, 11))


def _start(module: str, *, least: tuple[int, int] = (3, 10)) -> int:
    """Import a command and run it.

    Args:
        module: that has its ``main``.
        least: the oldest Python that it runs on.
    """
    if sys.version_info < least:
        received, expected = (".".join(map(str, version[:2])) for version in (sys.version_info, least))
        return _refuse(
            f"{module.split('.')[0]} needs a newer Python; received {received}; expected {expected} or newer"
        )
    if shadowed := _shadowed(module.split(".")[0]):
        return _refuse(shadowed)
    try:
        main = importlib.import_module(module).main
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ImportError, AttributeError) as error:
        if os.environ.get("MOPE_DEBUG"):
            raise
        return _refuse(_missing(error))
    code: int = main()
    return code


def _shadowed(package: str) -> str | None:
    """Whether a file of the user's has the name of a package of ours, and comes first on the path; it is not run."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None or Path(found.origin).resolve().is_relative_to(_HERE / package):
        return None
    what = f"{found.origin} has the name of mope-deploy's own package {package}"
    return f"{what}; rename it, or take its folder off PYTHONPATH"


def _missing(error: Exception) -> str:
    name = getattr(error, "name", None)
    if isinstance(error, ModuleNotFoundError) and name:
        installed = f"the package {name!r} is not installed for {sys.executable}"
        return f"{installed}; activate the environment that has it (. .venv/bin/activate), or install mope-deploy again"
    return f"mope-deploy cannot be imported: {' '.join(str(error).split())}; set MOPE_DEBUG=1 to see where"


def _refuse(what: str) -> int:
    print(f"error: {what}", file=sys.stderr)
    return 2
