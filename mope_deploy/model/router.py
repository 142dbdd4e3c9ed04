"""The router of one layer: how much each prompt expert counts for each sample (2403.10568, section 3.3).

q = [W_x · pool(x) ; W_y · y], scores r = softmax(q Uᵀ/τ + ε) with ε ~ N(0, σ²) in training only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Router", "Routing", "routing_embeddings", "straight_through_top_k"]


class Routing(NamedTuple):
    """What a router decided for a batch.

    Attributes:
        weights: r as used for mixing (B, K); rows sum to 1, at most top_k of them nonzero under top-k routing.
        soft: r before any selection (B, K), what the importance loss counts.
    """

    weights: Tensor
    soft: Tensor


class Router(nn.Module):
    """Scores the experts of one layer from the main modality's pooled state and every y.

    Args:
        width_x: D of the main encoder.
        widths_y: D_y of each complementary modality, by name.
        embeddings: routing embeddings U (K, d), d = d_x + d_y · number of complementary modalities.
        d_x: router width of the main modality; 0 leaves it out.
        d_y: router width of each complementary modality.
        temperature: τ.
        sigma: σ of the noise in training; 0 for none.
        top_k: experts kept and renormalised; 0 for dense routing.
        cosine: whether q is scaled to unit norm, so that scores are cosines over τ.
        train_embeddings: whether U is a parameter. A frozen U is not part of the checkpoint: it is a pure function of
            the seed.
    """

    def __init__(
        self,
        *,
        width_x: int,
        widths_y: Mapping[str, int],
        embeddings: Tensor,
        d_x: int,
        d_y: int,
        temperature: float,
        sigma: float,
        top_k: int,
        cosine: bool,
        train_embeddings: bool,
    ) -> None:
        super().__init__()
        self.temperature, self.sigma, self.top_k, self.cosine = temperature, sigma, top_k, cosine
        self.project_x = nn.Linear(width_x, d_x, bias=False) if d_x else None
        self.project_y = nn.ModuleDict({name: nn.Linear(width, d_y, bias=False) for name, width in widths_y.items()})
        self.embeddings: Tensor
        if train_embeddings:
            self.embeddings = nn.Parameter(embeddings.clone())
        else:
            self.register_buffer("embeddings", embeddings.clone(), persistent=False)

    def forward(self, pooled_x: Tensor, y: Mapping[str, Tensor]) -> Routing:
        """Route a batch. pooled_x (B, D), y {modality: (B, D_y)} → weights and soft scores (B, K)."""
        scores = self.scores(pooled_x, y)
        if self.training and self.sigma > 0:
            scores = scores + torch.randn_like(scores) * self.sigma
        soft = torch.softmax(scores, dim=-1)
        weights = straight_through_top_k(soft, self.top_k) if self.top_k else soft
        return Routing(weights=weights, soft=soft)

    def scores(self, pooled_x: Tensor, y: Mapping[str, Tensor]) -> Tensor:
        """q Uᵀ/τ without noise. pooled_x (B, D), y {modality: (B, D_y)} → (B, K)."""
        parts = [] if self.project_x is None else [self.project_x(pooled_x)]
        parts += [project(y[name]) for name, project in self.project_y.items()]
        q = torch.cat(parts, dim=-1)  # (B, d)
        U = self.embeddings
        if self.cosine:
            q = nn.functional.normalize(q, dim=-1)
            U = nn.functional.normalize(U, dim=-1)
        return q @ U.T / self.temperature


def straight_through_top_k(soft: Tensor, k: int) -> Tensor:
    """The k largest scores renormalised to sum 1, with the gradient of the soft scores.

    A hard selection of one expert has the constant weight 1 and would leave the router without any gradient. Of experts
    that tie the first ones are kept, as ONNX defines TopK: torch's own takes any.

    Args:
        soft: r (B, K).
        k: experts kept, 1 ≤ k ≤ K.
    """
    values, index = (found[..., :k] for found in soft.sort(dim=-1, descending=True, stable=True))  # (B, k)
    hard = torch.zeros_like(soft).scatter(-1, index, values / values.sum(dim=-1, keepdim=True))
    return hard.detach() + (soft - soft.detach())


def routing_embeddings(*, experts: int, width: int, seed: int, layer: int) -> Tensor:
    """Routing embeddings U (K, d) float32 of one layer: K orthonormal rows.

    More than d rows cannot all be orthogonal; then U is a unit-norm semi-orthogonal frame: its columns are made
    orthonormal and its rows scaled to length 1.

    A pure function of its arguments, equal to the last bit on every machine and release, so a checkpoint need not hold
    it: the random stream is numpy's frozen RandomState, twelve uniforms make one nearly Gaussian value without any
    library function, and Gram-Schmidt uses exactly rounded sums instead of a BLAS.
    """
    random = np.random.RandomState([seed, layer, experts, width])
    gaussian = np.full((experts, width), -6.0)
    for _ in range(12):
        gaussian += random.random_sample((experts, width))
    rows = gaussian.tolist() if experts <= width else gaussian.T.tolist()
    basis: list[list[float]] = []
    for row in rows:
        for _ in range(2):  # once more, for orthogonality to the last digits
            for done in basis:
                overlap = math.fsum(a * b for a, b in zip(row, done, strict=True))
                row = [a - overlap * b for a, b in zip(row, done, strict=True)]
        basis.append(_unit(row))
    if experts > width:
        basis = [_unit(list(column)) for column in zip(*basis, strict=True)]
    return torch.tensor(basis, dtype=torch.float64).float()


def _unit(row: list[float]) -> list[float]:
    norm = math.sqrt(math.fsum(a * a for a in row))
    return [a / norm for a in row]
