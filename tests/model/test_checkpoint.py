"""Saving, loading, and everything that can be wrong with a checkpoint."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mope_deploy.errors import CheckpointError
from mope_deploy.limits import MAX_RECORD_BYTES
from mope_deploy.model import MoPE, checkpoint
from tests.tiny import bert_folder, tiny_inputs, tiny_model, vit_folder


@pytest.fixture
def saved(vit: Path, bert: Path, tmp_path: Path) -> Path:
    tiny_model(vit, bert).save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def logits(model: MoPE) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny_inputs()).logits


def test_statistics_of_y_travel_with_the_checkpoint(vit: Path, bert: Path, tmp_path: Path) -> None:
    model = tiny_model(vit, bert, y_norm="standardise")
    model.fit_statistics({"text": torch.randn(9, 16) * 3 + 1})
    model.save_pretrained(tmp_path / "checkpoint")
    loaded = MoPE.from_pretrained(tmp_path / "checkpoint")
    assert torch.equal(loaded.complementary["text"].y_std, model.complementary["text"].y_std)
    assert torch.equal(logits(loaded), logits(model))


def test_standalone_needs_no_other_folder(tmp_path: Path) -> None:
    vit, bert = vit_folder(tmp_path / "vit", reg_tokens=2), bert_folder(tmp_path / "bert", model_type="roberta")
    model = tiny_model(vit, bert)
    model.save_pretrained(tmp_path / "checkpoint", standalone=True)
    expected = logits(model)
    shutil.rmtree(vit)
    shutil.rmtree(bert)
    loaded = MoPE.from_pretrained(tmp_path / "checkpoint")
    assert torch.equal(logits(loaded), expected)
    assert loaded.preprocessing == model.preprocessing
    assert loaded.config == model.config, "where an encoder was stored is no part of the configuration"


def test_encoders_can_be_found_elsewhere(saved: Path, vit: Path, bert: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(vit, tmp_path / "moved")
    loaded = MoPE.from_pretrained(saved, encoders={"image": f"dir:{moved}"})
    assert torch.equal(logits(loaded), logits(tiny_model(vit, bert)))
    with pytest.raises(CheckpointError, match="audio"):
        MoPE.from_pretrained(saved, encoders={"audio": "dir:/nowhere"})


def test_other_encoder_weights_are_refused(saved: Path, tmp_path: Path) -> None:
    other = vit_folder(tmp_path / "other", seed=9)
    with pytest.raises(CheckpointError, match=r"image encoder .* other weights than this checkpoint was trained on"):
        MoPE.from_pretrained(saved, encoders={"image": f"dir:{other}"})


def test_a_missing_an_extra_and_a_misshapen_tensor_are_refused(saved: Path) -> None:
    file = saved / "model.safetensors"
    state = load_file(file)
    head = state.pop("head.classifier.bias")
    save_file(state, file)
    with pytest.raises(CheckpointError, match=r"head\.classifier\.bias"):
        MoPE.from_pretrained(saved)
    save_file(state | {"head.classifier.bias": head, "stowaway": head.clone()}, file)
    with pytest.raises(CheckpointError, match="stowaway"):
        MoPE.from_pretrained(saved)
    save_file(state | {"head.classifier.bias": head.repeat(2)}, file)
    with pytest.raises(CheckpointError, match=r"shape of head\.classifier\.bias"):
        MoPE.from_pretrained(saved)


def test_damaged_files_are_named(saved: Path) -> None:
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        MoPE.from_pretrained(saved)
    config = saved / "config.json"
    text = config.read_text()
    config.write_text(text[:50])
    with pytest.raises(CheckpointError, match=r"config\.json"):
        MoPE.from_pretrained(saved)
    config.write_text(json.dumps(json.loads(text) | {"schema": 99}))
    with pytest.raises(CheckpointError, match="newer release"):
        MoPE.from_pretrained(saved)
    config.write_text(text.replace('"experts": 5', '"expert": 5'))
    with pytest.raises(CheckpointError, match=r"did you mean model\.experts"):
        MoPE.from_pretrained(saved)


@pytest.mark.parametrize("place", ["nowhere/at/all", "./nowhere", "/nowhere"])
def test_no_checkpoint_there(place: str) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        MoPE.from_pretrained(place)


def test_saving_replaces_a_checkpoint_and_nothing_else(saved: Path, vit: Path, bert: Path, tmp_path: Path) -> None:
    tiny_model(vit, bert, seed=4).save_pretrained(saved)
    assert torch.equal(logits(MoPE.from_pretrained(saved)), logits(tiny_model(vit, bert, seed=4)))
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("ten years of work")
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        tiny_model(vit, bert).save_pretrained(precious)
    assert [path.name for path in precious.iterdir()] == ["thesis.txt"]


def test_a_failure_while_saving_leaves_the_old_checkpoint(
    saved: Path, vit: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mope_deploy.model.checkpoint as checkpoint

    def full(*args: object, **kwargs: object) -> None:
        raise OSError("no space left on device")

    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(CheckpointError, match="cannot be written; received no space"):
        tiny_model(vit, bert, seed=4).save_pretrained(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in saved.parent.iterdir()] == ["checkpoint"]


def test_others_may_read_what_the_umask_lets_them(saved: Path) -> None:
    modes = {path.name: path.stat().st_mode & 0o777 for path in saved.iterdir()}
    assert set(modes.values()) == {modes["config.json"]}


def test_push_to_hub_uploads_the_checkpoint(
    vit: Path, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub itself is out of reach; what would be uploaded is looked at."""
    uploaded: dict[str, object] = {}

    class Api:
        def __init__(self, token: str | None = None) -> None: ...

        def create_repo(self, repo_id: str, **kwargs: object) -> object:
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, *, repo_id: str, folder_path: Path, **kwargs: object) -> str:
            found = sorted(str(path.relative_to(folder_path)) for path in folder_path.rglob("*") if path.is_file())
            uploaded["id"], uploaded["files"] = repo_id, found
            uploaded["card"] = (Path(folder_path) / "README.md").read_text()
            return "commit"

    monkeypatch.setattr("mope_deploy.model.hub.HfApi", Api)
    assert tiny_model(vit, bert).push_to_hub("someone/model") == "commit"
    assert uploaded["id"] == "someone/model"
    assert uploaded["files"] == ["README.md", "config.json", "model.safetensors", "tokenizer.json"]
    assert "library_name: mope-deploy" in str(uploaded["card"])
    assert tiny_model(vit, bert).save_pretrained(tmp_path / "one", standalone=True, push_to_hub=True) == "commit"
    assert uploaded["id"] == "one"
    assert {"encoders/image/model.safetensors", "encoders/text/model.safetensors"} <= set(uploaded["files"])


def test_values_that_no_training_leaves_are_refused(saved: Path, vit: Path, bert: Path) -> None:
    """NaN, infinities, integers, booleans and halves are no trained weights, and other values not those saved."""
    file, name = saved / "model.safetensors", "head.classifier.bias"
    state = load_file(file)
    good = state[name]
    for wrong, why in (
        (torch.full_like(good, torch.nan), f"values of {name}; received NaN"),
        (torch.full_like(good, torch.inf), f"values of {name}; received NaN or an infinity"),
        (good.int(), f"type of {name}; received I32; expected float32"),
        (good > 0, f"type of {name}; received BOOL; expected float32"),
        (good.half(), f"type of {name}; received float16; expected float32"),
        (good + 1, "is not what was saved"),
    ):
        save_file(state | {name: wrong}, file)
        with pytest.raises(CheckpointError, match=why) as caught:
            MoPE.from_pretrained(saved)
        assert str(file) in str(caught.value)
    model = tiny_model(vit, bert)
    with torch.no_grad():
        model.head.classifier.bias[1] = torch.nan
    with pytest.raises(CheckpointError, match=f"values of {name}; received NaN"):
        model.save_pretrained(saved)


def test_a_header_that_lies_is_one_line(saved: Path) -> None:
    """Types, shapes, places and sizes that the bytes behind the header are not of."""
    file = saved / "model.safetensors"
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    bias = header["head.classifier.bias"]
    lies = (
        {"dtype": "I32"},
        {"dtype": "F64"},
        {"dtype": "F128"},
        {"shape": [2**40]},
        {"shape": [-3]},
        {"data_offsets": [0, 2**50]},
        {"data_offsets": [0, 12]},
    )
    for lie in lies:
        text = json.dumps(header | {"head.classifier.bias": bias | lie}).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + body)
        with pytest.raises(CheckpointError, match=r"model\.safetensors") as caught:
            MoPE.from_pretrained(saved)
        assert "\n" not in str(caught.value), lie
    file.write_bytes((2**62).to_bytes(8, "little") + data[8:])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        MoPE.from_pretrained(saved)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        MoPE.from_pretrained(saved)


def test_a_changed_tokenizer_is_refused_and_moved_encoders_are_not(saved: Path, vit: Path, tmp_path: Path) -> None:
    config = saved / "config.json"
    moved = shutil.copytree(vit, tmp_path / "moved")
    config.write_text(config.read_text().replace(str(vit), str(moved)))
    MoPE.from_pretrained(saved)
    tokenizer = saved / "tokenizer.json"
    good = tokenizer.read_text()
    tokenizer.write_text(good.replace('"red"', '"rot"'))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not what was saved"):
        MoPE.from_pretrained(saved)


def test_a_checkpoint_from_before_there_were_hashes_loads(saved: Path) -> None:
    config = saved / "config.json"
    document = json.loads(config.read_text())
    hashes = document.pop("hashes")
    config.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=r"hashes of a checkpoint of schema 2; received none"):
        MoPE.from_pretrained(saved)
    config.write_text(json.dumps(document | {"schema": 1}))
    MoPE.from_pretrained(saved)
    config.write_text(json.dumps(document | {"schema": 1, "hashes": hashes}))
    with pytest.raises(CheckpointError, match="schema 1"):
        MoPE.from_pretrained(saved)


def test_an_encoder_is_hashed_again_only_when_it_changed(
    vit: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mope_deploy.model.backbones.base as base

    asked: list[int] = []
    hashed = base.fingerprint
    monkeypatch.setattr(base, "fingerprint", lambda tensors: asked.append(len(tensors)) or hashed(tensors))
    encoder = tiny_model(vit, bert).main
    first = encoder.fingerprint()
    assert encoder.fingerprint() == first
    assert len(asked) == 1
    with torch.no_grad():
        next(encoder.encoder.parameters()).add_(1)
    assert encoder.fingerprint() != first
    assert encoder.double().fingerprint() not in (first, encoder.float().fingerprint())


def test_files_without_end_are_not_read(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as small:
        small.setattr(checkpoint, "MAX_TOKENIZER_BYTES", 100)
        with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read: too large.* at most 100$"):
            MoPE.from_pretrained(saved)
    with (saved / "config.json").open("r+b") as file:
        file.truncate(MAX_RECORD_BYTES + 1)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read: too large.* at most 67,108,864$"):
        MoPE.from_pretrained(saved)
