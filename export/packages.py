"""The packages that exporting needs, checked before any work."""

from __future__ import annotations

from mope_deploy.extras import require

__all__ = ["require_packages"]

_PACKAGES = ("torch", "timm", "transformers", "onnx", "onnxscript", "onnxruntime", "requests", "optimum.exporters.base")


def require_packages() -> None:
    """Import what exporting needs.

    Raises:
        MissingExtraError: naming the first one that is missing and the pip command.
    """
    for package in _PACKAGES:
        # one of the two distributions of onnxruntime, which extra "export" must not choose: each overwrites the other
        require(package, extra="ort" if package == "onnxruntime" else "export", purpose="exporting")
