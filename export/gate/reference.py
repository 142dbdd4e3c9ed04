"""The reference: the trained model itself, eager in PyTorch, on numpy arrays; nothing traced or rewritten.

It is run in token form, the definition, whatever form it trained in and is exported in.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from export.gate.cases import Case
from mope_deploy.model import MoPE
from mope_deploy.model.router import Router, Routing

__all__ = ["Batch", "eager_outputs", "in_float64", "largest_difference", "mixed"]

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


def eager_outputs(model: MoPE, inputs: Arrays, *, selected: NDArray[np.bool_] | None = None) -> dict[str, NDArray[Any]]:
    """What ``model`` computes in evaluation mode; its mode is put back afterwards.

    Args:
        model: the trained model, or its twin from :func:`in_float64`.
        inputs: arrays by input name; floats are cast to the model's own dtype.
        selected: (B, layers, K), which experts take part whatever the scores say; their weights are the model's own.

    Returns:
        ``logits`` (B, C) and, if it routes, (B, layers, K) each: ``routing`` and ``soft``, after and before selection,
        and ``scores`` before the softmax.
    """
    parameter = next(model.parameters())
    tensors = {name: torch.from_numpy(array).to(parameter.device) for name, array in inputs.items()}
    tensors = {name: x.to(parameter.dtype) if x.is_floating_point() else x for name, x in tensors.items()}
    training = model.training
    scores: list[torch.Tensor] = []
    model.eval()
    try:
        with torch.inference_mode(), _watched(model, scores, selected):
            out = model(tensors, form="token")
    finally:
        model.train(training)
    named = {"logits": out.logits, "routing": out.routing, "soft": out.soft_routing}
    if scores:
        named["scores"] = torch.stack(scores, dim=1)
    return {name: tensor.cpu().numpy() for name, tensor in named.items() if tensor is not None}


def mixed(soft: torch.Tensor, selected: torch.Tensor) -> torch.Tensor:
    """Weights of the selected experts alone, renormalised. (…, K) each."""
    kept = soft * selected
    return kept / kept.sum(dim=-1, keepdim=True)


@contextmanager
def _watched(model: MoPE, scores: list[torch.Tensor], selected: NDArray[np.bool_] | None) -> Iterator[None]:
    """Keep what every router scores, layer by layer, and have it select what it is told to."""
    routers = [module for module in model.modules() if isinstance(module, Router)]

    def watch(router: Router, args: tuple[Any, ...], found: Routing) -> Routing:
        layer = len(scores)
        scores.append(router.scores(*args))
        if selected is None:
            return found
        return Routing(mixed(found.soft, torch.from_numpy(selected[:, layer]).to(found.soft.device)), found.soft)

    hooks = [router.register_forward_hook(watch) for router in routers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def in_float64(model: MoPE) -> MoPE:
    """A copy of ``model`` in double precision: what float32 would be without its rounding."""
    return copy.deepcopy(model).double()


def largest_difference(a: NDArray[Any], b: NDArray[Any]) -> float:
    """max|a − b|, NaN if either holds anything that is not finite."""
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("nan")
    return float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max(initial=0.0))
