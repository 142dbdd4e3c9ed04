"""Saving, loading, and everything that can be wrong with a checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mope_deploy.errors import CheckpointError
from mope_deploy.model import MoPE
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
    with pytest.raises(CheckpointError, match="did you mean experts"):
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
    with pytest.raises(OSError, match="no space"):
        tiny_model(vit, bert, seed=4).save_pretrained(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in saved.parent.iterdir()] == ["checkpoint"]


def test_others_may_read_what_the_umask_lets_them(saved: Path) -> None:
    modes = {path.name: path.stat().st_mode & 0o777 for path in saved.iterdir()}
    assert set(modes.values()) == {modes["config.json"]}


def test_push_to_hub_uploads_the_checkpoint(vit: Path, bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub itself is out of reach; what would be uploaded is looked at."""
    uploaded: dict[str, object] = {}

    class Api:
        def __init__(self, token: str | None = None) -> None: ...

        def create_repo(self, repo_id: str, **kwargs: object) -> object:
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, *, repo_id: str, folder_path: Path, **kwargs: object) -> str:
            uploaded["id"], uploaded["files"] = repo_id, sorted(path.name for path in Path(folder_path).iterdir())
            uploaded["card"] = (Path(folder_path) / "README.md").read_text()
            return "commit"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    assert tiny_model(vit, bert).push_to_hub("someone/model") == "commit"
    assert uploaded["id"] == "someone/model"
    assert uploaded["files"] == ["README.md", "config.json", "model.safetensors", "tokenizer.json"]
    assert "library_name: mope-deploy" in str(uploaded["card"])
