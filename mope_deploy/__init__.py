"""Mixture of prompt experts, deployed: ``from mope_deploy import load; load("bundle").predict(image=…, text=…)``.

Importing this package imports nothing else; what is used is loaded when it is first asked for. The model and its torch
live in ``mope_deploy.model``, which the device side never imports.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mope_deploy.predictor import Prediction, Predictor, load

__all__ = ["Prediction", "Predictor", "__version__", "load"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in ("Prediction", "Predictor", "load"):
        raise AttributeError(f"module 'mope_deploy' has no attribute {name!r}")
    from mope_deploy import predictor

    return getattr(predictor, name)
