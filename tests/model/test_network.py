"""Without a network what is not here is one line, at once; with one the libraries are left as they were."""

from __future__ import annotations

import socket

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import logging

from mope_deploy.errors import CheckpointError, MopeError
from mope_deploy.model import EncoderSpec, MoPE, network
from mope_deploy.model.backbones import load_encoder


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Every connection is refused, and counted; nothing is in the cache."""
    asked: list[object] = []

    def refuse(address: object, *args: object, **kwargs: object) -> None:
        asked.append(address)
        raise ConnectionRefusedError("no network")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(network, "getproxies", dict)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return asked


@pytest.mark.parametrize(
    ("modality", "source"),
    [
        ("image", "timm:vit_tiny_patch16_224.augreg_in21k"),
        ("text", "hf:nobody/no-such-encoder"),
        ("text", "hf:none-such"),
    ],
)
def test_an_encoder_of_the_hub(
    modality: str, source: str, no_network: list[object], capfd: pytest.CaptureFixture
) -> None:
    with pytest.raises(MopeError, match=f"{source} could not be loaded: it was not fetched before, and") as caught:
        load_encoder(EncoderSpec(modality=modality, source=source))
    assert caught.value.exit_code == 1
    assert "cannot be reached; without network use dir:PATH" in str(caught.value)
    assert len(no_network) == 1, "asked once"
    assert "".join(capfd.readouterr()) == ""


def test_a_checkpoint_of_the_hub(no_network: list[object]) -> None:
    with pytest.raises(CheckpointError, match=r"it was not fetched before, and .* cannot be reached"):
        MoPE.from_pretrained("nobody/no-such-checkpoint")
    assert len(no_network) == 1


def test_the_libraries_are_left_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    before = logging.get_verbosity()
    with network.hub():
        assert constants.HF_HUB_OFFLINE
    assert not constants.HF_HUB_OFFLINE
    assert logging.get_verbosity() == before
    monkeypatch.setattr(socket, "create_connection", lambda *args, **kwargs: socket.socket())
    with network.hub():
        assert not constants.HF_HUB_OFFLINE


def test_an_unknown_name_is_not_blamed_on_the_network() -> None:
    with pytest.raises(MopeError, match="Unknown model") as caught:
        load_encoder(EncoderSpec(modality="image", source="timm:no_such_architecture"))
    assert caught.value.exit_code == 2
