"""Tokenizers beside an encoder: the ids that transformers gives, and none that the encoder has no row for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoTokenizer, BertTokenizerFast, RobertaTokenizerFast

from export.graph.exporter_config import MoPEGraph
from mope_deploy.errors import ConfigError
from mope_deploy.model import EncoderSpec
from mope_deploy.model.backbones import FrozenEncoder, load_encoder, tokenizers
from mope_deploy.model.backbones.exported.dry import check_traceable
from tests.tiny import WORDS, bert_folder, tiny_model, vit_folder

TEXT = "The RED cárd 七"


def load(folder: Path, **spec: Any) -> FrozenEncoder:
    return load_encoder(EncoderSpec(modality="text", source=f"dir:{folder}", **spec))


def refused(folder: Path, **spec: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(folder, **spec)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def ids(frozen: FrozenEncoder, text: str) -> list[int]:
    assert frozen.tokenizer is not None
    return Tokenizer.from_str(frozen.tokenizer).encode(text).ids


def words(tmp_path: Path, *vocabulary: str, rows: int) -> Path:
    """A BERT of so many rows with a ``vocab.txt``."""
    made = bert_folder(tmp_path / "bert", vocab_size=rows)
    (made / "tokenizer.json").unlink()
    (made / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    return made


def settings(folder: Path, **changes: object) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_token_that_stands_twice_leaves_a_hole_and_its_word_predicts(tmp_path: Path) -> None:
    """Counting the vocabulary gives 13 ids of 14 rows; the highest is 13."""
    made = words(tmp_path, *WORDS[:7], "red", *WORDS[7:], rows=14)
    frozen = load(made)
    assert frozen.tokenizer is not None
    assert Tokenizer.from_str(frozen.tokenizer).get_vocab_size() == 13
    assert max(ids(frozen, " ".join(WORDS[5:]))) == 13
    model = tiny_model(vit_folder(tmp_path / "vit"), made)
    assert MoPEGraph.of(model).vocab_size == 14
    inputs = model.preprocessing.encode_text(["two seven"])
    with torch.no_grad():
        y = model.encode_complementary({name: torch.from_numpy(value) for name, value in inputs.items()})
    assert y["text"].isfinite().all()


def test_more_ids_than_rows_are_refused_naming_both(tmp_path: Path) -> None:
    made = bert_folder(tmp_path / "bert")
    tokenizer = Tokenizer.from_file(str(made / "tokenizer.json"))
    tokenizer.add_tokens(["new", "words"])
    tokenizer.save(str(made / "tokenizer.json"))
    assert "more ids than the encoder has rows; received ids 0 to 14; expected ids 0 to 12" in refused(made)


@pytest.mark.parametrize(
    "change", [{"do_lower_case": False}, {"strip_accents": False}, {"tokenize_chinese_chars": False}]
)
def test_what_tokenizer_config_says_against_tokenizer_json_is_obeyed(change: dict[str, bool], tmp_path: Path) -> None:
    made = words(tmp_path, *WORDS, "The", "RED", "cárd", "card", "七", rows=20)
    BertTokenizerFast.from_pretrained(made).save_pretrained(made)
    before = load(made)
    assert before.tokenizer == (made / "tokenizer.json").read_text()
    settings(made, **change)
    found = load(made)
    assert ids(found, TEXT) == AutoTokenizer.from_pretrained(made)(TEXT)["input_ids"]
    if "tokenize_chinese_chars" not in change:
        assert ids(found, TEXT) != ids(before, TEXT)


def test_a_leading_space_is_added_where_tokenizer_config_says_so(tmp_path: Path) -> None:
    made = bert_folder(tmp_path / "roberta", model_type="roberta", vocab_size=20)
    (made / "tokenizer.json").unlink()
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "r", "e", "d", "Ġ"]
    (made / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (made / "merges.txt").write_text("#version: 0.2\n")
    RobertaTokenizerFast.from_pretrained(made).save_pretrained(made)
    before = ids(load(made), "red")
    settings(made, add_prefix_space=True)
    after = ids(load(made), "red")
    assert after == AutoTokenizer.from_pretrained(made)("red")["input_ids"]
    assert after != before


def test_files_that_cannot_both_be_obeyed_are_refused(tmp_path: Path) -> None:
    made = bert_folder(tmp_path / "bert")
    (made / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    line = refused(made)
    assert "contradict each other; received WordLevel in the one, BertTokenizer in the other" in line
    settings(made, tokenizer_class="PreTrainedTokenizerFast")
    assert load(made).tokenizer == (made / "tokenizer.json").read_text()
    settings(made, truncation_side="left")
    assert "truncation_side; received 'left'" in refused(made)
    (made / "tokenizer_config.json").write_text("{")
    assert "tokenizer_config.json cannot be read as JSON" in refused(made)
    (made / "tokenizer_config.json").unlink()
    for damaged in ("{", "[]", '{"model": 5}', "\ufeff"):
        (made / "tokenizer.json").write_text(damaged)
        assert "tokenizer" in refused(made)


def test_the_longest_text_is_what_tokenizer_config_says_unless_more_is_asked_for(tmp_path: Path) -> None:
    made = bert_folder(tmp_path / "bert")
    longest = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 17}
    (made / "tokenizer_config.json").write_text(json.dumps(longest))
    assert load(made).preprocess.max_length == 17
    assert load(made, max_length=30).preprocess.max_length == 30
    settings(made, model_max_length=int(1e30))
    assert load(made).preprocess.max_length == 40


@pytest.mark.parametrize("value", ["absent", None, -1])
@pytest.mark.parametrize("model_type", ["bert", "gpt2"])
def test_an_encoder_without_an_id_of_padding_loads(model_type: str, value: Any, tmp_path: Path) -> None:
    """Padding is masked: which id stands there changes nothing."""
    sizes = {} if model_type == "bert" else {"n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 40}
    made = bert_folder(tmp_path / "encoder", model_type=model_type, **sizes)
    config = json.loads((made / "config.json").read_text())
    config |= {"pad_token_id": value}
    if value == "absent":
        del config["pad_token_id"]
    (made / "config.json").write_text(json.dumps(config))
    assert load(made).preprocess.pad_id == 0


def test_positions_that_are_counted_from_no_id_are_refused(tmp_path: Path) -> None:
    made = bert_folder(tmp_path / "roberta", model_type="roberta")
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(config | {"pad_token_id": None}))
    assert "pad_token_id None" in refused(made)


def test_an_encoder_that_no_graph_can_be_made_of_is_refused_when_it_is_loaded(tmp_path: Path) -> None:
    """Longformer branches on the values of its mask: an export would say so, after the training."""
    made = bert_folder(tmp_path / "longformer", model_type="longformer", attention_window=8, max_position_embeddings=44)
    line = refused(made, max_length=40)
    assert "cannot be exported: GuardOnDataDependentSymNode" in line
    assert "received LongformerModel" in line


class Picking(nn.Module):
    """The largest of each group of features, by an operator that no target takes."""

    def forward(self, x: Tensor) -> Tensor:
        groups = torch.arange(x.shape[1]).expand(x.shape[0], -1) // 2
        return torch.zeros(x.shape[0], 3).scatter_reduce(1, groups, x, "amax")


def test_operators_that_no_target_takes_are_refused() -> None:
    module = Picking()
    with pytest.raises(ConfigError, match=r"it calls aten\.scatter_reduce; received Picking"):
        check_traceable(module, lambda x: module(x), {"x": torch.zeros(2, 6)}, "dir:picking")
    check_traceable(nn.Linear(6, 2), lambda x: x + 1, {"x": torch.zeros(2, 6)}, "dir:linear")


def test_rows_that_hold_no_number_are_refused_too(tmp_path: Path) -> None:
    made = bert_folder(tmp_path / "bert")
    state, name = load_file(made / "model.safetensors"), "embeddings.word_embeddings.weight"
    state[name][12] = torch.nan
    save_file(state, made / "model.safetensors", metadata={"format": "pt"})
    assert f"values of {name}" in refused(made)


def test_rules_that_no_device_takes_are_refused_before_the_library_has_them(tmp_path: Path) -> None:
    made = bert_folder(tmp_path / "bert")
    document = json.loads((made / "tokenizer.json").read_text())
    doubling = {"type": "Replace", "pattern": {"String": "e"}, "content": "ee"}
    document["normalizer"] = {"type": "Sequence", "normalizers": [doubling] * 20}
    (made / "tokenizer.json").write_text(json.dumps(document))
    assert f"the tokenizer of dir:{made}: tokenizer.json: rules; received texts up to 128 times" in refused(made)


def test_a_tokenizer_without_end_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = bert_folder(tmp_path / "bert")
    monkeypatch.setattr(tokenizers, "MAX_TOKENIZER_BYTES", 100)
    assert "tokenizer.json cannot be read: too large" in refused(made)
