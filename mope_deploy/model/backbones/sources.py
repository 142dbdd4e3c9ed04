"""Where an encoder's architecture and weights come from: ``timm:``, ``hf:``, ``dir:`` or ``embedded:``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mope_deploy.errors import ConfigError
from mope_deploy.extras import require

__all__ = ["EMBEDDED", "LoadedEncoder", "fingerprint", "load_source", "quiet_transformers"]

EMBEDDED = Path(__file__).parent / "embedded"


@dataclass(frozen=True)
class LoadedEncoder:
    """A library's encoder as loaded.

    Attributes:
        module: the library's own module, float32.
        location: local folder or hub id it was loaded from, for whatever belongs to it besides the weights (tokenizer).
        model_args: timm's arguments besides the architecture's name; empty for other libraries.
    """

    module: nn.Module
    location: str
    model_args: Mapping[str, Any] = field(default_factory=dict)


def load_source(source: str) -> LoadedEncoder:
    """Load the encoder that ``source`` names, in float32.

    Raises:
        ConfigError: if there is no such encoder, or it could not be read or fetched.
    """
    scheme, _, name = source.partition(":")
    if scheme == "timm":
        return LoadedEncoder(_from_timm(name, source), name)
    if scheme == "hf":
        return LoadedEncoder(_from_transformers(name, source), name)
    folder = EMBEDDED / name if scheme == "embedded" else Path(name).expanduser()
    if not (folder / "config.json").is_file():
        known = sorted(path.parent.name for path in EMBEDDED.glob("*/config.json"))
        raise ConfigError(
            f"no encoder at {source}",
            received=f"{folder} without a config.json",
            expected=f"one of {', '.join(known)}" if scheme == "embedded" else "a folder with config.json and weights",
        )
    keys = _read_json(folder / "config.json")
    if "architecture" in keys:
        return LoadedEncoder(_from_timm(f"local-dir:{folder}", source), str(folder), keys.get("model_args", {}))
    if "model_type" in keys:
        return LoadedEncoder(_from_transformers(str(folder), source), str(folder))
    raise ConfigError(
        f"{folder / 'config.json'} describes no encoder",
        received=f"keys {', '.join(sorted(keys)[:8])}",
        expected="'architecture' (timm) or 'model_type' (transformers)",
    )


def fingerprint(encoder: nn.Module) -> str:
    """SHA-256 over names, shapes, dtypes and values of an encoder's tensors, as ``"sha256:…"``."""
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"


def _from_timm(name: str, source: str) -> nn.Module:
    timm = require("timm", extra="train", purpose=f"the encoder {source}")
    try:
        # num_classes=0 drops the classifier: MoPE has a head of its own.
        return timm.create_model(name, pretrained=True, num_classes=0).float()
    except Exception as error:  # timm and the hub raise anything from RuntimeError to HTTP errors
        raise _unloadable(source, error) from error


def _from_transformers(name: str, source: str) -> nn.Module:
    transformers = require("transformers", extra="train", purpose=f"the encoder {source}")
    try:
        with quiet_transformers():
            module, report = transformers.AutoModel.from_pretrained(
                name, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
    except Exception as error:  # OSError for a missing file, HTTP errors, ValueError for an unknown type
        raise _unloadable(source, error) from error
    # transformers fills what a file lacks with random values and only says so in a log.
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise ConfigError(
            f"the weights of {source} are incomplete", received=f"no {', '.join(missing[:3])}", expected="every tensor"
        )
    # A pooler is not part of the method, and one that the checkpoint lacks is random: it would change the fingerprint.
    pooler = getattr(module, "pooler", None)
    if pooler is not None and any(True for _ in pooler.parameters()):  # a plain mean stays
        module.pooler = None
    return module


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """transformers without its bars and load reports, which would break up our own progress lines."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _unloadable(source: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"the encoder {source} could not be loaded: {type(error).__name__}: {str(error).strip().splitlines()[0][:300]}",
        todo="check the name, or the network; without network use dir:PATH or a checkpoint saved with standalone=True",
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} cannot be used", received=type(values).__name__, expected="an object")
    return values
