"""Hundreds of damaged manifests, tokenizers and goldens: refused in one line, or read as what they were."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from benchmarks.reliability.mutate import mutate_bytes, mutate_json
from mope_deploy.bundle import Bundle
from mope_deploy.errors import BundleError, MopeError, printable
from mope_deploy.fields import parse_json
from mope_deploy.manifest import digest_of, read_manifest
from mope_deploy.reading import read_npz
from tests.device.damage import exchange

pytestmark = pytest.mark.device


@pytest.fixture(scope="module")
def document(bundle_path: Path) -> dict[str, Any]:
    return json.loads((bundle_path / "manifest.json").read_text(encoding="utf-8"))


def read(data: bytes) -> object | None:
    """The manifest in some bytes; None where it is refused, in one printable line."""
    try:
        return read_manifest(data.decode("utf-8"), "manifest.json")
    except UnicodeDecodeError:
        return None  # Bundle.open says so: tests/device/test_manifest.py
    except BundleError as error:
        check_line(str(error))
        return None


def check_line(message: str) -> None:
    assert "\n" not in message
    assert message == printable(message)
    assert len(message) < 2_000


def test_mutated_manifests_are_refused_or_the_same(document: dict[str, Any]) -> None:
    right, whole, random = digest_of(document), json.dumps(document), Random(1)
    assert read(whole.encode()) is not None
    made = [mutate_json(whole, random).encode("utf-8", "surrogatepass") for _ in range(200)]
    made += [mutate_bytes(whole.encode(), random) for _ in range(200)]
    accepted = 0
    for data in made:
        if read(data) is not None:
            accepted += 1
            assert digest_of(parse_json(data.decode("utf-8"))) == right
    assert accepted < len(made) // 4


def test_mutated_on_purpose_they_are_never_another_exception(document: dict[str, Any]) -> None:
    """With a digest that is right, as a stranger writes it: refused in one printable line, or read."""
    whole, random, sealed = json.dumps(document), Random(2), 0
    for _ in range(150):
        try:
            tree = json.loads(mutate_json(whole, random))
            tree["digest"] = digest_of(tree)
        except (ValueError, TypeError, AttributeError, RecursionError):
            continue  # no JSON, or nothing that has a digest: as above
        sealed += 1
        read(json.dumps(tree).encode())
    assert sealed > 75


def test_mutated_goldens(bundle_path: Path) -> None:
    data, random = (bundle_path / "golden" / "inputs.npz").read_bytes(), Random(3)
    for _ in range(300):
        try:
            found = read_npz(mutate_bytes(data, random), 2**20)
        except (ValueError, OSError):
            continue
        assert sum(array.nbytes for array in found.values()) <= 2**20


@pytest.mark.parametrize("name", ["tokenizer.json", "golden/samples.jsonl"])
def test_mutated_files_of_a_bundle(bundle_copy: Path, name: str) -> None:
    data, random = (bundle_copy / name).read_bytes(), Random(4)
    for _ in range(15):
        exchange(bundle_copy, name, mutate_bytes(data, random))
        try:
            opened = Bundle.open(bundle_copy)
            _ = opened.preprocessing
            opened.golden_samples()
        except MopeError as error:
            check_line(str(error))
