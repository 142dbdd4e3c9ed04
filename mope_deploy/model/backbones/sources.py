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
from mope_deploy.reading import read_json

__all__ = [
    "EMBEDDED",
    "LoadedEncoder",
    "fingerprint",
    "load_source",
    "preprocessor_config",
    "quiet_transformers",
    "save_transformers",
]

EMBEDDED = Path(__file__).parent / "embedded"
PREPROCESSOR = "preprocessor_config.json"
# Parts that no encoder's features need and that its checkpoint may lack; then they are random.
_UNUSED = ("pooler.", "classifier.", "masked_spec_embed")


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
            config = transformers.AutoConfig.from_pretrained(name)
            cls, options = _transformers_class(transformers, config)
            module, report = cls.from_pretrained(
                name, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **options
            )
    except Exception as error:  # OSError for a missing file, HTTP errors, ValueError for an unknown type
        raise _unloadable(source, error) from error
    # transformers fills what a file lacks with random values and only says so in a log.
    missing = sorted(key for key in report["missing_keys"] if not key.startswith(_UNUSED))
    if missing:
        raise ConfigError(
            f"the weights of {source} are incomplete", received=f"no {', '.join(missing[:3])}", expected="every tensor"
        )
    if options:
        module._weight_conversions = None  # or saving it would give its tensors the larger model's names again
    # They are no part of the method, and where the checkpoint lacks them they would change the fingerprint.
    pooler = getattr(module, "pooler", None)
    if pooler is not None and any(True for _ in pooler.parameters()):  # a plain mean stays
        module.pooler = None
    if isinstance(getattr(module, "classifier", None), nn.Linear):
        module.classifier = nn.Identity()
    if hasattr(module, "masked_spec_embed"):
        del module.masked_spec_embed
    return module


def _transformers_class(transformers: Any, config: Any) -> tuple[Any, dict[str, Any]]:
    """The class that holds the encoder of ``config``, and how its weights are found in a larger model's file."""
    if config.model_type == "whisper":
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        return WhisperEncoder, {"key_mapping": {r"^(model\.)?encoder\.": ""}}
    if "VideoMAEForVideoClassification" in (config.architectures or ()):
        return transformers.VideoMAEForVideoClassification, {}  # it alone has the norm behind the mean
    return transformers.AutoModel, {}


def preprocessor_config(location: str) -> dict[str, Any]:
    """What an encoder's ``preprocessor_config.json`` says; nothing where there is none.

    Raises:
        ConfigError: it is damaged, or the hub cannot be asked.
    """
    folder = Path(location)
    if folder.is_dir():
        path = folder / PREPROCESSOR
        return _read_json(path) if path.is_file() else {}
    from transformers.utils import cached_file

    try:
        found = cached_file(location, PREPROCESSOR, _raise_exceptions_for_missing_entries=False)
    except Exception as error:  # HTTP errors, a revision that does not exist
        raise _unloadable(f"hf:{location}", error) from error
    return _read_json(Path(found)) if found else {}


def save_transformers(encoder: Any, folder: Path, *, preprocessor: Mapping[str, Any]) -> None:
    """Write config.json, model.safetensors and, if there is anything to say, preprocessor_config.json."""
    with quiet_transformers():
        encoder.save_pretrained(folder)
    if preprocessor:
        text = json.dumps(dict(preprocessor), indent=2, sort_keys=True) + "\n"
        (folder / PREPROCESSOR).write_text(text, encoding="utf-8")


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
        values = read_json(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} cannot be used", received=type(values).__name__, expected="an object")
    return values
