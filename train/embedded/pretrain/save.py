"""What both pretrainings share: the optimisation, and an atomic write of the encoder's folder."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from mope_deploy.errors import CheckpointError, UsageError
from mope_deploy.files import json_bytes, whole_folder
from mope_deploy.progress import track

__all__ = ["check_target", "optimise", "save_folder"]

_WEIGHTS = "model.safetensors"
_WARM_UP = 300  # steps, or a tenth of all where that is less


def optimise(
    model: nn.Module, heads: nn.Module, loss: Callable[[], Tensor], *, steps: int, lr: float, decay: float, what: str
) -> None:
    """AdamW on the loss of one fresh batch a step: linear warm-up to ``lr``, and half a cosine down to 0."""
    rise = max(1, min(_WARM_UP, steps // 10))

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / rise) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))

    optimiser = torch.optim.AdamW([*model.parameters(), *heads.parameters()], lr=lr, weight_decay=decay)
    rate = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
    model.train()
    for _ in track(range(steps), what=f"pretraining {what}"):
        optimiser.zero_grad()
        loss().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        rate.step()


def check_target(out: Path) -> None:
    """Refuse to replace anything but an encoder's folder; called before the long work.

    Raises:
        UsageError: ``out`` is a file, or a folder that holds something else.
    """
    if out.is_dir():
        held = {entry.name for entry in out.iterdir()}
        known = {"config.json", _WEIGHTS, "tokenizer.json", "tokenizer_config.json"}
        if not held or (held <= known and {"config.json", _WEIGHTS} <= held):
            return
    elif not out.exists():
        return
    raise UsageError(
        f"{out} exists and is not an encoder's folder", todo="name a new folder, or that of an encoder to replace"
    )


def save_folder(out: Path, files: Mapping[str, Mapping[str, object]], weights: Mapping[str, Tensor]) -> None:
    """Write JSON files and ``model.safetensors`` to a folder, which appears, or is replaced, only when complete.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    tensors = {key: tensor.detach().contiguous() for key, tensor in weights.items()}
    with whole_folder(out, error=CheckpointError) as new:
        for file, content in files.items():
            (new / file).write_bytes(json_bytes(content))
        (new / _WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
