"""Where an encoder's architecture and weights come from: ``timm:``, ``hf:``, ``dir:`` or ``embedded:``."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mope_deploy import reading
from mope_deploy.errors import ConfigError, MopeError
from mope_deploy.extras import require
from mope_deploy.fields import shown
from mope_deploy.files import reason
from mope_deploy.model.backbones.weights import check_files, check_report, check_values
from mope_deploy.model.network import hub, offline_reason

__all__ = [
    "EMBEDDED",
    "PREPROCESSOR",
    "LoadedEncoder",
    "beside",
    "load_source",
    "quiet_transformers",
    "read_json",
    "save_transformers",
    "unloadable",
]

EMBEDDED = Path(__file__).parent / "embedded"
PREPROCESSOR = "preprocessor_config.json"
# Parts that no encoder's features need and that its checkpoint may lack; then they are random.
_UNUSED = ("pooler.", "classifier.", "masked_spec_embed")
_DECODER = ("decoder.", "proj_out.")  # of a larger model that holds the encoder
_LOCAL = "local-dir:"  # timm's own prefix of folders
_WITHOUT_NETWORK = "without network use dir:PATH or a checkpoint saved with standalone=True"


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
        ConfigError: if there is no such encoder, or its files are damaged or are not what they seem.
        MopeError: if it could not be fetched for want of a network.
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
    keys = read_json(folder / "config.json")
    if "architecture" in keys:
        model_args = keys.get("model_args", {})
        if not isinstance(model_args, dict):
            raise ConfigError(f"{folder / 'config.json'}: model_args", received=shown(model_args), expected="an object")
        return LoadedEncoder(_from_timm(f"{_LOCAL}{folder}", source), str(folder), model_args)
    if "model_type" in keys:
        return LoadedEncoder(_from_transformers(str(folder), source), str(folder))
    raise ConfigError(
        f"{folder / 'config.json'} describes no encoder",
        received=f"keys {', '.join(sorted(keys)[:8])}",
        expected="'architecture' (timm) or 'model_type' (transformers)",
    )


def _from_timm(name: str, source: str) -> nn.Module:
    timm = require("timm", extra="train", purpose=f"the encoder {source}")
    try:
        # num_classes=0 drops the classifier: MoPE has a head of its own.
        with hub(local=name.startswith(_LOCAL)):
            module = timm.create_model(name, pretrained=True, num_classes=0).float()
    except Exception as error:  # timm and the hub raise anything from RuntimeError to HTTP errors
        raise unloadable(source, error) from error
    if name.startswith(_LOCAL):
        check_files(Path(name.removeprefix(_LOCAL)), module, source)
    check_values(module, source)
    return module


def _from_transformers(name: str, source: str) -> nn.Module:
    transformers = require("transformers", extra="train", purpose=f"the encoder {source}")
    try:
        with quiet_transformers(), hub(local=Path(name).is_dir()):
            config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
            cls, options = _transformers_class(transformers, config)
            # Tensors of other shapes are refused below, by name: the library's own error names none.
            module, report = cls.from_pretrained(
                name,
                dtype=torch.float32,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **options,
            )
    except Exception as error:  # OSError for a missing file, HTTP errors, ValueError for an unknown type
        raise unloadable(source, error) from error
    check_report(report, module, source, unused=(*_UNUSED, *(_DECODER if options else ())))
    folder = Path(name) if Path(name).is_dir() else (beside(name, "config.json") or Path(name)).parent
    check_files(folder, module, source)
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
    check_values(module, source)
    return module


def _transformers_class(transformers: Any, config: Any) -> tuple[Any, dict[str, Any]]:
    """The class that holds the encoder of ``config``, and how its weights are found in a larger model's file."""
    if config.model_type == "whisper":
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        return WhisperEncoder, {"key_mapping": {r"^(model\.)?encoder\.": ""}}
    if "VideoMAEForVideoClassification" in (config.architectures or ()):
        return transformers.VideoMAEForVideoClassification, {}  # it alone has the norm behind the mean
    return transformers.AutoModel, {}


def beside(location: str, file: str) -> Path | None:
    """A file of an encoder's folder or hub repository; None where there is no such file.

    Raises:
        MopeError: the hub cannot be asked.
    """
    folder = Path(location)
    if folder.is_dir():
        return folder / file if (folder / file).is_file() else None
    from transformers.utils import cached_file

    try:
        with hub():
            found = cached_file(location, file, _raise_exceptions_for_missing_entries=False)
    except Exception as error:  # HTTP errors, a revision that does not exist
        raise unloadable(f"hf:{location}", error) from error
    return Path(found) if found else None


def save_transformers(encoder: Any, folder: Path, *, preprocessor: Mapping[str, Any]) -> None:
    """Write config.json, model.safetensors and, if there is anything to say, preprocessor_config.json."""
    with quiet_transformers():
        encoder.save_pretrained(folder)
    if preprocessor:
        text = json.dumps(dict(preprocessor), indent=2, sort_keys=True) + "\n"
        (folder / PREPROCESSOR).write_text(text, encoding="utf-8")


_one_at_a_time = threading.RLock()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """transformers without its bars and load reports, which would break up our own progress lines.

    Both are the whole process's, so one thread at a time: two that overlapped would leave them off for good.
    """
    from transformers.utils import logging

    with _one_at_a_time:
        verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()


def unloadable(source: str, error: Exception) -> MopeError:
    """Why an encoder could not be loaded: a failure where there is no network, else the configuration's fault."""
    if (why := offline_reason(error)) is not None:
        return MopeError(f"the encoder {source} could not be loaded: {why}", todo=_WITHOUT_NETWORK)
    return ConfigError(
        f"the encoder {source} could not be loaded: {type(error).__name__}: {' '.join(str(error).split())[:300]}",
        todo=f"check the name and the files, or the network; {_WITHOUT_NETWORK}",
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ConfigError: it cannot be read, or is no object.
    """
    try:
        values = reading.read_json(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {reason(error)}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} cannot be used", received=type(values).__name__, expected="an object")
    return values
