"""What stands beside an encoder of sound or video about its inputs, wherever transformers has saved it.

Up to its release 4 that was ``preprocessor_config.json``; since then a processor is one ``processor_config.json`` with
an object for each of its parts. The order in which they count is the library's own. Where there is none, nothing is
guessed: another rate or scale is another input, and the encoder's features are of something else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from mope_deploy.errors import ConfigError
from mope_deploy.fields import shown
from mope_deploy.model.backbones.sources import PREPROCESSOR, beside, read_json
from mope_deploy.model.strict import problems

__all__ = ["ProcessorValues", "processor_values"]

_WHOLE = "processor_config.json"
# For each modality the places in their order: a file, and the key of the part in it where it holds several.
_PLACES: dict[str, tuple[tuple[str, str | None], ...]] = {
    "audio": ((_WHOLE, "feature_extractor"), (_WHOLE, "audio_processor"), (PREPROCESSOR, None)),
    "video": (
        (_WHOLE, "video_processor"),
        ("video_preprocessor_config.json", None),
        (_WHOLE, "image_processor"),
        (PREPROCESSOR, None),
    ),
}


class ProcessorValues(BaseModel):
    """Values of a part that are read; of its many others none changes what an encoder reads."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", allow_inf_nan=False)


V = TypeVar("V", bound=ProcessorValues)


class Found(NamedTuple):
    """A part as its file has it, and the file."""

    values: dict[str, Any]
    file: Path


def processor_values(location: str, source: str, *, modality: str, kind: type[V]) -> tuple[V, dict[str, Any]]:
    """The values of the encoder's processor, and all that its file says of that part.

    Args:
        location: folder or hub id of the encoder.
        source: of the encoder, for messages.
        modality: ``"audio"`` or ``"video"``.
        kind: the values that are read, with the library's own defaults.

    Raises:
        ConfigError: there is no such file, it is damaged, or a value is not of its type; or the hub cannot be asked.
    """
    found = _find(location, modality)
    if found is None:
        files = dict.fromkeys(file for file, _ in _PLACES[modality])
        raise ConfigError(
            f"no processor beside {source}: how its inputs are prepared is not known",
            expected=" or ".join(files),
            todo="put it into the encoder's folder; save_pretrained of its processor writes it",
        )
    try:
        return kind.model_validate(found.values), found.values
    except ValidationError as error:
        raise ConfigError(f"{found.file}: " + "; ".join(problems(error, kind))) from error


def _find(location: str, modality: str) -> Found | None:
    for file, key in _PLACES[modality]:
        path = beside(location, file)
        if path is None:
            continue
        values = read_json(path)
        if key is not None and key not in values:
            continue
        part = values if key is None else values[key]
        if not isinstance(part, dict):
            raise ConfigError(f"{path}: {key}", received=shown(part), expected="an object")
        return Found(part, path)
    return None
