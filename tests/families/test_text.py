"""What holds of text encoders alone: prompts without a position, windows, tables of positions, tokenizers, folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import DebertaV2Config
from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention, build_relative_position

from mope_deploy.errors import ConfigError
from mope_deploy.model import EncoderSpec, MoPE
from mope_deploy.model.backbones import LayeredEncoder, load_encoder
from mope_deploy.model.backbones.deberta import DebertaEncoder, table_rows
from mope_deploy.model.backbones.modernbert import ModernBertEncoder
from tests.families.conftest import inputs_of
from tests.families.table import FAMILIES, Family, by_name
from tests.families.test_family import close, double, run_oracle
from tests.tiny import WORDS, bert_folder, tiny_inputs

TEXTS = tuple(family for family in FAMILIES if family.modality == "text")
texts = pytest.mark.parametrize("family", TEXTS, ids=lambda family: family.name)
prompted = pytest.mark.parametrize("family", [row for row in TEXTS if row.main], ids=lambda family: family.name)
Folders = Callable[[Family], Path]


def backbone_of(folder: Path, **spec: Any) -> LayeredEncoder:
    """A tiny encoder, in float64."""
    return load_encoder(EncoderSpec(modality="text", source=f"dir:{folder}", **spec)).backbone.double()


def text_inputs(batch: int, length: int) -> dict[str, Tensor]:
    """Padded texts alone."""
    inputs = tiny_inputs(batch, length)
    del inputs["pixel_values"]
    return inputs


def run_layers(backbone: LayeredEncoder, inputs: dict[str, Tensor], prompts: Tensor | None = None) -> Tensor:
    """The pooled feature, each layer with the same prompts."""
    with torch.no_grad():
        x, mask = backbone.embed(inputs)
        for i in range(backbone.depth):
            x = backbone.layer(i, x, None if prompts is None else prompts.expand(len(x), -1, -1), mask)
        return backbone.finish(x, mask)


def random_prompts(backbone: LayeredEncoder, count: int = 4) -> Tensor:
    D = (*backbone.widths, 1)[0]  # of any width where there is no layer
    return torch.randn(1, count, D, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@prompted
def test_prompts_have_no_position(family: Family, folder: Folders) -> None:
    """In another order they are the same prompts; and they do matter."""
    backbone = backbone_of(folder(family))
    inputs = text_inputs(3, 9)
    prompts = random_prompts(backbone)
    y = run_layers(backbone, inputs, prompts)
    assert close(run_layers(backbone, inputs, prompts.flip(1)), y, family.tolerance)
    assert not close(run_layers(backbone, inputs), y, 1e-2)


@texts
def test_whatever_stands_under_the_padding_does_not_matter(family: Family, folder: Folders) -> None:
    backbone = backbone_of(folder(family))
    inputs = text_inputs(3, 4)
    longer = {name: nn.functional.pad(value, (0, 11)) for name, value in inputs.items()}
    longer["input_ids"] = torch.where(longer["attention_mask"] == 1, longer["input_ids"], 7)
    prompts = random_prompts(backbone)
    assert close(run_layers(backbone, longer, prompts), run_layers(backbone, inputs, prompts), family.tolerance)


@texts
def test_a_text_as_long_as_max_length_is_encoded_as_by_the_library(family: Family, folder: Folders) -> None:
    """Tables of positions are made for ``max_length`` only."""
    for length in (6, family.longest):
        backbone = backbone_of(folder(family), max_length=length)
        inputs = text_inputs(2, length)
        with torch.no_grad():
            expected = family.pooled(backbone.encoder, inputs)
        assert close(run_layers(backbone, inputs), expected, family.tolerance)


@texts
def test_max_length_beyond_the_positions_is_refused(family: Family, folder: Folders) -> None:
    too_long = EncoderSpec(modality="text", source=f"dir:{folder(family)}", max_length=family.longest + 1)
    with pytest.raises(ConfigError, match=rf"received {family.longest + 1}; expected at most its {family.longest} pos"):
        load_encoder(too_long)


@texts
def test_a_cast_there_and_back_changes_nothing(family: Family, folder: Folders) -> None:
    """Tables follow their weights: those of a model that went to float64 and back are those it was loaded with."""
    backbone = load_encoder(EncoderSpec(modality="text", source=f"dir:{folder(family)}")).backbone
    inputs = text_inputs(2, 7)
    before = run_layers(backbone, inputs)
    assert torch.equal(run_layers(backbone.double().float(), inputs), before)


@texts
def test_a_folder_without_a_tokenizer_is_refused(family: Family, tmp_path: Path) -> None:
    made = family.make(tmp_path / "encoder")
    (made / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"no tokenizer beside dir:.*; expected tokenizer\.json or vocab\.txt"):
        load_encoder(EncoderSpec(modality="text", source=f"dir:{made}"))


@prompted
def test_weights_that_lack_a_tensor_are_refused(family: Family, tmp_path: Path) -> None:
    """transformers would fill it with random values."""
    made = family.make(tmp_path / "encoder")
    config = json.loads((made / "config.json").read_text())
    key = next(key for key in ("num_hidden_layers", "n_layers") if key in config)
    config |= {key: family.layers + 1}
    if "layer_types" in config:
        config["layer_types"].append("full_attention")
    (made / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="incomplete"):
        load_encoder(EncoderSpec(modality="text", source=f"dir:{made}"))


# Faults of one prompted layer each, which the oracle must notice.


def relative_terms_for_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are treated as the tokens that follow the text."""
    whole = DebertaEncoder.layer

    def layer(self: Any, index: int, x: Tensor, prompts: Tensor | None, mask: Tensor) -> Tensor:
        if prompts is None:
            return whole(self, index, x, None, mask)
        N = x.shape[1]
        return whole(
            self,
            index,
            torch.cat([x, prompts], 1),
            None,
            torch.cat([mask, mask.new_ones(prompts.shape[:2])], 1),
        )[:, :N]

    monkeypatch.setattr(DebertaEncoder, "layer", layer)


def distances_the_wrong_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative terms read the rows of other distances."""
    gather = torch.gather
    monkeypatch.setattr(torch, "gather", lambda x, dim, rows: gather(x, dim, rows.flip(-1)))


def prompts_outside_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts have the place behind the text in windowed layers."""
    whole = ModernBertEncoder._beyond_window
    monkeypatch.setattr(
        ModernBertEncoder,
        "_beyond_window",
        lambda self, unseen, *, text: whole(self, unseen, text=unseen.shape[-1]),
    )


def rotated_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts have the angles behind the text."""
    whole = ModernBertEncoder._angles
    monkeypatch.setattr(
        ModernBertEncoder,
        "_angles",
        lambda self, kind, *, text, prompts: whole(self, kind, text=text + prompts, prompts=0),
    )


def biased_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bias to prompts is not zero."""
    pad = nn.functional.pad
    monkeypatch.setattr(nn.functional, "pad", lambda x, sizes: pad(x, sizes, value=0.5))


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("DeBERTa-v3", relative_terms_for_prompts),
        ("DeBERTa-v2", relative_terms_for_prompts),
        ("DeBERTa-v3", distances_the_wrong_way),
        ("ModernBERT", prompts_outside_the_window),
        ("ModernBERT", rotated_prompts),
        ("MPNet", biased_prompts),
    ],
)
def test_the_oracle_bites(
    name: str, fault: Callable[[pytest.MonkeyPatch], None], model: Callable[..., MoPE], monkeypatch: pytest.MonkeyPatch
) -> None:
    family = by_name(name)
    rows = family, by_name("ViT")
    trained = double(model(name, "ViT"))
    inputs = inputs_of(trained, batch=2, text_length=5, double=True)
    logits, _ = run_oracle(trained, rows, inputs)
    fault(monkeypatch)
    with torch.no_grad():
        wrong = trained(inputs, form="token").logits.numpy()
    assert np.abs(wrong - logits).max() > 1e-3 * np.abs(logits).max()


def test_windows_stay_as_they_were_and_prompts_are_in_reach_of_every_token(folder: Folders) -> None:
    """One windowed layer of ModernBERT: token 20 sees 18 to 22 and the prompts, and nothing else."""
    backbone = backbone_of(folder(by_name("ModernBERT")))
    windowed = 1
    assert backbone.encoder.layers[windowed].attention_type == "sliding_attention"
    x, mask = torch.randn(1, 30, backbone.width, dtype=torch.float64), torch.ones(1, 30, dtype=torch.long)
    prompts = random_prompts(backbone)
    with torch.no_grad():
        before = backbone.layer(windowed, x, prompts, mask)
        seen = []
        for other in range(30):
            changed = x.clone()
            changed[:, other] += torch.arange(backbone.width) % 3
            after = backbone.layer(windowed, changed, prompts, mask)
            if not torch.equal(after[:, 20], before[:, 20]):
                seen.append(other)
        assert seen == [18, 19, 20, 21, 22]
        moved = backbone.layer(windowed, x, prompts + torch.arange(backbone.width) % 3, mask) - before
    assert (moved.abs().amax(dim=-1) > 1e-3).all()


def test_every_token_sees_something(folder: Folders) -> None:
    """Padding beyond the window of all text too: a row of lowest numbers may overflow to NaN at half precision."""
    backbone = backbone_of(folder(by_name("ModernBERT")))
    masks: list[Tensor] = []
    for layer in backbone.encoder.layers:
        layer.register_forward_pre_hook(lambda _m, _a, kw: masks.append(kw["attention_mask"]), with_kwargs=True)
    inputs = {name: nn.functional.pad(value, (0, 20)) for name, value in text_inputs(1, 3).items()}
    run_layers(backbone, inputs)
    assert [mask.shape[-2] for mask in masks] == [1, 23, 1]
    assert all((mask == 0).any(dim=-1).all() for mask in masks)


def test_angles_that_depend_on_the_length_are_refused(tmp_path: Path) -> None:
    made = by_name("ModernBERT").make(tmp_path / "encoder")
    config = json.loads((made / "config.json").read_text())
    config["rope_parameters"]["full_attention"] |= {"rope_type": "dynamic", "factor": 2.0}
    (made / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"rotary positions of dir:.*received 'dynamic'"):
        load_encoder(EncoderSpec(modality="text", source=f"dir:{made}"))


@pytest.mark.parametrize("kinds", [["c2p"], ["p2c"], None])
@pytest.mark.parametrize("relative", [True, False])
def test_other_mixes_of_relative_terms_equal_the_library(
    relative: bool, kinds: list[str] | None, tmp_path: Path
) -> None:
    # Heads of 2 features under c2p or p2c alone, of 4 under neither: the scale is a whole number, exact in float32.
    made = bert_folder(
        tmp_path / "deberta",
        model_type="deberta-v2",
        hidden_size=16,
        num_attention_heads=4 if kinds is None else 2,
        relative_attention=relative,
        pos_att_type=kinds,
    )
    backbone = backbone_of(made)
    inputs = text_inputs(4, 9)
    with torch.no_grad():
        expected = by_name("DeBERTa-v3").pooled(backbone.encoder, inputs)
    assert close(run_layers(backbone, inputs), expected, 1e-11)


def test_buckets_equal_the_library_s_at_the_sizes_of_deberta_v3() -> None:
    """256 buckets over 512 positions: distances to 511 either way, as the library counts them for a whole text."""
    attention = DisentangledSelfAttention(
        DebertaV2Config(
            hidden_size=8,
            num_attention_heads=2,
            relative_attention=True,
            position_buckets=256,
            max_position_embeddings=512,
        )
    )
    for length in (5, 128, 129, 512):
        rows, reach = table_rows(attention, length)
        text = torch.empty(length, 1)
        theirs = (build_relative_position(text, text, 256, 512)[0] + 256).clamp(0, 511)
        place = torch.arange(length)
        ours = rows[place[:, None] - place + length - 1] + reach.start
        assert torch.equal(ours, theirs)
        assert 0 <= rows.min() <= rows.max() < reach.stop - reach.start


def sentencepiece_model() -> bytes:
    """A unigram model over the tiny vocabulary, as published for DeBERTa."""
    from transformers.convert_slow_tokenizer import import_protobuf

    proto = import_protobuf().ModelProto()
    normal, unknown, control = 1, 2, 3
    pieces = [("[PAD]", control), ("[CLS]", control), ("[SEP]", control), ("<unk>", unknown)]
    pieces += [("▁" + word, normal) for word in WORDS[5:]] + [
        (letter, normal) for letter in "▁abcdefghijklmnopqrstuvwxyz"
    ]
    for i, (piece, kind) in enumerate(pieces):
        proto.pieces.add(piece=piece, score=-float(i), type=kind)
    proto.trainer_spec.model_type, proto.trainer_spec.unk_id = 1, 3
    proto.normalizer_spec.name = "identity"
    return proto.SerializeToString()


def test_a_tokenizer_published_as_a_model_file_is_converted(tmp_path: Path) -> None:
    made = bert_folder(tmp_path / "encoder", model_type="deberta-v2", vocab_size=41)
    (made / "tokenizer.json").unlink()
    (made / "spm.model").write_bytes(sentencepiece_model())
    tokenizer = load_encoder(EncoderSpec(modality="text", source=f"dir:{made}")).tokenizer
    assert tokenizer is not None
    assert Tokenizer.from_str(tokenizer).encode("the red card").tokens == ["[CLS]", "▁the", "▁red", "▁card", "[SEP]"]


@pytest.mark.parametrize("content", [b"", b"no model at all"])
def test_a_damaged_model_file_is_one_clear_error(content: bytes, tmp_path: Path) -> None:
    made = by_name("DeBERTa-v3").make(tmp_path / "encoder")
    (made / "tokenizer.json").unlink()
    (made / "spm.model").write_bytes(content)
    with pytest.raises(ConfigError, match="no usable tokenizer beside") as caught:
        load_encoder(EncoderSpec(modality="text", source=f"dir:{made}"))
    assert "\n" not in str(caught.value)


def test_without_a_class_token_that_sees_the_text_its_real_tokens_are_averaged(tmp_path: Path) -> None:
    """A causal encoder's first token is the same for every text, whatever its tokenizer puts there."""
    made = bert_folder(tmp_path / "gpt", model_type="gpt2", n_embd=16, n_head=2, n_layer=2, n_positions=40)
    backbone = backbone_of(made)
    inputs = text_inputs(3, 6)
    with torch.no_grad():
        states = backbone.encoder(**inputs).last_hidden_state
    means = [state[: int(mask.sum())].mean(dim=0) for state, mask in zip(states, inputs["attention_mask"], strict=True)]
    assert close(run_layers(backbone, inputs), torch.stack(means), 1e-11)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("convbert", "padding changes what dir:.*received ConvBertModel, whose states move by .*%"),
        ("fnet", "padding changes what dir:"),
        ("clip", "cannot be run on a text of 40 tokens: .*received CLIPModel; expected a text encoder"),
        ("bart", "belongs to no supported encoder family; received BartModel"),
    ],
)
def test_models_that_give_no_feature_of_a_text_alone_are_refused(model_type: str, reason: str, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"convbert": {"embedding_size": 8}}.get(model_type, {})
    if model_type == "bart":
        sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
        sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    made = bert_folder(tmp_path / "encoder", model_type=model_type, **sizes)
    with pytest.raises(ConfigError, match=reason) as caught:
        load_encoder(EncoderSpec(modality="text", source=f"dir:{made}"))
    assert "\n" not in str(caught.value)


def test_a_text_encoder_of_unknown_layers_cannot_be_main(folder: Folders) -> None:
    spec = EncoderSpec(modality="text", source=f"dir:{folder(by_name('ALBERT'))}")
    with pytest.raises(ConfigError, match=r"has no layers to prompt.*received AlbertModel; expected .*ModernBERT"):
        load_encoder(spec, main=True)
