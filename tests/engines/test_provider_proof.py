"""ONNX Runtime on anything but the CPU proves itself by the golden samples; a stand-in is the GPU."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from mope_deploy.bundle import Bundle
from mope_deploy.engines import open_session, proof
from mope_deploy.engines.onnxruntime import session as ort
from mope_deploy.engines.onnxruntime.providers import CPU, CUDA
from mope_deploy.errors import ParityError
from tests.device import tiny
from tests.engines.built import AMPERE, rewrite

OTHER = "OpenVINOExecutionProvider"
Outputs = list[NDArray[Any]]


class Card:
    """What stands in for a GPU: what it was given, and what it makes of right outputs."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, int]] = []  # rows, tokens
        self.wrong: Callable[[Mapping[str, NDArray[Any]], Outputs], Outputs] = lambda _, outputs: outputs


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    made, real = Card(), onnxruntime.InferenceSession

    class OnTheCard(real):  # type: ignore[misc, valid-type]
        def __init__(self, path: Any, options: Any, *, providers: Any, **_: Any) -> None:
            self.names = [one if isinstance(one, str) else one[0] for one in providers]
            super().__init__(path, options, providers=[CPU])

        def get_providers(self) -> list[str]:
            return self.names

        def run(self, names: Any, feeds: Any, *more: Any) -> Outputs:
            found = super().run(names, feeds, *more)
            if self.names[0] == CPU:
                return found
            made.batches.append(feeds["input_ids"].shape)
            return made.wrong(feeds, found)

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, OTHER, CPU])
    monkeypatch.setattr(onnxruntime, "InferenceSession", OnTheCard)
    monkeypatch.setattr(ort, "Bindings", lambda *_: None)
    monkeypatch.setattr(proof, "this_device", lambda: AMPERE)
    return made


def proof_of(bundle: Bundle, provider: str = CUDA) -> Path:
    return bundle.path / "engines" / f"model.onnxruntime.{provider}.proof.json"


def runs(bundle: Bundle, card: Card, providers: Any = ("cuda",)) -> int:
    """Batches that opening a session ran."""
    card.batches.clear()
    open_session(bundle, providers=list(providers))
    return len(card.batches)


def test_once_for_a_device_a_provider_and_a_version(
    bundle: Bundle, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = len(tiny.SAMPLES)
    assert runs(bundle, card) == samples + 2
    assert card.batches[0][0] == card.batches[-1][0] == samples
    assert card.batches[-1][1] == tiny.MAX_LENGTH
    assert sorted({rows for rows, _ in card.batches}) == [1, samples]
    assert len({tokens for rows, tokens in card.batches if rows == 1}) > 2  # each without padding
    assert proof_of(bundle).is_file()
    assert runs(bundle, card) == 0
    assert runs(bundle, card, [OTHER]) > 0  # another provider
    assert runs(bundle, card, [OTHER]) == 0
    assert runs(bundle, card, [("cuda", {"device_id": 1})]) > 0  # another card
    assert runs(bundle, card) > 0
    for changes in ({"gpu": "RTX A4000"}, {"driver": "590.1"}, {"l4t": "36.4.3"}):
        monkeypatch.setattr(proof, "this_device", lambda changes=changes: dataclasses.replace(AMPERE, **changes))
        assert runs(bundle, card) > 0
        assert runs(bundle, card) == 0
    monkeypatch.setattr(proof, "library_version", lambda: "1.99")
    assert runs(bundle, card) > 0
    assert bundle.unlisted() == ()


def test_the_cpu_needs_no_proof(bundle: Bundle, card: Card) -> None:
    assert runs(bundle, card, ["cpu"]) == 0
    assert not (bundle.path / "engines").exists()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(file.read_bytes()[:-20]),
        lambda file: file.write_bytes(b"\xff" * 100),
        lambda file: file.write_text("[" * 10_000, encoding="utf-8"),
        lambda file: rewrite(file, lambda d: d.pop("device")),
        lambda file: rewrite(file, lambda d: d.update(engine_sha256="0" * 64)),
        lambda file: rewrite(file, lambda d: d.update(bundle_sha256="0" * 64)),
        lambda file: rewrite(file, lambda d: d.update(logits_error=0.5)),
        lambda file: rewrite(file, lambda d: d.update(logits_error=-1)),
        lambda file: rewrite(file, lambda d: d.update(format="mope-engine")),
    ],
)
def test_what_is_damaged_or_forged_proves_nothing(bundle: Bundle, card: Card, spoil: Callable[[Path], Any]) -> None:
    runs(bundle, card)
    spoil(proof_of(bundle))
    assert runs(bundle, card) > 0
    assert runs(bundle, card) == 0
    assert json.loads(proof_of(bundle).read_text())["logits_error"] < 1e-6
    assert [path.name for path in proof_of(bundle).parent.iterdir()] == [proof_of(bundle).name]


def test_a_folder_that_is_a_link_is_neither_read_nor_written(bundle: Bundle, card: Card, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (bundle.path / "engines").symlink_to(tmp_path / "elsewhere")
    assert runs(bundle, card) > 0
    assert runs(bundle, card) > 0
    assert list((tmp_path / "elsewhere").iterdir()) == []


def wrong_at(**sizes: int) -> Callable[[Mapping[str, NDArray[Any]], Outputs], Outputs]:
    """Logits that are half as large where rows, or tokens, are so many."""

    def wrong(feeds: Mapping[str, NDArray[Any]], outputs: Outputs) -> Outputs:
        rows, tokens = feeds["input_ids"].shape
        hit = {"rows": rows, "tokens": tokens}.items() >= sizes.items()
        return [output * np.float32(0.5) if hit and output.ndim == 2 else output for output in outputs]

    return wrong


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({}, "as stored"),
        ({"rows": 1}, "sample 0 alone"),
        ({"rows": 1, "tokens": 4}, "sample 3 alone"),
        ({"rows": len(tiny.SAMPLES), "tokens": tiny.MAX_LENGTH}, "as stored"),
    ],
)
def test_one_that_is_wrong_at_one_size_is_refused(
    bundle: Bundle, card: Card, sizes: dict[str, int], words: str
) -> None:
    card.wrong = wrong_at(**sizes)
    for _ in range(2):
        with pytest.raises(ParityError, match=rf"logits are not the golden ones; .*, {words}; "):
            open_session(bundle, providers=["cuda"])
        assert not proof_of(bundle).exists()
    session = open_session(bundle)
    assert session.device == CPU
    assert "logits are not the golden ones" in session.why
