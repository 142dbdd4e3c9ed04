"""A damaged ``config.json`` is one clear line, whatever is damaged: every field of it, in every way."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mope_deploy.errors import CheckpointError
from mope_deploy.model import MoPE
from tests.tiny import bert_folder, tiny_model, vit_folder

Place = tuple[str | int, ...]
WRONG: tuple[Any, ...] = (None, True, -1, 1.5, float("1e400"), "", "abc", [], {}, [[]], {"a": 1}, "\ud800", 10**400)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damage")
    vit, bert = vit_folder(folder / "vit"), bert_folder(folder / "bert")
    tiny_model(vit, bert, missing=("text",), noise=0.5, mapper_width=7).save_pretrained(folder / "checkpoint")
    return folder / "checkpoint"


def places(value: Any, at: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Every value of a JSON document and where it stands, the document itself excluded."""
    if at:
        yield at, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*at, key))


def changed(document: Any, at: Place, change: Any) -> str:
    """The document with ``change(parent, key)`` made at a place."""
    document = copy.deepcopy(document)
    parent = document
    for key in at[:-1]:
        parent = parent[key]
    change(parent, at[-1])
    return json.dumps(document)


def refused(folder: Path, text: str) -> str | None:
    """The one line that a checkpoint with this ``config.json`` is refused with; None if it loads."""
    (folder / "config.json").write_text(text)
    try:
        MoPE.from_pretrained(folder)
    except CheckpointError as error:
        return str(error)
    return None


def test_every_field_in_every_way(saved: Path) -> None:
    good = (saved / "config.json").read_text()
    document = json.loads(good)
    found = list(places(document))
    assert len(found) > 60
    loaded = set()
    for at, value in found:
        for wrong in WRONG:
            text = changed(document, at, lambda parent, key, wrong=wrong: parent.__setitem__(key, wrong))
            if type(wrong) is type(value) and wrong == value:
                continue
            line = refused(saved, text)
            if line is None:
                loaded.add((at, wrong))
            else:
                assert "\n" not in line, (at, wrong)
                named = ("config.json", "model.safetensors", "tokenizer.json")
                assert any(word in line for word in named), (at, wrong, line)
        line = refused(saved, changed(document, at, lambda parent, key: parent.pop(key)))
        assert line is not None, f"{at} may be missing"
        if isinstance(value, dict):
            line = refused(saved, changed(document, (*at, "stowaway"), lambda parent, key: parent.__setitem__(key, 1)))
            assert line is not None, f"{at} may have other keys"
            assert "stowaway" in line or at == ("encoders",) or at == ("versions",), line
    assert refused(saved, json.dumps(document | {"stowaway": 1})) is not None
    assert refused(saved, good) is None
    assert loaded == set(), "a value of the right type is not the one that was saved"
