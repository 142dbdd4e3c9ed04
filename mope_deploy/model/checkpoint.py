"""A checkpoint folder: exactly the trained tensors, the configuration, and which encoder weights they belong to.

config.json          schema, encoders (source, fingerprint), model configuration, preprocessing, versions
model.safetensors    the trained tensors (and fitted statistics of y), nothing else
tokenizer.json       the text encoder's tokenizer
encoders/<modality>/ the frozen encoders, only with standalone=True
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from mope_deploy.errors import CheckpointError, ConfigError
from mope_deploy.model.backbones import Backbone, load_encoder
from mope_deploy.model.backbones.sources import fingerprint
from mope_deploy.model.config import MoPEConfig
from mope_deploy.preprocess import Preprocessing

if TYPE_CHECKING:
    from mope_deploy.model.mope import MoPE

__all__ = ["copy_state", "fetch_checkpoint", "load_checkpoint", "save_checkpoint"]

FORMAT, SCHEMA = "mope-checkpoint", 1
CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"


def save_checkpoint(model: MoPE, folder: Path, *, standalone: bool, card: str) -> None:
    """Write ``model`` to ``folder``: into a temporary sibling first, then renamed.

    Raises:
        CheckpointError: if ``folder`` exists and is no checkpoint.
    """
    folder = folder.expanduser().resolve()
    if folder.exists() and not _replaceable(folder):
        raise CheckpointError(
            f"{folder} exists and is no checkpoint", expected="a new folder, an empty one or an earlier checkpoint"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    staging.chmod(0o755)  # mkdtemp's folders are for their owner alone
    try:
        _write(model, staging, standalone=standalone, card=card)
        _put_in_place(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def load_checkpoint(folder: Path, *, encoders: Mapping[str, str]) -> MoPE:
    """Read a checkpoint folder and build its model, in evaluation mode.

    Args:
        folder: the checkpoint.
        encoders: other sources for the frozen encoders, by modality.

    Raises:
        CheckpointError: if a file is missing or damaged, the tensors are not exactly the model's, or an encoder's
            weights are not those it was trained on.
    """
    from mope_deploy.model.mope import assemble

    description = _read_config(folder)
    try:
        config = MoPEConfig.from_dict(description["model"])
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from error
    config = _with_sources(config, folder, encoders)
    specs = config.encoders
    loaded = {spec.modality: load_encoder(spec, main=spec is config.main) for spec in specs}
    for spec in specs:
        trained_on = description["encoders"][spec.modality]["fingerprint"]
        found = fingerprint(loaded[spec.modality].backbone.encoder)
        if found != trained_on:
            raise CheckpointError(
                f"the {spec.modality} encoder {spec.source} has other weights than this checkpoint was trained on",
                received=found[:19],
                expected=trained_on[:19],
                todo="give the original weights with encoders={…}, or use a checkpoint saved with standalone=True",
            )
    # The sources stay those the checkpoint names: where an encoder happened to be loaded from is no part of the model.
    model = assemble(
        MoPEConfig.from_dict(description["model"]), loaded, preprocessing=_read_preprocessing(folder, description)
    )
    try:
        state = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / WEIGHTS} cannot be read: {error}") from error
    model.load_trained_state(state)
    return model


def fetch_checkpoint(name: str, **hub: Any) -> Path:
    """The local folder of a checkpoint: ``name`` itself if it is one, else downloaded from the hub.

    Raises:
        CheckpointError: if there is neither.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    looks_like_id = name.count("/") <= 1 and not name.startswith((".", "/", "~"))
    if not looks_like_id:
        raise CheckpointError(f"no checkpoint folder at {name}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, **hub))
    except Exception as error:  # network, authorisation, an id that does not exist: many classes, one meaning
        raise CheckpointError(
            f"{name} is neither a folder nor a hub repository that can be fetched: {type(error).__name__}"
        ) from error


@torch.no_grad()
def copy_state(state: Mapping[str, Tensor], *, into: Mapping[str, Tensor]) -> None:
    """Copy tensors by name; both sides must have exactly the same names and shapes.

    Raises:
        CheckpointError: naming the first few differences; then nothing was copied.
    """
    missing, unexpected = sorted(into.keys() - state.keys()), sorted(state.keys() - into.keys())
    if missing or unexpected:
        raise CheckpointError(
            "the checkpoint's tensors are not the model's",
            received=f"{len(unexpected)} unknown ({', '.join(unexpected[:3]) or 'none'})",
            expected=f"{len(missing)} more ({', '.join(missing[:3]) or 'none'})",
        )
    for name, target in into.items():
        if state[name].shape != target.shape:
            raise CheckpointError(f"shape of {name}", received=tuple(state[name].shape), expected=tuple(target.shape))
    for name, target in into.items():
        target.copy_(state[name])


def _write(model: MoPE, folder: Path, *, standalone: bool, card: str) -> None:
    backbones: dict[str, Backbone] = {model.config.main.modality: model.main}
    backbones |= {name: encoder.backbone for name, encoder in model.complementary_encoders().items()}
    specs = {spec.modality: spec for spec in (model.config.main, *model.config.complementary)}
    description = {
        "format": FORMAT,
        "schema": SCHEMA,
        "encoders": {
            modality: {
                "source": specs[modality].source,
                "class": type(backbone.encoder).__name__,
                "fingerprint": fingerprint(backbone.encoder),
            }
            for modality, backbone in backbones.items()
        },
        "model": model.config.to_dict(),
        "preprocess": model.preprocessing.to_dict(),
        "versions": {name: version(name) for name in ("mope-deploy", "torch", "timm", "transformers")},
    }
    (folder / CONFIG).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.trained_state().items()}
    # save_file would make a file that its owner alone may read.
    (folder / WEIGHTS).write_bytes(save(state, metadata={"format": "pt"}))
    tokenizer = model.preprocessing.tokenizer
    if tokenizer is not None:
        (folder / TOKENIZER).write_text(tokenizer, encoding="utf-8")
    if standalone:
        for modality, backbone in backbones.items():
            target = folder / "encoders" / modality
            backbone.save_source(target)
            if modality == "text" and tokenizer is not None:
                (target / TOKENIZER).write_text(tokenizer, encoding="utf-8")


def _put_in_place(staging: Path, folder: Path) -> None:
    if not folder.exists():
        staging.rename(folder)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
    folder.rename(aside / "old")
    staging.rename(folder)
    shutil.rmtree(aside, ignore_errors=True)


def _replaceable(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    if not any(folder.iterdir()):
        return True
    try:
        _read_config(folder)
    except CheckpointError:
        return False
    return True


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} is no checkpoint", received="no config.json", expected=f"{CONFIG} and {WEIGHTS}"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise CheckpointError(f"{path} describes no MoPE checkpoint", expected=f'"format": "{FORMAT}"')
    if description.get("schema") != SCHEMA:
        raise CheckpointError(
            f"{path} has an unknown schema",
            received=description.get("schema"),
            expected=SCHEMA,
            todo="it was written by a newer release: upgrade mope-deploy",
        )
    for key in ("encoders", "model"):
        if not isinstance(description.get(key), dict):
            raise CheckpointError(f"{path} is incomplete", expected=f"an object {key!r}")
    return description


def _read_preprocessing(folder: Path, description: Mapping[str, Any]) -> Preprocessing:
    """Preprocessing as it was in training: an encoder's hub page may change its tokenizer later."""
    file = folder / TOKENIZER
    try:
        tokenizer = file.read_text(encoding="utf-8") if file.is_file() else None
        return Preprocessing.from_dict(description.get("preprocess"), tokenizer=tokenizer)
    except (OSError, ValueError, ConfigError) as error:
        raise CheckpointError(f"{folder}: {error}") from error


def _with_sources(config: MoPEConfig, folder: Path, encoders: Mapping[str, str]) -> MoPEConfig:
    """``config`` with encoders from the caller's sources, else from the checkpoint itself where it is standalone."""
    modalities = {spec.modality for spec in config.encoders}
    unknown = sorted(encoders.keys() - modalities)
    if unknown:
        raise CheckpointError("encoders for other modalities", received=unknown, expected=sorted(modalities))

    values = config.to_dict()
    for spec in (values["main"], *values["complementary"]):
        stored = folder / "encoders" / spec["modality"]
        if spec["modality"] in encoders:
            spec["source"] = encoders[spec["modality"]]
        elif (stored / CONFIG).is_file():
            spec["source"] = f"dir:{stored}"
    return MoPEConfig.from_dict(values)
