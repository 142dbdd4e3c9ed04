"""Without a network what is not here is one line, at once; with one the libraries are left as they were."""

from __future__ import annotations

import socket
from pathlib import Path
from threading import Event, Thread

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import logging

from mope_deploy.errors import CheckpointError, MopeError
from mope_deploy.model import EncoderSpec, MoPE, network
from mope_deploy.model.backbones import load_encoder, pooled_vision
from tests.tiny import bert_folder, tiny_model


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
    monkeypatch.setattr(network, "_answers", {})
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
        assert constants.HF_HUB_OFFLINE, "the answer stands for a while"
    monkeypatch.setattr(network, "_answers", {})
    with network.hub():
        assert not constants.HF_HUB_OFFLINE


def test_two_threads_that_overlap_leave_the_libraries_as_they_were() -> None:
    """The first one in leaves first: the second must not take what the first had set for what was there."""
    before, entered, leave = logging.get_verbosity(), Event(), Event()

    def second() -> None:
        with network.hub():
            entered.set()
            leave.wait()

    thread = Thread(target=second)
    with network.hub():
        thread.start()
        assert not entered.wait(0.2)
    leave.set()
    thread.join()
    assert (constants.HF_HUB_OFFLINE, logging.get_verbosity()) == (False, before)


def test_local_folders_ask_nobody(
    vit: Path, bert: Path, tmp_path: Path, no_network: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither for weights, nor for a tokenizer that transformers converts, nor for an image processor."""

    def refuse(*args: object, **kwargs: object) -> None:
        no_network.append(args)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    text = bert_folder(tmp_path / "bert")
    (text / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    tiny_model(vit, text).save_pretrained(tmp_path / "whole", standalone=True)
    MoPE.from_pretrained(tmp_path / "whole")
    with pytest.raises(MopeError, match="no usable image processor"):
        pooled_vision._processor(str(bert), "dir:bert")
    assert no_network == []


def test_an_unknown_name_is_not_blamed_on_the_network() -> None:
    with pytest.raises(MopeError, match="Unknown model") as caught:
        load_encoder(EncoderSpec(modality="image", source="timm:no_such_architecture"))
    assert caught.value.exit_code == 2
