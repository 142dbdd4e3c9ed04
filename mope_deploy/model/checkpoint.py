"""A checkpoint folder: exactly the trained tensors, the configuration, and which encoder weights they belong to.

config.json          schema, encoders (source, class, fingerprint), model configuration, preprocessing, versions; hashes
                     of the tensors, of the tokenizer, and of this description itself but for where encoders are
model.safetensors    the trained tensors (and fitted statistics of y), nothing else
tokenizer.json       the text encoder's tokenizer
encoders/<modality>/ the frozen encoders, only with standalone=True
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, ValidationError
from safetensors.torch import save

from mope_deploy.errors import CheckpointError, ConfigError
from mope_deploy.fields import shown
from mope_deploy.files import json_bytes, reason, whole_folder
from mope_deploy.limits import MAX_TOKENIZER_BYTES
from mope_deploy.model.backbones import Encoder
from mope_deploy.model.build import assemble, load_encoders
from mope_deploy.model.config import MoPEConfig
from mope_deploy.model.mope import MoPE
from mope_deploy.model.strict import Strict, problems
from mope_deploy.model.tensors import fingerprint, nonfinite, read_tensors
from mope_deploy.preprocess import Preprocessing
from mope_deploy.reading import read_json, read_regular

__all__ = ["load_checkpoint", "save_checkpoint"]

FORMAT, SCHEMA = "mope-checkpoint", 2
_WITHOUT_HASHES = 1  # the schema before
CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
_VERSIONS = ("mope-deploy", "torch", "timm", "transformers")

M = TypeVar("M", bound=MoPE)


_Hash = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]


class _Recorded(Strict):
    """An encoder as it was trained on."""

    source: str
    kind: Annotated[str, Field(alias="class")]
    fingerprint: _Hash


class _Hashes(Strict):
    """What a checkpoint holds, so that nothing of it changes unseen."""

    tensors: _Hash
    tokenizer: _Hash | None
    description: _Hash


class _Description(Strict):
    """What ``config.json`` says besides its format and schema."""

    encoders: dict[str, _Recorded]
    model: MoPEConfig
    preprocess: dict[str, Any]
    versions: dict[str, Annotated[str, Field(pattern=r"^[0-9]")]]
    hashes: _Hashes | None = None  # of schema 1 alone


def save_checkpoint(model: MoPE, folder: Path, *, standalone: bool, card: str) -> None:
    """Write ``model`` to ``folder``, all or nothing.

    Raises:
        CheckpointError: if ``folder`` exists and is no checkpoint, cannot be written, or a value is not finite.
    """
    folder = folder.expanduser().resolve()
    if folder.exists() and not _replaceable(folder):
        raise CheckpointError(
            f"{folder} exists and is no checkpoint", expected="a new folder, an empty one or an earlier checkpoint"
        )
    if wrong := nonfinite(model.trained_state()):
        raise CheckpointError(
            f"values of {', '.join(wrong[:3])}", received="NaN or an infinity", expected="finite numbers"
        )
    with whole_folder(folder, error=CheckpointError) as staging:
        _write(model, staging, standalone=standalone, card=card)


def load_checkpoint(kind: type[M], folder: Path, *, encoders: Mapping[str, str]) -> M:
    """Read a checkpoint folder and build its model, in evaluation mode.

    Args:
        kind: the class to make.
        folder: the checkpoint.
        encoders: other sources for the frozen encoders, by modality.

    Raises:
        CheckpointError: if a file is missing or damaged, the tensors are not exactly the model's, or an encoder's
            weights are not those it was trained on.
        ConfigError: if an encoder cannot be loaded from its source.
    """
    values = _read_json(folder)
    description = _read_description(folder, values)
    config, preprocessing = description.model, _read_preprocessing(folder, description)
    if description.hashes is not None:  # last: what is wrong with a value says more than that one was changed
        tokenizer = preprocessing.tokenizer
        _check_hash(folder / CONFIG, _described(values), description.hashes.description)
        _check_hash(folder / TOKENIZER, tokenizer and _hash(tokenizer), description.hashes.tokenizer)
    found = _with_sources(config, folder, encoders)
    loaded = load_encoders(found)
    for spec in found.encoders:
        recorded, encoder = description.encoders[spec.modality], loaded[spec.modality].backbone.encoder
        weights = loaded[spec.modality].backbone.fingerprint()
        if weights != recorded.fingerprint:
            raise CheckpointError(
                f"the {spec.modality} encoder {spec.source} has other weights than this checkpoint was trained on",
                received=weights[:19],
                expected=recorded.fingerprint[:19],
                todo="give the original weights with encoders={…}, or use a checkpoint saved with standalone=True",
            )
        if type(encoder).__name__ != recorded.kind:
            raise CheckpointError(
                f"{folder / CONFIG}: class of the {spec.modality} encoder",
                received=shown(recorded.kind),
                expected=type(encoder).__name__,
            )
    # The sources stay those the checkpoint names: where an encoder happened to be loaded from is no part of the model.
    try:
        model = assemble(kind, config, loaded, preprocessing=preprocessing)
    except ConfigError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from error
    model.load_trained_state(read_tensors(folder / WEIGHTS, model.trained_state()))
    if description.hashes is not None:
        _check_hash(folder / WEIGHTS, fingerprint(model.trained_state()), description.hashes.tensors)
    return model


def _write(model: MoPE, folder: Path, *, standalone: bool, card: str) -> None:
    backbones: dict[str, Encoder] = {model.config.main.modality: model.main}
    backbones |= {name: encoder.backbone for name, encoder in model.complementary_encoders().items()}
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.trained_state().items()}
    tokenizer = model.preprocessing.tokenizer
    description: dict[str, Any] = {
        "encoders": {
            spec.modality: {
                "source": spec.source,
                "class": type(backbones[spec.modality].encoder).__name__,
                "fingerprint": backbones[spec.modality].fingerprint(),
            }
            for spec in model.config.encoders
        },
        "model": model.config.to_dict(),
        "preprocess": model.preprocessing.to_dict(),
        "versions": {name: version(name) for name in _VERSIONS},
    }
    hashes = {
        "tensors": fingerprint(state),
        "tokenizer": None if tokenizer is None else _hash(tokenizer),
        "description": _described(description),
    }
    whole = {"format": FORMAT, "schema": SCHEMA, **description, "hashes": hashes}
    (folder / CONFIG).write_bytes(json_bytes(whole))
    (folder / "README.md").write_text(card, encoding="utf-8")
    # save_file would make a file that its owner alone may read.
    (folder / WEIGHTS).write_bytes(save(state, metadata={"format": "pt"}))
    if tokenizer is not None:
        (folder / TOKENIZER).write_bytes(tokenizer.encode("utf-8"))
    if standalone:
        for modality, backbone in backbones.items():
            target = folder / "encoders" / modality
            backbone.save_source(target)
            if modality == "text" and tokenizer is not None:
                (target / TOKENIZER).write_text(tokenizer, encoding="utf-8")


def _replaceable(folder: Path) -> bool:
    """Whether ``folder`` is empty, or an earlier checkpoint however damaged."""
    if not folder.is_dir():
        return False
    if not any(folder.iterdir()):
        return True
    try:
        _read_json(folder)
    except CheckpointError:
        return False
    return True


def _read_json(folder: Path) -> dict[str, Any]:
    """What ``config.json`` says, of a checkpoint of this schema."""
    path = folder / CONFIG
    try:
        found = read_json(path)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} is no checkpoint", received="no config.json", expected=f"{CONFIG} and {WEIGHTS}"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from error
    if not isinstance(found, dict) or found.pop("format", None) != FORMAT:
        raise CheckpointError(f"{path} describes no MoPE checkpoint", expected=f'"format": "{FORMAT}"')
    schema = found.pop("schema", None)
    if schema not in (_WITHOUT_HASHES, SCHEMA) or isinstance(schema, bool):
        raise CheckpointError(
            f"{path} has an unknown schema",
            received=shown(schema),
            expected=SCHEMA,
            todo="it was written by a newer release: upgrade mope-deploy",
        )
    if (found.get("hashes") is not None) != (schema == SCHEMA) or ("hashes" in found and schema != SCHEMA):
        received = shown(found["hashes"]) if "hashes" in found else "none"
        raise CheckpointError(f"{path}: hashes of a checkpoint of schema {schema}", received=received)
    return found


def _read_description(folder: Path, values: dict[str, Any]) -> _Description:
    """What ``config.json`` says, every value as it must be and none left to a default."""
    path = folder / CONFIG
    try:
        found = _Description.model_validate(values)
    except ValidationError as error:
        raise CheckpointError(f"{path}: " + "; ".join(problems(error, _Description))) from error
    specs = {"main": found.model.main} | {f"complementary.{i}": s for i, s in enumerate(found.model.complementary)}
    wrong = [f"model.{key} is missing" for key in MoPEConfig.model_fields if key not in found.model.model_fields_set]
    for where, spec in specs.items():
        absent = [key for key in type(spec).model_fields if key not in spec.model_fields_set]
        wrong += [f"model.{where}.{key} is missing" for key in absent]
    sources = {modality: recorded.source for modality, recorded in found.encoders.items()}
    if sources != (expected := {spec.modality: spec.source for spec in specs.values()}):
        wrong.append(f"encoders: received {sources}, expected as in model: {expected}")
    if set(found.versions) != set(_VERSIONS):
        wrong.append(f"versions: received {', '.join(found.versions) or 'none'}, expected {', '.join(_VERSIONS)}")
    if wrong:
        raise CheckpointError(f"{path}: " + "; ".join(wrong))
    return found


def _check_hash(path: Path, found: str | None, recorded: str | None) -> None:
    if found != recorded:
        raise CheckpointError(
            f"{path} is not what was saved: it is damaged, or was changed",
            received=(found or "none")[:19],
            expected=(recorded or "none")[:19],
            todo="save the checkpoint again, or copy it again",
        )


def _hash(text: str) -> str:
    return f"sha256:{hashlib.sha256(text.encode('utf-8')).hexdigest()}"


def _described(values: Mapping[str, Any]) -> str:
    """The hash of a description in a canonical form, without itself and without where encoders are."""

    def bare(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: bare(inner) for key, inner in value.items() if key != "source"}
        return [bare(inner) for inner in value] if isinstance(value, list | tuple) else value

    return _hash(json.dumps(bare({key: values[key] for key in values if key != "hashes"}), sort_keys=True))


def _read_preprocessing(folder: Path, description: _Description) -> Preprocessing:
    """Preprocessing as it was in training: an encoder's hub page may change its tokenizer later."""
    file, config = folder / TOKENIZER, description.model
    try:
        tokenizer = read_regular(file, MAX_TOKENIZER_BYTES).decode("utf-8") if file.is_file() else None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {reason(error)}") from error
    try:
        found = Preprocessing.from_dict(description.preprocess, tokenizer=tokenizer)
    except (ValueError, ConfigError) as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from error
    read = {spec.modality for spec in config.encoders}
    if set(found.modalities) != read or found.missing != config.missing:
        raise CheckpointError(
            f"{folder / CONFIG}: preprocess is not of this model",
            received=f"{', '.join(found.modalities)} (may be missing: {', '.join(found.missing) or 'none'})",
            expected=f"{', '.join(sorted(read))} (may be missing: {', '.join(config.missing) or 'none'})",
        )
    return found


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
