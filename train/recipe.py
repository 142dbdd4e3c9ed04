"""Recipe files: finding, reading, overriding and checking them, before anything heavy is imported."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from mope_deploy.errors import ConfigError, UsageError
from mope_deploy.fields import nearest, shown
from mope_deploy.limits import MAX_RECIPE_BYTES
from mope_deploy.model.strict import problems, refused, unknown_key
from train.config import Recipe

__all__ = ["RECIPES", "check_recipe", "load_recipe", "read_recipe", "shipped_recipes", "to_yaml"]

RECIPES = Path(__file__).parent / "recipes"


def load_recipe(source: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a file or of a shipped name, with overrides applied.

    Args:
        source: path of a YAML file, or the name of a shipped recipe.
        overrides: ``dotted.key=value``; values are read as YAML.

    Raises:
        UsageError: no such recipe.
        ConfigError: naming everything that is wrong with it.
    """
    return check_recipe(read_recipe(source), overrides, what=f"recipe {source}")


def shipped_recipes() -> dict[str, str]:
    """Name → first comment line of every shipped recipe."""
    found = {}
    for path in sorted(RECIPES.glob("*.yaml")):
        first = path.read_text(encoding="utf-8").split("\n", 1)[0]
        found[path.stem] = first.lstrip("# ").strip()
    return found


def read_recipe(source: str) -> dict[str, Any]:
    """The raw values of a recipe, unchecked except for being a YAML mapping; ``name`` defaults to the file's own.

    Raises:
        UsageError: no such recipe.
        ConfigError: not YAML, no mapping, or a key given twice.
    """
    path = _find(source)
    if path.stat().st_size > MAX_RECIPE_BYTES:
        raise ConfigError(f"recipe {path} is too large", expected=f"at most {MAX_RECIPE_BYTES // 2**20} MiB of YAML")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"recipe {path} is not YAML: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"recipe {path}", received=shown(values), expected="a mapping with data: and model:")
    return {"name": path.stem} | values


def check_recipe(values: Mapping[str, Any], overrides: Sequence[str] = (), *, what: str) -> Recipe:
    """Raw values with overrides applied, as a typed recipe.

    Raises:
        ConfigError: naming every problem at once, unknown keys with the nearest known one.
    """
    merged = _copy(values)
    found = [problem for override in overrides if (problem := _apply(merged, override)) is not None]
    try:
        recipe = Recipe.model_validate(merged)
    except ValidationError as error:
        found += problems(error, Recipe)
    if found:
        raise refused(what, found)
    return recipe


def to_yaml(recipe: Recipe) -> str:
    """A recipe with every value spelled out, as :func:`read_recipe` reads it back."""
    return yaml.dump(recipe.to_dict(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _find(source: str) -> Path:
    path = Path(source)
    if path.is_file():
        return path
    if (RECIPES / f"{source}.yaml").is_file():
        return RECIPES / f"{source}.yaml"
    names = list(shipped_recipes())
    hint = nearest(path.stem, names)
    raise UsageError(
        f"no recipe {source!r}",
        expected=f"a YAML file or one of {', '.join(names)}",
        todo=f"did you mean {hint!r}?" if hint else None,
    )


def _apply(values: dict[str, Any], override: str) -> str | None:
    """Set one ``dotted.key=value`` in ``values``; what is wrong with it, or None."""
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        return f"received {shown(override)}, expected dotted.key=value"
    try:
        value = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError:
        return f"{key}: received {shown(text)}, expected a YAML value"
    at: Any = values
    for part in parts[:-1]:
        at = _step(at, part)
        if at is None:
            return unknown_key(key, Recipe)
    if isinstance(at, list) and parts[-1].isdigit() and int(parts[-1]) < len(at):
        at[int(parts[-1])] = value
    elif isinstance(at, dict):
        at[parts[-1]] = value
    else:
        return unknown_key(key, Recipe)
    return None


def _step(at: Any, part: str) -> Any:
    """What ``part`` leads to, made where a mapping lacks it; None where it leads nowhere."""
    if isinstance(at, list):
        return at[int(part)] if part.isdigit() and int(part) < len(at) else None
    if not isinstance(at, dict):
        return None
    if at.get(part) is None:
        at[part] = {}
    return at[part]


def _copy(values: Any) -> Any:  # what a YAML alias names twice becomes two, so that an override changes one of them
    if isinstance(values, Mapping):
        return {key: _copy(value) for key, value in values.items()}
    return [_copy(value) for value in values] if isinstance(values, list | tuple) else values


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML in which a key given twice is an error and 3e-4 is a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what the loader would take for a number."""


for _class in (_StrictLoader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )
