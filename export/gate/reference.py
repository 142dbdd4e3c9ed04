"""The reference: the trained model itself, eager in PyTorch, on numpy arrays; nothing traced or rewritten.

It is run in token form, the definition, whatever form it trained in and is exported in.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from export.gate.cases import Case
from mope_deploy.model import MoPE

__all__ = ["Batch", "eager_outputs", "in_float64", "largest_difference"]

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Batch:
    """One batch, and :func:`eager_outputs` of it."""

    case: Case
    eager: dict[str, NDArray[Any]]

    @property
    def feeds(self) -> dict[str, NDArray[Any]]:
        """Input arrays by name."""
        return self.case.inputs


def eager_outputs(model: MoPE, inputs: Arrays) -> dict[str, NDArray[Any]]:
    """What ``model`` computes in evaluation mode; its mode is put back afterwards.

    Args:
        model: the trained model, or its twin from :func:`in_float64`.
        inputs: arrays by input name; floats are cast to the model's own dtype.

    Returns:
        ``logits`` (B, C) and, if it routes, ``routing`` and ``soft`` (B, layers, K), after and before selection.
    """
    parameter = next(model.parameters())
    tensors = {name: torch.from_numpy(array).to(parameter.device) for name, array in inputs.items()}
    tensors = {name: x.to(parameter.dtype) if x.is_floating_point() else x for name, x in tensors.items()}
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            out = model(tensors, form="token")
    finally:
        model.train(training)
    named = {"logits": out.logits, "routing": out.routing, "soft": out.soft_routing}
    return {name: tensor.cpu().numpy() for name, tensor in named.items() if tensor is not None}


def in_float64(model: MoPE) -> MoPE:
    """A copy of ``model`` in double precision: what float32 would be without its rounding."""
    return copy.deepcopy(model).double()


def largest_difference(a: NDArray[Any], b: NDArray[Any]) -> float:
    """max|a − b|, NaN if either holds anything that is not finite."""
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("nan")
    return float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max(initial=0.0))
