"""Recipes: every mistake is named, all of them at once, before anything heavy is imported."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mope_deploy.errors import ConfigError, UsageError
from mope_deploy.model.strict import dotted_keys
from train.config import Recipe
from train.recipe import check_recipe, load_recipe, read_recipe, shipped_recipes, to_yaml


def problem(values: dict[str, Any], *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        check_recipe(values, overrides, what="recipe")
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("optim.lr_man=1", "unknown key optim.lr_man (did you mean optim.lr_main?)"),
        ("lr_main=1", "unknown key lr_main (did you mean optim.lr_main?)"),
        ("modell.experts=3", "unknown key modell (did you mean model?)"),
        ("model.expert=3", "unknown key model.expert (did you mean model.experts?)"),
        ("model.complementary.0.prompt=1", "(did you mean model.complementary.0.prompts?)"),
        ("data.columns.txt=x", "unknown key data.columns.txt (did you mean data.columns.text?)"),
        ("train.xyzzy=1", "unknown key train.xyzzy"),
        ("train.batch_size=0", "train.batch_size: received 0, expected greater than or equal to 1"),
        ("train.batch_size=many", "train.batch_size: received 'many', expected integer"),
        ("optim.lr_main=.nan", "optim.lr_main: received nan"),
        ("model.labels=[a, no]", "model.labels.1: received False, expected string; quote it"),
        ("model.top_k=9", "top_k: received 9, expected at most experts = 4"),
        (
            "model.main.modality=sound",
            "model.main.modality: received 'sound', expected 'image', 'text', 'audio' or 'video'",
        ),
        ("model.complementary.1.prompts=3", "unknown key model.complementary.1.prompts"),
        ("optim.lr_main=[1", "optim.lr_main: received '[1', expected a YAML value"),
        ("train=3", "train: received 3, expected a mapping"),
        ("batch", "received 'batch', expected dotted.key=value"),
        ("data.train=null", "data: received none, expected one of data.name, data.train (a file) and data.hub"),
        ("data.name=digits-ve", "data.name=digits-ve brings its own splits"),
        ("data.hub=me/pairs data.name=digits-ve", "received data.name and data.hub"),
        ("train.early_stopping=true", "train.early_stopping: received True, expected integer"),
        ("model.experts=true", "model.experts: received True, expected integer"),
        ("train.epochs=1.5", "train.epochs: received 1.5, expected integer"),
        ("optim.betas=0.9", "optim.betas: received 0.9, expected a list"),
        ("optim.lr=1e-3", "unknown key optim.lr (did you mean optim.lr_main?)"),
        ("model.complementary.7.source=x", "unknown key model.complementary.7.source (a list: its entries have"),
        ("model.taks=multi-label", "unknown key model.taks (did you mean model.task?)"),
    ],
)
def test_one_mistake_is_named_with_its_key(values: dict[str, Any], override: str, hint: str) -> None:
    message = problem(values, *override.split(" ") if "hub" in override else [override])
    assert hint in message
    assert "\n" not in message


def test_all_mistakes_are_reported_at_once(values: dict[str, Any]) -> None:
    del values["model"]["main"]
    message = problem(values, "optim.lr_man=1", "train.batch_size=0", "nonsense")
    assert "has 4 problems" in message
    for part in ("model.main is missing", "optim.lr_man", "train.batch_size", "'nonsense'"):
        assert part in message


def test_overrides_are_yaml_and_do_not_touch_the_recipe_they_are_applied_to(values: dict[str, Any]) -> None:
    found = check_recipe(
        values,
        [
            "optim.lr_main=3e-3",
            "model.complementary.0.prompts=5",
            "optim.milestones=[1, 2.5]",
            "train.early_stopping=2",
        ],
        what="recipe",
    )
    assert found.optim.lr_main == 0.003
    assert found.model.complementary[0].prompts == 5
    assert found.optim.milestones == (1, 2.5)
    assert found.train.early_stopping == 2
    assert values["model"]["complementary"][0]["prompts"] == 2
    assert values["optim"]["lr_main"] == 1e-2


def test_a_recipe_written_out_reads_back_equal(values: dict[str, Any], tmp_path: Path) -> None:
    values["model"]["labels"] = ["1e5", "no", "3"]
    recipe = check_recipe(values, ["optim.lr_main=1e-4", "optim.eps=1.e-9"], what="recipe")
    assert (recipe.optim.lr_main, recipe.optim.eps) == (1e-4, 1e-9)
    (tmp_path / "out.yaml").write_text(to_yaml(recipe))
    assert load_recipe(str(tmp_path / "out.yaml")) == recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2\n", "the key 'seed' is given twice"),
        ("- a\n", "expected a mapping"),
        ("", "expected a mapping"),
        ("a: [1\n", "is not YAML"),
        ("a: !!python/object/apply:os.system ['echo']\n", "is not YAML"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_recipe(str(tmp_path / "bad.yaml"))


def test_an_unknown_recipe_names_the_nearest_shipped_one() -> None:
    with pytest.raises(UsageError, match="did you mean 'digits-ve'"):
        load_recipe("digit-ve")


@pytest.mark.parametrize("name", list(shipped_recipes()))
def test_every_shipped_recipe_is_valid_and_described(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert len(shipped_recipes()[name]) > 20


def test_a_mistake_is_reported_without_importing_torch(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom train.cli import app\nfrom mope_deploy.console import run_app\n"
        "code = run_app(app, ['digits-ve', 'train.batch=3'])\n"
        "heavy = {'torch', 'transformers', 'datasets', 'timm'} & sys.modules.keys()\n"
        "print(code, sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2 []"
    assert done.stderr.strip() == "error: recipe digits-ve: unknown key train.batch (did you mean train.batch_size?)"


def test_every_key_that_the_documentation_names_exists() -> None:
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    prose = re.sub(r"```python.*?```", "", text, flags=re.DOTALL)
    named = set(re.findall(r"(?:data|model|optim|train|run)\.[a-z_]+", prose)) - {"train.jsonl", "run.json", "train.py"}
    unknown = {name for name in named if name not in set(dotted_keys(Recipe)) and f"{name}.py" not in prose}
    assert unknown <= {"train.config", "data.jsonl", "test.jsonl"}
    assert len(named) > 15


def test_the_documented_call_from_python_exists() -> None:
    from train.recipe import load_recipe
    from train.run import Outcome, fit

    assert load_recipe("digits-ve", ["seed=1", "run.dir=runs/seed-1"]).seed == 1
    assert {"run", "status", "evaluation"} <= Outcome.__dataclass_fields__.keys()
    assert {"recipe", "command"} <= fit.__annotations__.keys()
