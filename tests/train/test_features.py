"""Cached y: the same features as the whole model computes, and only where nothing that trains can change them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mope_deploy.model import EncoderSpec, build_model
from tests.media import audio_folder
from tests.tiny import bert_folder, tiny_config, tiny_inputs, tiny_model
from tests.train.tools import split_of
from train.baselines import unprompted_features
from train.data import Batches, MediaCache
from train.features import Features, cacheable, fit_statistics, standardised
from train.objective import Objective

CPU = torch.device("cpu")


@pytest.mark.parametrize("y_norm", ["none", "standardise"])
def test_cached_features_give_the_whole_models_logits(tiny: Path, y_norm: str) -> None:
    model = tiny_model(tiny / "vit", tiny / "bert", prompts=0, y_norm=y_norm)
    split = split_of(tiny)
    images = MediaCache(model.preprocessing, limit_mb=16)
    features = Features(images, CPU, batch_size=7)
    y = {"text": features.bare(model.complementary_encoders()["text"].backbone, "text", split)}
    if y_norm == "standardise":
        fit_statistics(model, split, y, seed=0)
        y = standardised(model, y)
        rows = y["text"][torch.from_numpy(split.columns["text"])]
        torch.testing.assert_close(rows.mean(0), torch.zeros(16), atol=1e-5, rtol=0)
        torch.testing.assert_close(rows.std(0, unbiased=False), torch.ones(16), atol=1e-4, rtol=0)
    batch = Batches(split, images).__getitems__(range(20))
    cached = Batches(split, images, y=y).__getitems__(range(20))
    with torch.no_grad():
        whole, short = model(batch["inputs"]).logits, model(cached["inputs"], y=cached["y"]).logits
    torch.testing.assert_close(short, whole, atol=2e-5, rtol=2e-5)
    wrong = {"text": cached["y"]["text"].roll(1, 0)}
    with torch.no_grad():
        assert (model(cached["inputs"], y=wrong).logits - whole).abs().max() > 1e-2


def test_only_encoders_without_prompts_are_cached_and_only_within_the_bound(tiny: Path) -> None:
    split = split_of(tiny)
    bare, prompted = (tiny_model(tiny / "vit", tiny / "bert", prompts=prompts) for prompts in (0, 1))
    assert cacheable(bare, limit_mb=1, splits=[split]) == ("text",)
    assert cacheable(prompted, limit_mb=1, splits=[split]) == ()
    assert cacheable(bare, limit_mb=0, splits=[split]) == ()


def test_prompts_in_one_encoder_leave_the_others_cached(tiny: Path, tmp_path: Path) -> None:
    encoders = [("text", bert_folder(tmp_path / "bert"), 1), ("audio", audio_folder(tmp_path / "audio"), 0)]
    specs = [EncoderSpec(modality=name, source=f"dir:{folder}", prompts=prompts) for name, folder, prompts in encoders]  # type: ignore[arg-type]
    config = tiny_config(tiny / "vit", tiny / "bert").model_copy(update={"complementary": tuple(specs)})
    model = build_model(config).eval()
    inputs = tiny_inputs(3) | {"audio_values": torch.randn(3, 400), "audio_mask": torch.ones(3, 400, dtype=torch.long)}
    with torch.no_grad():
        y = {"audio": model.encode_complementary(inputs)["audio"]}
        whole = model(inputs).logits
        short = model({name: value for name, value in inputs.items() if not name.startswith("audio")}, y=y).logits
        wrong = model(inputs, y={"audio": y["audio"] + 1}).logits
    assert torch.equal(whole, short)
    assert not torch.equal(whole, wrong)
    split = replace(split_of(tiny), values={"text": ("a",), "audio": ("b.wav",)})
    assert cacheable(model, limit_mb=1, splits=[split]) == ("audio",)


def test_the_objective_is_cross_entropy_plus_the_importance_of_a_training_batch(tiny: Path) -> None:
    model = tiny_model(tiny / "vit", tiny / "bert", noise=0.0, prompt_dropout=0.0)
    split = split_of(tiny)
    batch = Batches(split, MediaCache(model.preprocessing, limit_mb=16)).__getitems__(range(12))
    objective = Objective(model, importance_weight=0.5, importance_threshold=0.0)
    for training in (True, False):
        objective.train(training)
        with torch.no_grad():
            out, direct = objective(**batch), model(batch["inputs"])
        logits, routing = direct.logits.double().numpy(), direct.soft_routing.double().numpy()
        right = logits[np.arange(12), batch["labels"].numpy()]
        expected = float(np.mean(np.log(np.exp(logits).sum(-1)) - right))
        importance = routing.sum(0)
        cv2 = float((importance.var(axis=-1) / importance.mean(axis=-1) ** 2).mean())
        assert float(out["loss"]) == pytest.approx(expected + (0.5 * cv2 if training else 0.0), rel=1e-5)
        assert float(out["importance"]) == pytest.approx(cv2 if training else 0.0, rel=1e-5)
        assert cv2 > 0.01


def test_the_multi_label_objective_is_binary_cross_entropy(tiny: Path) -> None:
    model = tiny_model(tiny / "vit", tiny / "bert", task="multi-label")
    split = split_of(tiny)
    inputs = Batches(split, MediaCache(model.preprocessing, limit_mb=16)).inputs(np.arange(4))
    labels = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 1]]).bool()
    objective = Objective(model.eval(), importance_weight=0.0, importance_threshold=0.1).eval()
    with torch.no_grad():
        out = objective(inputs, labels)
        p = torch.sigmoid(model(inputs).logits.double())
    expected = -torch.where(labels, p.log(), (1 - p).log()).mean()
    assert float(out["loss"]) == pytest.approx(float(expected), rel=1e-5)


def test_features_for_baselines_come_from_the_bare_encoders(tiny: Path) -> None:
    """Prompts must not reach them: timm's and transformers' own forward are the reference."""
    model = tiny_model(tiny / "vit", tiny / "bert", prompts=3)
    split = split_of(tiny)
    images = MediaCache(model.preprocessing, limit_mb=16)
    found = unprompted_features(model, split, Features(images, CPU, batch_size=8))
    inputs = Batches(split, images).inputs(np.arange(len(split)))
    vit: nn.Module = model.main.encoder
    bert: nn.Module = model.complementary["text"].backbone.encoder  # type: ignore[union-attr,assignment]
    with torch.no_grad():
        image = vit(inputs["pixel_values"])
        text = bert(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state[:, 0]
    assert list(found) == ["image", "text"]
    torch.testing.assert_close(torch.from_numpy(found["image"]), image, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(torch.from_numpy(found["text"]), text, atol=2e-5, rtol=2e-5)


def test_every_trained_parameter_gets_a_gradient_and_encoders_stay_in_evaluation_mode(tiny: Path) -> None:
    model = tiny_model(tiny / "vit", tiny / "bert")
    objective = Objective(model, importance_weight=0.01, importance_threshold=0.1).train()
    assert model.head.training
    assert not model.main.training
    assert not model.complementary["text"].backbone.training  # type: ignore[union-attr]
    batch = Batches(split_of(tiny), MediaCache(model.preprocessing, limit_mb=16)).__getitems__([1, 2])
    objective(**batch)["loss"].backward()
    found = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert found == set(model.trained_parameters())
