"""Tensors on disk: exactly those that a model has, of its shapes and types, every value finite; and their hash."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mope_deploy.errors import CheckpointError
from mope_deploy.fields import shown
from mope_deploy.files import reason

__all__ = ["check_tensors", "fingerprint", "nonfinite", "read_tensors"]

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # as safetensors calls them
Form = tuple[str, tuple[int, ...]]  # dtype and shape


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, dtypes and values, as ``"sha256:…"``."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"


def nonfinite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of those with a NaN or an infinity, sorted."""
    return [name for name, tensor in sorted(tensors.items()) if not bool(torch.isfinite(tensor).all())]


def check_tensors(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise unless ``state`` has the names, shapes and types of ``expected`` and finite values.

    Raises:
        CheckpointError: naming the first few differences.
    """
    _check_forms({name: _form(tensor) for name, tensor in state.items()}, expected)
    if wrong := nonfinite(state):
        raise CheckpointError(
            f"values of {', '.join(wrong[:3])}", received="NaN or an infinity", expected="finite numbers"
        )


def read_tensors(path: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a safetensors file, whose header is compared with ``expected`` before any is read.

    Raises:
        CheckpointError: naming the file: it cannot be read, or its tensors are not those of ``expected``.
    """
    try:
        if not path.is_file():  # opening a pipe would wait for its writer
            raise FileNotFoundError("no such file")
        with safe_open(path, framework="pt") as file:
            forms = {}
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                forms[name] = _DTYPES.get(part.get_dtype(), part.get_dtype()), tuple(part.get_shape())
            _check_forms(forms, expected)
            state = {name: file.get_tensor(name) for name in expected}
        check_tensors(state, expected)
        return state
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _form(tensor: Tensor) -> Form:
    return str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)


def _check_forms(found: Mapping[str, Form], expected: Mapping[str, Tensor]) -> None:
    missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or unexpected:
        raise CheckpointError(
            "the checkpoint's tensors are not the model's",
            received=f"{len(unexpected)} unknown ({', '.join(map(_named, unexpected[:3])) or 'none'})",
            expected=f"{len(missing)} more ({', '.join(missing[:3]) or 'none'})",
        )
    for name, tensor in expected.items():
        for what, received, wanted in zip(("type", "shape"), found[name], _form(tensor), strict=True):
            if received != wanted:
                raise CheckpointError(f"{what} of {name}", received=received, expected=wanted)


def _named(name: str) -> str:
    """A foreign tensor's name as a message may show it."""
    return name if name.isprintable() and len(name) <= 80 else shown(name)
