"""What both pretrainings share: the learning-rate schedule and an atomic write of the encoder's folder."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from mope_deploy.errors import CheckpointError, UsageError
from mope_deploy.files import json_bytes, whole_folder

__all__ = ["check_target", "save_folder", "schedule"]

_WEIGHTS = "model.safetensors"


def schedule(steps: int, *, warm_up: int = 300) -> Callable[[int], float]:
    """Factor of the learning rate at a step: linear warm-up, then a half cosine down to 0."""
    rise = max(1, min(warm_up, steps // 10))

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / rise) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))

    return factor


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
