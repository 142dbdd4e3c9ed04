"""Folding: keys and values of prompts that are known before export become constants of the graph.

A layer's key or value of a prompt is ``W · norm(prompt) + b`` (:mod:`mope_deploy.model.backbones.prefix`). Static
prompts and single experts never change, so theirs are constants. A mixture Σ_k r_k E_k of experts has them as well:

``table``   Σ_k r_k (W · norm(E_k) + b): exact without a norm, and wherever one expert is chosen.
``gram``    behind a LayerNorm (γ, β, ε), with Ē_k = E_k − mean_D(E_k), A_k = W(γ ⊙ Ē_k) and G[j, k] = ⟨Ē_j, Ē_k⟩ / D:
            Σ_k r_k A_k / sqrt(rᵀ G r + ε) + Wβ + b.
``mixed``   the same, with the variance taken from Σ_k r_k Ē_k itself.
``append``  not folded: the mixture is a token that goes through the layer's own product.

All of them are exact (docs/numerics.md derives it); which one is cheapest depends on K, L and D and is counted here.
Constants are computed in float64. The variance, like all that stands outside the encoders' layers, stays fp32 in graphs
of lower precision.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from export.limits import FOLDS
from mope_deploy.model.backbones.prefix import PrefixKV, Projection

__all__ = ["AppendedExperts", "Cost", "FoldedExperts", "LayerSize", "Mixture", "choose", "constants", "costs"]

# Multiplications that a device does in the time in which it reads one byte: about 50 G/s against 12 GB/s for two cores
# of a CPU, and no less for a GPU. Tables are read once a batch; it is batch 1 that is counted.
MACS_PER_BYTE = 4
_BYTES = 4  # of a number


class Mixture(NamedTuple):
    """How one layer's router mixed its experts."""

    weights: Tensor  # r (B, K), 0 for experts that were not chosen
    values: Tensor | None  # of the chosen experts under top-k routing (B, k, 1), else None
    chosen: Tensor | None  # which these are (B, k), else None

    def of(self, table: Tensor) -> Tensor:
        """Σ_k r_k table[k]. (K, n) → (B, n)."""
        if self.chosen is None or self.values is None:
            return self.weights @ table
        rows = nn.functional.embedding(self.chosen, table)  # (B, k, n)
        return rows[:, 0] if self.chosen.shape[1] == 1 else (self.values * rows).sum(dim=1)


@dataclass(frozen=True)
class Cost:
    """What one form costs for one sample."""

    macs: int  # multiplications with addition
    bytes: int  # of constants that are read

    @property
    def total(self) -> int:
        """Both in multiplications."""
        return self.macs + MACS_PER_BYTE * self.bytes


@dataclass(frozen=True, kw_only=True)
class LayerSize:
    """What the cost of a layer's dynamic prompt depends on."""

    experts: int  # K
    top_k: int  # experts that are chosen, 0 for all of them
    length: int  # L
    width: int  # D
    inner: int  # width of all heads together
    product: int  # rows of the product that an appended token goes through, 2 or 3 times inner
    norm: str  # "none", "layer", or "other" for one that is not known to be folded

    @classmethod
    def of(cls, projection: Projection, experts: Tensor, top_k: int) -> LayerSize:
        """The sizes of a layer with these experts (K, L, D)."""
        K, L, D = experts.shape
        norm = "none" if projection.norm is None else "layer" if isinstance(projection.norm, nn.LayerNorm) else "other"
        inner = len(projection.weight) // 2
        return cls(experts=K, top_k=top_k, length=L, width=D, inner=inner, product=projection.product, norm=norm)


def costs(size: LayerSize) -> dict[str, Cost]:
    """What each form costs that is exact for such a layer."""
    read = size.top_k or size.experts  # a choice reads its rows alone
    tokens = read * size.length * size.width
    table = read * size.length * 2 * size.inner
    one = read == 1  # its weight is 1: nothing to multiply
    found = {"append": Cost((0 if one else tokens) + size.length * size.width * size.product, _BYTES * tokens)}
    if one or size.norm == "none":
        found["table"] = Cost(0 if one else table, _BYTES * table)
    elif size.norm == "layer":
        gram = size.length * size.experts**2
        found["gram"] = Cost(table + gram, _BYTES * (table + gram))
        found["mixed"] = Cost(table + tokens + size.length * size.width, _BYTES * (table + tokens))
    return found


def choose(fold: str, size: LayerSize) -> str:
    """The form of a layer's dynamic prompt.

    Args:
        fold: one of :data:`export.limits.FOLDS` other than ``token``. ``auto`` takes the cheapest; ``tables`` folds
            where no variance is needed; ``gram`` and ``mixed`` fold those layers so that need one; ``none`` nothing.
        size: of the layer.
    """
    assert fold in FOLDS
    found = costs(size)
    if fold == "auto":
        return min(found, key=lambda form: found[form].total)
    if fold == "none":
        return "append"
    if "table" in found:
        return "table"
    return fold if fold in found else "append"


@torch.no_grad()
def constants(projection: Projection, prompts: Tensor) -> Tensor:
    """Keys and values (…, 2, P, inner) of prompts (…, P, D), computed in float64."""
    return _double(projection)(prompts.detach().double()).to(prompts.dtype)


class AppendedExperts(nn.Module):
    """The mixture as tokens: Σ_k r_k E_k, from E (K, L, D), which is shared and not copied."""

    table: Tensor

    def __init__(self, experts: Tensor) -> None:
        super().__init__()
        K, self.length, self.width = experts.shape
        self.register_buffer("table", experts.detach().reshape(K, -1))

    def forward(self, mixture: Mixture) -> Tensor:
        """Tokens of the layer (B, L, D)."""
        return mixture.of(self.table).view(-1, self.length, self.width)


class FoldedExperts(nn.Module):
    """The mixture as keys and values, from tables of the experts' own.

    Args:
        projection: of the layer.
        experts: E (K, L, D).
        form: ``table``, ``gram`` or ``mixed``; what each computes stands at the head of this file.
    """

    table: Tensor
    gram: Tensor
    centred: Tensor
    offset: Tensor

    @torch.no_grad()
    def __init__(self, projection: Projection, experts: Tensor, form: str) -> None:
        super().__init__()
        self.form = form
        self.length, self.width = experts.shape[1:]
        self.inner = len(projection.weight) // 2
        if form == "table":
            self.register_buffer("table", constants(projection, experts).flatten(1))
            return
        norm = projection.norm
        assert isinstance(norm, nn.LayerNorm)
        exact, E = _double(projection), experts.detach().double()
        centred = E - E.mean(dim=-1, keepdim=True)  # Ē (K, L, D)
        gamma = torch.ones(self.width).to(E) if norm.weight is None else norm.weight.detach().double()
        beta = torch.zeros(self.width).to(E) if norm.bias is None else norm.bias.detach().double()
        linear = Projection(None, exact.weight, torch.zeros_like(exact.bias), product=exact.product)
        self.eps = norm.eps
        self.register_buffer("table", linear(gamma * centred).flatten(1).to(experts.dtype))  # A (K, 2·L·inner)
        self.register_buffer("offset", (exact.weight @ beta + exact.bias).view(2, 1, -1).to(experts.dtype))
        if form == "gram":
            gram = torch.einsum("kld,jld->klj", centred, centred) / self.width  # (K, L, K)
            self.register_buffer("gram", gram.flatten(1).to(experts.dtype))
        else:
            self.register_buffer("centred", centred.flatten(1).to(experts.dtype))

    def forward(self, mixture: Mixture) -> PrefixKV:
        """Keys and values, (B, L, inner) each."""
        rows = mixture.of(self.table).view(-1, 2 * self.length, self.inner)
        if self.form != "table":
            kv = rows.view(-1, 2, self.length, self.inner)
            kv = kv / torch.sqrt(self._variance(mixture) + self.eps).view(-1, 1, self.length, 1) + self.offset
            rows = kv.view(-1, 2 * self.length, self.inner)
        # By slices: a split has no conversion to opset 17.
        return PrefixKV((rows[:, : self.length],), (rows[:, self.length :],))

    def _variance(self, mixture: Mixture) -> Tensor:
        """Of each token of the mixture over its D features, (B, L)."""
        if self.form == "gram":
            r = mixture.weights
            rows = (r @ self.gram).view(-1, self.length, r.shape[1])  # (B, L, K)
            return (rows * r.unsqueeze(1)).sum(dim=-1).clamp_min(0.0)  # rounding may leave a little below 0
        token = mixture.of(self.centred).view(-1, self.length, self.width)
        return (token * token).mean(dim=-1)


def _double(projection: Projection) -> Projection:
    norm = None if projection.norm is None else copy.deepcopy(projection.norm).double()
    return Projection(norm, projection.weight.detach().double(), projection.bias.detach().double(), projection.product)
