"""AdamW with a learning rate for each side and weight decay where it makes sense, and the learning rates' schedule."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from train.config import OptimSection

__all__ = ["learning_rate_factor", "optimiser", "parameter_groups"]

COMPLEMENTARY = "complementary."  # prompts inside the complementary encoders are named so


def parameter_groups(parameters: Mapping[str, nn.Parameter], section: OptimSection) -> list[dict[str, Any]]:
    """Trained parameters by side and by whether they decay; groups without parameters are left out.

    The main side is everything but the static prompts inside complementary encoders. Prompts, experts and weight
    matrices decay. Biases, norms and routing embeddings do not: U's rows are made to have unit norm.
    """
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        side = "complementary" if name.startswith(COMPLEMENTARY) else "main"
        decays = parameter.ndim > 1 and not name.endswith(".embeddings")
        groups.setdefault((side, decays), []).append(parameter)
    rates = {"main": section.lr_main, "complementary": section.lr_complementary}
    return [
        {
            "params": found,
            "lr": rates[side],
            "weight_decay": section.weight_decay if decays else 0.0,
            "name": f"{side}{'' if decays else ', no decay'}",
        }
        for (side, decays), found in sorted(groups.items(), key=lambda item: item[0], reverse=True)
    ]


def optimiser(parameters: Mapping[str, nn.Parameter], section: OptimSection) -> torch.optim.AdamW:
    """AdamW over :func:`parameter_groups`; one fused call a step, prompts are many small tensors."""
    return torch.optim.AdamW(parameter_groups(parameters, section), betas=section.betas, eps=section.eps, fused=True)


def learning_rate_factor(section: OptimSection, *, steps: int, steps_per_epoch: int) -> Callable[[int], float]:
    """The factor on the peak learning rates as a function of the optimiser step, counted from 0.

    Linear warm-up to 1 at step ``warmup_steps``; then ``multistep``: × gamma after each milestone (an epoch),
    ``cosine``: half a cosine down to 0 at the last step, or ``constant``.

    Args:
        section: the recipe's ``optim:``.
        steps: optimiser steps in all.
        steps_per_epoch: optimiser steps of one epoch.
    """
    milestones = sorted(milestone * steps_per_epoch for milestone in section.milestones)
    warmup = section.warmup_steps

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if section.schedule == "multistep":
            return section.gamma ** bisect_right(milestones, step)
        if section.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))
        return 1.0

    return factor
