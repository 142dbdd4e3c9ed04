"""Names of a graph: what stands in for a library's module is named after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

__all__ = ["traced_as"]

P = ParamSpec("P")
T = TypeVar("T")


def traced_as(module: nn.Module, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """``function(…)`` in place of the forward pass of ``module``, whose weights it uses.

    A plain call, except while a graph is traced: there what it computes is named after ``module``, as the forward pass
    would be. Names tell where a layer begins and ends, which lowering to other precisions depends on.
    """
    if not torch.compiler.is_exporting():
        return function(*args, **kwargs)
    traced: Any = module
    traced.forward = function
    try:
        return traced(*args, **kwargs)
    finally:
        del traced.forward
