"""Hundreds of damaged manifests, tokenizers and goldens: refused in one line, or read as what they were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.reliability.mutate import bytes_of, mutated_bytes, mutated_trees
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
    right, whole = digest_of(document), bytes_of(document)
    assert read(whole) is not None
    accepted = 0
    made = [bytes_of(tree) for _, tree in mutated_trees(document, 200, seed=1)]
    made += [data for _, data in mutated_bytes(whole, 200, seed=2)]
    for data in made:
        if read(data) is not None:
            accepted += 1
            assert digest_of(parse_json(data.decode("utf-8"))) == right
    assert accepted < len(made) // 4


def test_mutated_on_purpose_they_are_refused_or_well_formed(document: dict[str, Any]) -> None:
    """With a digest that is right, as a stranger writes it: what is accepted can be written and read again."""
    for done, tree in mutated_trees(document, 200, seed=3):
        if isinstance(tree, dict):
            try:
                tree["digest"] = digest_of(tree)
            except ValueError:  # NaN
                continue
        found = read(bytes_of(tree))
        assert found is None or found == read(bytes_of(tree)), done


def test_mutated_goldens(bundle_path: Path) -> None:
    data = (bundle_path / "golden" / "inputs.npz").read_bytes()
    for _, made in mutated_bytes(data, 300, seed=4):
        try:
            found = read_npz(made, 2**20)
        except (ValueError, OSError):
            continue
        assert sum(array.nbytes for array in found.values()) <= 2**20


@pytest.mark.parametrize("name", ["tokenizer.json", "golden/samples.jsonl"])
def test_mutated_files_of_a_bundle(bundle_copy: Path, name: str) -> None:
    data = (bundle_copy / name).read_bytes()
    for _, made in mutated_bytes(data, 15, seed=5):
        exchange(bundle_copy, name, made)
        try:
            opened = Bundle.open(bundle_copy)
            _ = opened.preprocessing
            opened.golden_samples()
        except MopeError as error:
            check_line(str(error))


def test_the_same_seed_mutates_the_same_way(document: dict[str, Any]) -> None:
    before = bytes_of(document)
    for make in (
        lambda seed: mutated_trees(document, 20, seed=seed),
        lambda seed: mutated_bytes(before, 20, seed=seed),
    ):
        first, again, other = ([str(one) for one in make(seed)] for seed in (7, 7, 8))
        assert first == again != other
    assert bytes_of(document) == before
