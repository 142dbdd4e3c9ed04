"""The configuration: every error at once, the nearest key named, and encoders that cannot be used."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
from safetensors.torch import load_file, save_file

from mope_deploy.errors import ConfigError
from mope_deploy.limits import MAX_LABEL_CHARS, MAX_LABELS
from mope_deploy.model import EncoderSpec, MoPEConfig, build_model
from mope_deploy.task import TASKS
from tests.tiny import LABELS, bert_folder, tiny_config, vit_folder


def test_round_trip(vit: Path, bert: Path) -> None:
    config = tiny_config(vit, bert, top_k=2, noise=0.0)
    assert MoPEConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_the_paper_s_defaults() -> None:
    text = EncoderSpec(modality="text", source="hf:a")
    config = MoPEConfig(main=EncoderSpec(modality="image", source="timm:b"), complementary=(text,), labels=LABELS)
    assert (config.prompt_length, config.experts, config.d_x, config.d_y) == (6, 4, 2, 8)
    assert (config.temperature, config.sigma, config.prompt_dropout, config.top_k) == (0.1, 0.25, 0.1, 0)
    assert (config.static, config.dynamic, config.mapped, config.train_embeddings) == (True, True, True, False)


@pytest.mark.parametrize(
    ("changes", "phrases"),
    [
        (
            {
                "main": {"modality": "smell", "source": "vit"},
                "complementary": [],
                "labels": ["a", "a"],
                "experts": 0,
                "temperature": 0.0,
                "noise": -1.0,
                "prompt_dropout": 1.0,
                "similarity": "l2",
                "task": "guess",
                "static": 1,
            },
            (
                "smell|'vit'|complementary: received no encoder|duplicates|experts: received 0|temperature|noise|"
                "prompt_dropout: received 1.0|l2|'guess', expected 'single-label' or 'multi-label'|static: received 1"
            ),
        ),
        (
            {
                "main": {"modality": "image", "source": "timm:a", "prompts": 2},
                "labels": "abc",
                "experts": 2,
                "top_k": 3,
                "d_x": 1.5,
                "d_y": True,
                "temperature": False,
                "routing_seed": 2**32,
                "missing": ["audio"],
                "multi_labels": True,
            },
            (
                "main: received prompts 2, expected 0|labels: received 'abc', expected a list|at most experts = 2|"
                "d_x: received 1.5, expected integer|d_y: received True|temperature: received False, expected number|"
                "routing_seed: received 4294967296|missing: received audio, expected some of text|"
                "unknown key multi_labels"
            ),
        ),
    ],
)
def test_all_problems_are_reported_at_once(changes: dict[str, Any], phrases: str, vit: Path, bert: Path) -> None:
    values = tiny_config(vit, bert).to_dict() | changes
    with pytest.raises(ConfigError) as caught:
        MoPEConfig.from_dict(values)
    for phrase in phrases.split("|"):
        assert re.search(phrase, str(caught.value)), phrase
    with pytest.raises(ConfigError, match=f"MoPEConfig has {len(phrases.split('|'))} problems"):
        MoPEConfig(**values)


def test_unknown_keys_name_the_nearest(vit: Path, bert: Path) -> None:
    values = tiny_config(vit, bert).to_dict()
    with pytest.raises(ConfigError, match=r"temprature .did you mean temperature"):
        MoPEConfig.from_dict(values | {"temprature": 1.0})
    values["main"]["sauce"] = "x"
    with pytest.raises(ConfigError, match=r"unknown key main\.sauce .did you mean main\.source"):
        MoPEConfig.from_dict(values)


def test_an_encoder_and_its_lengths_belong_together() -> None:
    for modality, lengths in (("image", {"max_length": 8}), ("text", {"max_seconds": 1}), ("audio", {"max_length": 9})):
        with pytest.raises(ConfigError, match=f"expected none for {modality}"):
            EncoderSpec(modality=modality, source="hf:a", **lengths)


def test_whole_numbers_and_lists_stand_for_others_and_tuples(vit: Path, bert: Path) -> None:
    values = tiny_config(vit, bert).to_dict()
    found = MoPEConfig.from_dict(values | {"temperature": 1, "labels": list(LABELS), "missing": ["text"]})
    assert found == tiny_config(vit, bert, temperature=1.0, missing=("text",))
    assert hash(found) == hash(tiny_config(vit, bert, temperature=1.0, missing=("text",)))
    assert isinstance(found.temperature, float)


@pytest.mark.parametrize("label", ["a\x1b[2J", "a\n", "\u202egnp"])
def test_labels_that_no_bundle_holds(label: str, vit: Path, bert: Path) -> None:
    """Said before anything is trained, in one printable line."""
    with pytest.raises(ConfigError, match=r"labels.*characters that can be shown") as caught:
        tiny_config(vit, bert, labels=("a", label))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("label", ["", " ", "\u3000", "x" * (MAX_LABEL_CHARS + 1)])
def test_labels_that_are_blank_or_too_long(label: str, vit: Path, bert: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"labels\.1: received .*, expected 1 to 256 characters that are not all blank"
    ):
        tiny_config(vit, bert, labels=("a", label))
    assert tiny_config(vit, bert, labels=("a", "x" * MAX_LABEL_CHARS)).labels[1]


def test_more_labels_than_a_bundle_holds(vit: Path, bert: Path) -> None:
    with pytest.raises(ConfigError, match=f"labels: received {MAX_LABELS + 1:,}, expected at most {MAX_LABELS:,}"):
        tiny_config(vit, bert, labels=("a",) * (MAX_LABELS + 1))


@pytest.mark.parametrize(("task", "fewest"), [("single-label", 2), ("multi-label", 1)])
def test_a_recipe_may_leave_the_labels_to_its_rows_but_a_model_needs_them(
    task: str, fewest: int, vit: Path, bert: Path
) -> None:
    config = MoPEConfig.from_dict(tiny_config(vit, bert).to_dict() | {"labels": None, "task": task})
    assert config.labels == ()
    with pytest.raises(ConfigError, match=f"labels of a {task} model; received 0; expected at least {fewest}"):
        build_model(config)
    enough = tiny_config(vit, bert, labels=LABELS[:fewest], task=task)
    assert build_model(enough).task == TASKS[task](labels=LABELS[:fewest])


def test_reading_a_configuration_imports_no_torch() -> None:
    code = "import sys; from mope_deploy.model import MoPEConfig; print(sorted({'torch', 'timm'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def build(main: str, text: str, **text_args: int) -> None:
    build_model(
        MoPEConfig(
            main=EncoderSpec(modality="image", source=main),
            complementary=(EncoderSpec(modality="text", source=text, **text_args),),
            labels=LABELS,
        )
    )


def test_encoders_that_cannot_be_used_say_why(vit: Path, bert: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"without a config\.json"):
        build(f"dir:{tmp_path / 'nowhere'}", f"dir:{bert}")
    with pytest.raises(ConfigError, match="another modality"):
        build(f"dir:{bert}", f"dir:{bert}")
    with pytest.raises(ConfigError, match="at most its 40 positions"):
        build(f"dir:{vit}", f"dir:{bert}", max_length=41)
    with pytest.raises(ConfigError, match="no encoder at embedded:nonsense"):
        build("embedded:nonsense", f"dir:{bert}")
    with pytest.raises(ConfigError, match="could not be loaded"):
        build("timm:no_such_architecture", f"dir:{bert}")
    resnet = tmp_path / "resnet"
    resnet.mkdir()
    module = timm.create_model("resnet10t", num_classes=0)
    save_file(module.state_dict(), resnet / "model.safetensors")
    (resnet / "config.json").write_text(json.dumps({"architecture": "resnet10t", "num_classes": 0}))
    with pytest.raises(ConfigError, match=r"complementary encoder only, .*; received ResNet; expected timm Vision"):
        build(f"dir:{resnet}", f"dir:{bert}")
    with pytest.raises(ConfigError, match="does not pool"):
        build(f"dir:{vit_folder(tmp_path / 'flat', global_pool='')}", f"dir:{bert}")


def test_weights_that_lack_a_tensor_are_refused(vit: Path, tmp_path: Path) -> None:
    """transformers would fill it with random values and only log it."""
    bert = bert_folder(tmp_path / "bert")
    state = load_file(bert / "model.safetensors")
    del state["encoder.layer.1.output.dense.weight"]
    save_file(state, bert / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"incomplete; received no encoder\.layer\.1\.output\.dense\.weight"):
        build(f"dir:{vit}", f"dir:{bert}")


def test_a_folder_without_tokenizer_is_refused(vit: Path, tmp_path: Path) -> None:
    bert = bert_folder(tmp_path / "bert")
    (bert / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="no tokenizer beside"):
        build(f"dir:{vit}", f"dir:{bert}")


def test_building_leaves_the_random_state_alone(vit: Path, bert: Path) -> None:
    import torch

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = build_model(tiny_config(vit, bert), seed=1)
    assert torch.equal(torch.rand(3), expected)
    second = build_model(tiny_config(vit, bert), seed=1)
    third = build_model(tiny_config(vit, bert), seed=2)
    name = "layers.0.experts.prompts"
    assert torch.equal(first.trained_parameters()[name], second.trained_parameters()[name])
    assert not torch.equal(first.trained_parameters()[name], third.trained_parameters()[name])
