"""Optional packages: imported where they are used, named with their pip command where they are missing."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from types import ModuleType

from mope_deploy.errors import MissingExtraError

__all__ = ["installed_versions", "require"]


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import ``module``, or say which extra brings it.

    Args:
        module: dotted module name, for instance ``"onnxruntime"``.
        extra: the extra of this distribution that installs it, for instance ``"ort"``.
        purpose: what needs it, as the subject of a sentence: ``"running a bundle"``.

    Raises:
        MissingExtraError: if the module, or something it needs, is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"{purpose} needs the package {error.name or module!r}, which is not installed",
            todo=f"run: pip install 'mope-deploy[{extra}]'",
        ) from error


def installed_versions(names: Iterable[str]) -> dict[str, str]:
    """Versions of those of these distributions that are installed, by name."""
    from importlib.metadata import PackageNotFoundError, version  # slow to import

    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
