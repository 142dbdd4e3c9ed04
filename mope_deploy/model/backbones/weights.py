"""Whether an encoder that a library has loaded is the one whose weights are on disk: all of them, and nothing but.

The libraries fill what a file lacks with random values, leave out what they do not know, and convert whatever is there
to floats; at most they say so in a log.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from mope_deploy.errors import ConfigError
from mope_deploy.files import reason
from mope_deploy.model.tensors import nonfinite

__all__ = ["check_files", "check_report", "check_values"]

_BUFFERS = ("position_ids", "token_type_ids", "inv_freq")  # made anew by the library; files of older ones have them
_WRAPPERS = ("base_model", "model", "module", "_orig_mod")  # what tools put before an encoder's own names
_FLOATS = ("F64", "F32", "F16", "BF16")
_SHOWN = 3


def check_report(report: Mapping[str, Any], module: nn.Module, source: str, *, unused: Collection[str]) -> None:
    """Raise unless what transformers reports of a file leaves the encoder exactly as it was saved.

    Heads of other tasks, which stand beside the encoder, may be left over. Nothing inside it may: relative positions or
    an adapter that is left out is another encoder.

    Args:
        report: ``loading_info`` of ``from_pretrained``.
        module: the encoder.
        source: for messages.
        unused: first parts of names that the encoder's features do not need.

    Raises:
        ConfigError: naming tensors that are missing, of another shape, or left over.
    """
    missing = sorted(key for key in report["missing_keys"] if not key.startswith(tuple(unused)))
    if missing:
        received = f"no {', '.join(missing[:_SHOWN])}"
        raise ConfigError(f"the weights of {source} are incomplete", received=received, expected="every tensor")
    for name, received, expected in sorted(report["mismatched_keys"], key=str):
        if not name.startswith(tuple(unused)):
            raise ConfigError(
                f"the weights of {source}: shape of {name}", received=tuple(received), expected=tuple(expected)
            )
    left = sorted(key for key in report["unexpected_keys"] if _is_inside(key, module, unused))
    if left:
        more = f" and {len(left) - _SHOWN} more" if len(left) > _SHOWN else ""
        raise ConfigError(
            f"the weights of {source} have tensors that {type(module).__name__} does not read",
            received=", ".join(left[:_SHOWN]) + more,
            expected="the weights of this encoder and no others",
            todo="merge an adapter into the weights first; another kind of encoder has another model_type",
        )


def check_files(folder: Path, module: nn.Module, source: str) -> None:
    """Raise if floating-point tensors of ``module`` stand in the folder's files as integers or booleans.

    Raises:
        ConfigError: naming the first of them, or a file that cannot be read.
    """
    floating = {name for name, tensor in module.state_dict().items() if tensor.is_floating_point()}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{path} cannot be read: {reason(error)}") from error
        for name, kind in kinds.items():
            if kind not in _FLOATS and any(suffix in floating for suffix in _suffixes(name)):
                raise ConfigError(f"{path}: type of {name} of {source}", received=kind, expected=" or ".join(_FLOATS))


def check_values(module: nn.Module, source: str) -> None:
    """Raise :class:`ConfigError` if a tensor of the encoder has a value that is no number."""
    if wrong := nonfinite(module.state_dict()):
        raise ConfigError(
            f"the weights of {source}: values of {', '.join(wrong[:_SHOWN])}",
            received="NaN or an infinity",
            expected="finite numbers",
        )


def _is_inside(key: str, module: nn.Module, unused: Collection[str]) -> bool:
    """Whether a left-over tensor is of the encoder itself, and not of a head beside it."""
    prefix = getattr(module, "base_model_prefix", "") or "model"
    own = key.removeprefix(f"{prefix}.")
    if own.endswith(_BUFFERS) or own.startswith(tuple(unused)):
        return False
    first = own.split(".", 1)[0]
    return own != key or first in dict(module.named_children()) or first in _WRAPPERS or "lora_" in key


def _suffixes(name: str) -> list[str]:
    """``a.b.c``, ``b.c`` and ``c``: larger models put their own names before an encoder's."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]
