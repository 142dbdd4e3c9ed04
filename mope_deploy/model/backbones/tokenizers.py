"""A text encoder's tokenizer as one ``tokenizer.json``, which gives the ids that transformers gives.

``tokenizer.json`` is not always all: what ``tokenizer_config.json`` beside it says (letter case, accents, a leading
space, special tokens) counts for transformers, and so it does here. Slow-only tokenizers are converted by transformers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from mope_deploy.errors import ConfigError, MopeError
from mope_deploy.fields import shown
from mope_deploy.files import reason
from mope_deploy.limits import MAX_TOKENIZER_BYTES
from mope_deploy.model.backbones.sources import beside, quiet_transformers, read_json, unloadable
from mope_deploy.model.network import hub, offline_reason
from mope_deploy.preprocess.rules import check_rules
from mope_deploy.reading import read_regular

__all__ = ["LoadedTokenizer", "load_tokenizer"]

_OWN, _CONFIG = "tokenizer.json", "tokenizer_config.json"
_SLOW_VOCABULARIES = ("vocab.txt", "vocab.json", "sentencepiece.bpe.model", "spiece.model", "spm.model")
_NO_LIMIT = 1 << 20  # what transformers writes where there is none is far beyond
_DECIDES_IDS = ("normalizer", "pre_tokenizer", "post_processor", "model", "added_tokens")


@dataclass(frozen=True)
class LoadedTokenizer:
    """A tokenizer.

    Attributes:
        json: the text of its ``tokenizer.json``.
        ids: its highest id and 1. Its vocabulary may have holes, and one token twice: counting says less.
        longest: tokens of the longest text it was made for, None where it does not say.
    """

    json: str
    ids: int
    longest: int | None


def load_tokenizer(location: str, source: str) -> LoadedTokenizer:
    """The tokenizer of the encoder at ``location``, a folder or hub id.

    Raises:
        ConfigError: there is none, it is damaged or too large, its rules could take all memory or all time, or its
            files contradict each other in what cannot be obeyed.
        MopeError: it could not be fetched for want of a network.
    """
    own, path = beside(location, _OWN), beside(location, _CONFIG)
    settings = {} if path is None else read_json(path)
    if settings.get("truncation_side", "right") != "right":
        raise ConfigError(
            f"{path}: truncation_side",
            received=shown(settings["truncation_side"]),
            expected="'right': long texts are cut at their end",
            todo="change it there if that will do",
        )
    text = _checked(_read(own), source) if own is not None else None
    if text is None or settings:
        text = _checked(_as_transformers(location, source, text), source)
    try:
        highest = max(Tokenizer.from_str(text).get_vocab(with_added_tokens=True).values(), default=-1)
    except Exception as error:  # the library's errors are bare Exceptions
        raise ConfigError(f"the tokenizer of {source} cannot be read: {reason(error)}") from error
    longest = settings.get("model_max_length")
    known = isinstance(longest, int) and not isinstance(longest, bool) and 3 <= longest < _NO_LIMIT
    return LoadedTokenizer(text, highest + 1, longest if known else None)


def _read(path: Path) -> str:
    try:
        return read_regular(path, MAX_TOKENIZER_BYTES).decode("utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {reason(error)}") from error


def _checked(text: str, source: str) -> str:
    """``text`` if a device would take its rules; asked before the library gets it, here as there."""
    try:
        check_rules(text)
    except ConfigError as error:
        raise ConfigError(f"the tokenizer of {source}: {error}") from error
    return text


def _as_transformers(location: str, source: str, own: str | None) -> str:
    """The tokenizer that transformers makes of all files; ``own`` where that gives the same ids."""
    folder = Path(location)
    # Given a folder without any vocabulary, transformers makes up a tokenizer of special tokens alone.
    if own is None and folder.is_dir() and not any((folder / name).is_file() for name in _SLOW_VOCABULARIES):
        raise ConfigError(
            f"no tokenizer beside {source}",
            received=f"{folder} without one",
            expected=f"{_OWN} or {', '.join(_SLOW_VOCABULARIES)}",
        )
    from transformers import AutoTokenizer

    try:
        with quiet_transformers(), hub(local=folder.is_dir()):
            made = AutoTokenizer.from_pretrained(location, trust_remote_code=False)
            text: str = made.backend_tokenizer.to_str()
    except Exception as error:  # transformers raises anything from OSError to AttributeError here
        raise _unusable(source, error, own) from error
    if own is None:
        return text
    ours, theirs = _parts(own, source), _parts(text, source)
    if ours == theirs:
        return own
    if ours["model"].get("type") != theirs["model"].get("type"):
        raise ConfigError(
            f"{_OWN} and {_CONFIG} of {source} contradict each other",
            received=f"{ours['model'].get('type')} in the one, {type(made).__name__} in the other",
            expected="one tokenizer",
            todo=f'where {_OWN} is right, set "tokenizer_class": "PreTrainedTokenizerFast" in {_CONFIG}',
        )
    return text


def _parts(text: str, source: str) -> dict[str, Any]:
    """What decides about ids; of the model also its type where an older file leaves it out."""
    try:
        found = json.loads(text)
        return {key: found.get(key) for key in _DECIDES_IDS} | {"model": dict(found["model"])}
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"the {_OWN} of {source} cannot be read: {reason(error)}") from error


def _unusable(source: str, error: Exception, own: str | None) -> MopeError:
    if offline_reason(error) is not None:
        return unloadable(source, error)
    todo = f"put its {_OWN} into the encoder's folder"
    if own is not None:
        todo = f"where its {_OWN} is right, take its {_CONFIG} away"
    elif find_spec("sentencepiece") is None:
        todo += ", or run: pip install sentencepiece (it converts tokenizers published as a .model file)"
    what = next((line for line in str(error).splitlines() if line.strip()), "")[:200]
    return ConfigError(f"no usable tokenizer beside {source}: {type(error).__name__}: {what}", todo=todo)
