"""The encoders that ship with the project: they load, are small, and know what they were taught and no more."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from tokenizers import Tokenizer
from transformers import AutoModel, AutoTokenizer

import mope_deploy
from mope_deploy.console import run_app
from mope_deploy.errors import CheckpointError, UsageError
from train.embedded.digits_ve.scenes import COLOURS, load_split, render, sample_scenes
from train.embedded.digits_ve.sentences import CLAIMS, PHRASES
from train.embedded.pretrain import cli
from train.embedded.pretrain.bert import pretrain_bert
from train.embedded.pretrain.save import save_folder
from train.embedded.pretrain.vit import pretrain_vit

EMBEDDED = Path(mope_deploy.__file__).parent / "model" / "backbones" / "embedded"
VIT, BERT = EMBEDDED / "digits-ve-vit", EMBEDDED / "digits-ve-bert"


@pytest.fixture(scope="module")
def vit() -> torch.nn.Module:
    return timm.create_model(f"local-dir:{VIT}", num_classes=0, pretrained=True).eval()


@pytest.fixture(scope="module")
def bert() -> torch.nn.Module:
    return AutoModel.from_pretrained(BERT).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(BERT / "tokenizer.json"))
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id("[PAD]"))
    return tokenizer


def test_both_together_are_small() -> None:
    sizes = {path: path.stat().st_size for path in EMBEDDED.rglob("*") if path.is_file()}
    assert {path.name for path in VIT.iterdir()} == {"config.json", "model.safetensors"}
    assert {path.name for path in BERT.iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert sum(sizes.values()) <= 6_000_000


# --- image -----------------------------------------------------------------------------------------------------------


def test_vit_is_what_the_file_holds(vit) -> None:
    stored, loaded = load_file(VIT / "model.safetensors"), vit.state_dict()
    assert set(stored) == set(loaded)
    assert all(torch.equal(stored[name].float(), loaded[name]) for name in stored)
    assert {tensor.dtype for tensor in loaded.values()} == {torch.float32}
    data = timm.data.resolve_model_data_config(vit)
    assert data["input_size"] == (3, 64, 64)
    assert data["crop_pct"] == 1.0
    assert data["interpolation"] == "bicubic"
    assert (vit.embed_dim, len(vit.blocks), vit.patch_embed.num_patches, vit.has_class_token) == (128, 4, 16, True)


def _scenes(split: str, count: int, seed: int, vit) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Class tokens (n, 128), patches by slot (n, 4, 512), digits (n, 4) and colours (n, 4) of scenes."""
    digits, rng = load_split(split), np.random.default_rng(seed)
    scenes = sample_scenes(count, digits, rng)
    pixels = torch.from_numpy(render(scenes, digits, rng)).permute(0, 3, 1, 2).float() / 255
    cfg = vit.pretrained_cfg
    mean, std = (torch.tensor(cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        tokens = vit.forward_features((pixels - mean) / std).numpy()
    slots = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]  # row-major patches of a 4×4 grid
    by_slot = np.stack([tokens[:, 1:][:, slot].reshape(count, -1) for slot in slots], axis=1)
    return tokens[:, 0], by_slot, scenes.digit, scenes.colour


def _probe(train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]) -> float:
    """Accuracy of a linear reading."""
    mean, spread = train[0].mean(0), train[0].std(0) + 1e-6
    model = LogisticRegression(max_iter=100, C=0.1).fit((train[0] - mean) / spread, train[1])
    return float((model.predict((test[0] - mean) / spread) == test[1]).mean())


def test_vit_patches_know_their_slot_even_in_unseen_handwriting(vit) -> None:
    (_, train, train_digit, train_colour), (_, test, digit, colour) = (
        _scenes("train", 800, 1, vit),
        _scenes("test", 500, 2, vit),
    )
    shown, seen = train_digit >= 0, digit >= 0
    assert _probe((train[shown], train_digit[shown]), (test[seen], digit[seen])) > 0.88
    assert (
        _probe((train[train_colour >= 0], train_colour[train_colour >= 0]), (test[colour >= 0], colour[colour >= 0]))
        > 0.99
    )


def test_vit_class_token_knows_sets_and_less_than_the_patches_which_digit_is_on_which_card(vit) -> None:
    (train, _, train_digit, train_colour), (test, _, digit, colour) = (
        _scenes("train", 4000, 3, vit),
        _scenes("test", 1000, 4, vit),
    )
    of_set = [
        _probe((train, (train_digit == n).any(1)), (test, (digit == n).any(1))) for n in (0, 4, 8)
    ]  # the majority answer, "absent", is right 75 % of the time
    assert np.mean(of_set) > 0.9

    def on_red(digits: np.ndarray, colours: np.ndarray) -> np.ndarray:
        return np.where(colours == 0, digits, -9).max(1)

    known = on_red(train_digit, train_colour) >= 0, on_red(digit, colour) >= 0
    bound = _probe(
        (train[known[0]], on_red(train_digit, train_colour)[known[0]]),
        (test[known[1]], on_red(digit, colour)[known[1]]),
    )
    # Guessing among the two or three visible digits is right in 39 %, the patches of the red card in 95 %. A class
    # token that knew as much would leave fusion nothing to do; what it does know docs/digits-ve.md states.
    assert 0.3 < bound < 0.9


# --- text ------------------------------------------------------------------------------------------------------------


def test_bert_is_what_the_file_holds(bert) -> None:
    stored, loaded = load_file(BERT / "model.safetensors"), bert.state_dict()
    assert set(stored) == set(loaded)
    assert all(torch.equal(stored[name].float(), loaded[name]) for name in stored)
    assert {tensor.dtype for tensor in loaded.values()} == {torch.float32}
    assert (bert.config.hidden_size, bert.config.num_hidden_layers) == (128, 3)


def test_tokenizer_knows_every_sentence(tokenizer: Tokenizer, bert) -> None:
    unknown = tokenizer.token_to_id("[UNK]")
    longest = 0
    for template, phrases in PHRASES.items():
        for phrase in phrases:
            for claim in range(len(CLAIMS[template])):
                encoded = tokenizer.encode(phrase.fill((claim % 6, (claim + 1) % 6), claim))
                assert unknown not in encoded.ids, encoded.tokens
                longest = max(longest, len(encoded.ids))
    assert longest <= bert.config.max_position_embeddings
    assert tokenizer.get_vocab_size() == bert.config.vocab_size
    assert all(tokenizer.encode(colour).tokens[1] == colour for colour in COLOURS)


def test_tokenizer_details(tokenizer: Tokenizer) -> None:
    encoded = tokenizer.encode("The RED card shows, naturally, a 3.")
    assert encoded.tokens == ["[CLS]", "the", "red", "card", "shows", "[UNK]", "[UNK]", "[UNK]", "a", "3", ".", "[SEP]"]
    assert [tokenizer.token_to_id(t) for t in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")] == [0, 1, 2, 3, 4]


def test_transformers_reads_the_same_tokenizer(tokenizer: Tokenizer) -> None:
    texts = ["The red card shows the number three.", "The blue card is above the green card."]
    ours = tokenizer.encode_batch(texts)
    theirs = AutoTokenizer.from_pretrained(BERT)(texts, padding=True)
    assert set(theirs) == {"input_ids", "attention_mask"}
    assert theirs["input_ids"] == [one.ids for one in ours]
    assert theirs["attention_mask"] == [one.attention_mask for one in ours]


def test_bert_class_token_says_what_the_sentence_says(bert, tokenizer: Tokenizer) -> None:
    rng = np.random.default_rng(0)
    texts, colours, claims = [], [], []
    for _ in range(800):
        phrase = PHRASES["identity"][rng.integers(len(PHRASES["identity"]))]
        colour, claim = int(rng.integers(6)), int(rng.integers(10))
        texts.append(phrase.fill((colour,), claim))
        colours.append(colour)
        claims.append(claim)
    encoded = tokenizer.encode_batch(texts)
    with torch.no_grad():
        states = bert(
            input_ids=torch.tensor([one.ids for one in encoded]),
            attention_mask=torch.tensor([one.attention_mask for one in encoded]),
        ).last_hidden_state
    token = states[:, 0].numpy()
    for said in (np.array(colours), np.array(claims)):
        assert _probe((token[:500], said[:500]), (token[500:], said[500:])) > 0.99


# --- making them anew ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pretrain", [pretrain_vit, pretrain_bert])
def test_pretraining_gives_the_same_weights_twice(tmp_path: Path, pretrain) -> None:
    amount = {"scenes": 96} if pretrain is pretrain_vit else {"sentences": 96}
    for name in ("one", "two"):
        pretrain(tmp_path / name, batch=32, seed=5, **amount)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two
    shipped = VIT if pretrain is pretrain_vit else BERT
    assert set(one) == {path.name for path in shipped.iterdir()}
    # All but the weights is what ships: the scripts here made it.
    for name in set(one) - {"model.safetensors"}:
        ours, theirs = json.loads(one[name]), json.loads((shipped / name).read_bytes())
        assert {k: v for k, v in ours.items() if k != "transformers_version"} == {
            k: v for k, v in theirs.items() if k != "transformers_version"
        }
    shapes = {name: tensor.shape for name, tensor in load_file(shipped / "model.safetensors").items()}
    assert {name: tensor.shape for name, tensor in load_file(tmp_path / "one" / "model.safetensors").items()} == shapes


def test_an_interrupt_leaves_the_old_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretrain_vit(tmp_path / "vit", scenes=64, batch=32)
    before = (tmp_path / "vit" / "model.safetensors").read_bytes()

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("train.embedded.pretrain.vit._evaluate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pretrain_vit(tmp_path / "vit", scenes=64, batch=32, seed=1)
    assert [path.name for path in tmp_path.iterdir()] == ["vit"]
    assert (tmp_path / "vit" / "model.safetensors").read_bytes() == before


def test_a_folder_of_something_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="exists and is not an encoder's folder"):
        pretrain_vit(tmp_path, scenes=64, batch=32)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_folder(tmp_path / "file" / "vit", {}, {"w": torch.zeros(1)})


def test_command_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_app(cli.app, ["bert", "--out", str(tmp_path / "bert"), "--sentences", "128", "--seed", "2"]) == 0
    assert "read linearly: sentence 0." in capfd.readouterr().out
    assert (tmp_path / "bert" / "tokenizer.json").is_file()
    assert run_app(cli.app, ["vit", "--out", str(tmp_path / "vit"), "--scenes", "5"]) == 2
    assert "--scenes is too small; received 5" in capfd.readouterr().err
    assert not (tmp_path / "vit").exists()
