"""Export a trained MoPE model to a verified bundle: ``mope-export``, or :func:`export_bundle` from Python."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from export.pipeline import export_bundle

__all__ = ["export_bundle"]


def __getattr__(name: str) -> Any:
    # torch and the exporter load when they are asked for: `mope-export --help` should not wait for them.
    if name == "export_bundle":
        from export.packages import require_packages

        require_packages()
        from export.pipeline import export_bundle

        return export_bundle
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
