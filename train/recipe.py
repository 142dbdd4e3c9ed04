"""Recipe files: finding, reading, overriding and checking them, before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mope_deploy.errors import ConfigError, UsageError
from mope_deploy.fields import nearest, shown
from mope_deploy.files import reason
from mope_deploy.limits import MAX_RECIPE_BYTES
from mope_deploy.model.strict import problems, refused, unknown_key
from mope_deploy.reading import read_regular
from train.config import Recipe
from train.yaml_strict import YamlError, dump_yaml, load_yaml

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
    try:
        values = load_yaml(read_regular(path, MAX_RECIPE_BYTES).decode("utf-8"))
    except OSError as error:
        raise ConfigError(f"recipe {path} cannot be read", received=reason(error)) from error
    except ValueError as error:  # YamlError, or no UTF-8
        raise ConfigError(f"recipe {path} is not YAML: {reason(error)}") from error
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
    return dump_yaml(recipe.to_dict())


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
        value = load_yaml(text)
    except YamlError:
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
