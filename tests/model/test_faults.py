"""What the authors' code gets wrong, each point as a test that fails on that fault (see METHOD: the numbers)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from mope_deploy.model import MoPE, importance_loss
from tests.tiny import bert_folder, tiny_inputs, tiny_model, vit_folder

PATHS = {"dense": {}, "top-1": {"top_k": 1}, "top-2, standardised": {"top_k": 2, "y_norm": "standardise"}}


def close(a: Tensor, b: Tensor) -> bool:
    """Equal to rounding: products of other shapes sum in another order."""
    return bool((a - b).abs().max() <= 2e-5 * b.abs().max())


@pytest.mark.parametrize("name", PATHS)
def test_1_predictions_do_not_depend_on_batch_mates(name: str, vit: Path, bert: Path) -> None:
    model = tiny_model(vit, bert, **PATHS[name])
    inputs = tiny_inputs(batch=16, text_length=9)
    with torch.no_grad():
        together = model(inputs)
        for i in range(16):
            alone = model({key: value[i : i + 1] for key, value in inputs.items()})
            assert close(alone.logits[0], together.logits[i])
            assert close(alone.routing[0], together.routing[i])
        shuffled = torch.randperm(16, generator=torch.Generator().manual_seed(1))
        mixed = model({key: value[shuffled] for key, value in inputs.items()})
    assert close(mixed.logits, together.logits[shuffled])
    # The test can fail: samples do differ, by far more than the tolerance.
    assert not close(together.logits[0], together.logits[1])


def test_1_padding_length_does_not_matter(vit: Path, bert: Path) -> None:
    model = tiny_model(vit, bert)
    inputs = tiny_inputs(batch=3, text_length=4)
    longer = dict(inputs)
    for key in ("input_ids", "attention_mask"):
        longer[key] = nn.functional.pad(inputs[key], (0, 11))
    longer["input_ids"][:, 4:] = 7  # whatever stands under the padding
    with torch.no_grad():
        assert close(model(longer).logits, model(inputs).logits)


def test_2_evaluation_is_bit_identical(vit: Path, bert: Path) -> None:
    model = tiny_model(vit, bert, noise=0.5)
    inputs = tiny_inputs()
    with torch.no_grad():
        first, second = model(inputs), model(inputs)
        assert torch.equal(first.logits, second.logits)
        assert torch.equal(first.routing, second.routing)
        model.train()
        assert not torch.equal(model(inputs).routing, first.routing), "noise belongs to training"


def test_frozen_encoders_keep_their_own_dropout_off_in_training(tmp_path: Path) -> None:
    vit = vit_folder(tmp_path / "vit", proj_drop_rate=0.5, drop_path_rate=0.5)
    bert = bert_folder(tmp_path / "bert", hidden_dropout_prob=0.5)
    model = tiny_model(vit, bert, noise=0.0, prompt_dropout=0.0)
    inputs = tiny_inputs()
    with torch.no_grad():
        expected = model(inputs).logits
        assert torch.equal(model.train()(inputs).logits, expected)


@pytest.mark.parametrize("top_k", [0, 1, 2])
@pytest.mark.parametrize("train_embeddings", [False, True])
def test_3_every_trained_tensor_gets_a_gradient_and_no_other(
    top_k: int, train_embeddings: bool, vit: Path, bert: Path
) -> None:
    model = tiny_model(vit, bert, top_k=top_k, train_embeddings=train_embeddings, temperature=1.0).train()
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    chosen = torch.zeros(2, 5)
    for seed in range(40):  # a top-k expert gets its gradient only from samples that chose it
        inputs = tiny_inputs(batch=16, seed=seed)
        out = model(inputs)
        nn.functional.cross_entropy(out.logits, torch.arange(16) % 3).backward()
        chosen += (out.routing.detach() > 0).sum(dim=0)
    assert (chosen > 0).all(), "the test needs every expert of every layer to be chosen"
    for name, parameter in model.trained_parameters().items():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
        if name.endswith("experts.prompts"):
            assert (parameter.grad.flatten(1).abs().sum(dim=1) > 0).all(), name
    assert all(model.get_parameter(name).grad is None for name in frozen)
    optimiser = torch.optim.AdamW(model.trained_parameters().values(), lr=0.1, weight_decay=0.1)
    optimiser.step()
    for name, before in frozen.items():
        assert torch.equal(model.get_parameter(name), before), f"{name} moved"


def test_3_every_layer_is_prompted(vit: Path, bert: Path) -> None:
    model = tiny_model(vit, bert)
    inputs = tiny_inputs()
    with torch.no_grad():
        before = model(inputs).logits
        for layer in model.layers:
            for tensor in (layer.static.tokens, layer.experts.prompts):
                kept = tensor.clone()
                tensor += 1.0 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))
                assert not close(model(inputs).logits, before)
                tensor.copy_(kept)


@pytest.mark.parametrize("pooling", ["token", "avg"])
def test_4_no_prompt_token_reaches_a_pool(
    pooling: str, tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompt outputs are replaced by huge numbers inside the layer; a pool that saw one would show it.

    In token form: in prefix form there are no such outputs.
    """
    vit = vit_folder(tmp_path / "vit", class_token=pooling == "token", global_pool=pooling)
    model = tiny_model(vit, bert)
    inputs = tiny_inputs()
    seen: list[int] = []
    original = type(model.main).pool

    def pool(self: Any, x: Tensor, mask: Tensor | None) -> Tensor:
        seen.append(x.shape[1])
        return original(self, x, mask)

    monkeypatch.setattr(type(model.main), "pool", pool)
    with torch.no_grad():
        clean = model(inputs, form="token")
        tokens = model.main.embed(inputs)[0].shape[1]
        assert seen == [tokens, tokens]
        for block in model.main.encoder.blocks:
            block.register_forward_hook(
                lambda module, args, out: torch.cat([out[:, :tokens], out[:, tokens:] + 1e9], 1)
            )
        assert torch.equal(model(inputs, form="token").logits, clean.logits)


def test_5_a_batch_of_one_trains_and_nothing_has_batch_statistics(vit: Path, bert: Path) -> None:
    model = tiny_model(vit, bert).train()
    out = model(tiny_inputs(batch=1, text_length=1))
    loss = nn.functional.cross_entropy(out.logits, torch.tensor([1])) + 0.01 * importance_loss(out.soft_routing)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.trained_parameters().values())
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


@pytest.mark.parametrize(
    ("vit_args", "bert_args"),
    [
        ({"embed_dim": 48, "num_heads": 3, "depth": 3}, {"hidden_size": 20}),
        ({"reg_tokens": 4, "init_values": 0.1}, {"model_type": "roberta", "pad_token_id": 1}),
        ({"class_token": False, "global_pool": "avg"}, {"model_type": "electra"}),
        ({"class_token": False, "global_pool": "map"}, {"hidden_size": 36, "num_hidden_layers": 1}),
        ({"pre_norm": True, "no_embed_class": True, "img_size": (16, 16)}, {"model_type": "xlm-roberta"}),
    ],
)
def test_6_widths_are_read_from_the_encoders(vit_args: dict, bert_args: dict, tmp_path: Path) -> None:
    model = tiny_model(vit_folder(tmp_path / "vit", **vit_args), bert_folder(tmp_path / "bert", **bert_args))
    inputs = tiny_inputs(size=vit_args.get("img_size", (32, 24)))
    with torch.no_grad():
        out = model(inputs)
        assert out.logits.shape == (5, 3)
        assert out.routing.shape == (5, vit_args.get("depth", 2), 5)
        torch.testing.assert_close(out.routing.sum(-1), torch.ones(5, out.routing.shape[1]))
        alone = model({key: value[3:4] for key, value in inputs.items()})
    assert close(alone.logits[0], out.logits[3])


def test_7_a_checkpoint_holds_exactly_the_trained_tensors(vit: Path, bert: Path, tmp_path: Path) -> None:
    model = tiny_model(vit, bert, top_k=1)
    model.save_pretrained(tmp_path / "checkpoint")
    expected = {"head.classifier.weight", "head.classifier.bias"}
    expected |= {f"mappers.text.{part}.{kind}" for part in ("down", "up") for kind in ("weight", "bias")}
    for i in range(2):
        expected |= {
            f"complementary.text.prompts.{i}.tokens",
            f"layers.{i}.static.tokens",
            f"layers.{i}.experts.prompts",
            f"layers.{i}.router.project_x.weight",
            f"layers.{i}.router.project_y.text.weight",
        }
    with safe_open(tmp_path / "checkpoint" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == expected
    inputs = tiny_inputs()
    with torch.no_grad():
        assert torch.equal(MoPE.from_pretrained(tmp_path / "checkpoint")(inputs).logits, model(inputs).logits)


@pytest.mark.parametrize("model_type", ["bert", "roberta", "electra"])
def test_8_the_text_encoder_without_prompts_is_the_library_s_own(model_type: str, vit: Path, tmp_path: Path) -> None:
    bert = bert_folder(tmp_path / "bert", model_type=model_type)
    model = tiny_model(vit, bert, prompts=0)
    inputs = tiny_inputs(batch=6)
    encoder = model.complementary["text"].backbone.encoder
    ids = inputs["input_ids"]
    with torch.no_grad():
        y = model.encode_complementary(inputs)["text"]
        theirs = encoder(input_ids=ids, attention_mask=inputs["attention_mask"]).last_hidden_state[:, 0]
    assert y.shape == (6, 16)
    assert close(y, theirs)


@pytest.mark.parametrize(
    "vit_args",
    [{}, {"reg_tokens": 4}, {"class_token": False, "global_pool": "avg"}, {"init_values": 0.1, "fc_norm": True}],
)
def test_without_prompts_the_model_is_the_plain_encoder_bit_for_bit(vit_args: dict, tmp_path: Path, bert: Path) -> None:
    model = tiny_model(vit_folder(tmp_path / "vit", **vit_args), bert, static=False, dynamic=False, mapped=False)
    inputs = tiny_inputs()
    with torch.no_grad():
        feature = model.main.encoder(inputs["pixel_values"])
        out = model(inputs)
        assert torch.equal(out.logits, model.head.classifier(feature))
    assert out.routing is None
    assert out.soft_routing is None
    assert set(model.trained_parameters()) == {
        "head.classifier.weight",
        "head.classifier.bias",
        *(f"complementary.text.prompts.{i}.tokens" for i in range(2)),
    }
