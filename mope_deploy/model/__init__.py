"""The MoPE model in PyTorch: one file per box of the paper's figure (see docs/architecture.md).

Importing this package imports no torch: recipes read their configuration from it before anything heavy is loaded.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mope_deploy.model.config import EncoderSpec, MoPEConfig

if TYPE_CHECKING:
    from mope_deploy.model.losses import importance_loss
    from mope_deploy.model.mope import MoPE, MoPEOutput, build_model

__all__ = ["EncoderSpec", "MoPE", "MoPEConfig", "MoPEOutput", "build_model", "importance_loss"]

_HOMES = {"MoPE": "mope", "MoPEOutput": "mope", "build_model": "mope", "importance_loss": "losses"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
