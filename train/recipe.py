"""Recipe files: finding, reading, overriding and checking them, before anything heavy is imported."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from mope_deploy.errors import ConfigError, UsageError
from mope_deploy.fields import nearest, shown
from train.config import Recipe

__all__ = ["RECIPES", "check_recipe", "load_recipe", "read_recipe", "shipped_recipes", "to_yaml"]

RECIPES = Path(__file__).parent / "recipes"
MAX_BYTES = 1 << 20


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
    if path.stat().st_size > MAX_BYTES:
        raise ConfigError(f"recipe {path} is too large", expected=f"at most {MAX_BYTES // 2**20} MiB of YAML")
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
    problems = [problem for override in overrides if (problem := _apply(merged, override)) is not None]
    try:
        recipe = Recipe.model_validate(merged)
    except ValidationError as error:
        problems += [_problem(item) for item in error.errors()]
    if problems:
        if len(problems) == 1:
            raise ConfigError(f"{what}: {problems[0]}")
        raise ConfigError(f"{what} has {len(problems)} problems:" + "".join(f"\n  {problem}" for problem in problems))
    return recipe


def to_yaml(recipe: Recipe) -> str:
    """A recipe with every value spelled out, as :func:`read_recipe` reads it back."""
    return yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True, width=120)


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
            return _unknown(key)
    if isinstance(at, list) and parts[-1].isdigit() and int(parts[-1]) < len(at):
        at[int(parts[-1])] = value
    elif isinstance(at, dict):
        at[parts[-1]] = value
    else:
        return _unknown(key)
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


def _problem(item: Any) -> str:
    """One pydantic error as a phrase."""
    where = ".".join(str(part) for part in item["loc"])
    kind, message = item["type"], item["msg"]
    if kind == "extra_forbidden":
        return _unknown(where)
    if kind == "missing":
        return f"{where} is missing"
    if kind == "value_error":
        text = str(item["ctx"]["error"])
        return f"{where}: {text}" if where else text
    expected = message.removeprefix("Input should be ").removeprefix("a valid ")
    if kind in ("model_type", "model_attributes_type"):
        expected = "a mapping"
    hint = "; quote it" if kind == "string_type" and isinstance(item["input"], bool | int | float) else ""
    return f"{where}: received {shown(item['input'])}, expected {expected}{hint}"


def _unknown(key: str) -> str:
    hint = _nearest_key(key)
    return f"unknown key {key}" + (f" (did you mean {hint}?)" if hint else "")


def _nearest_key(key: str) -> str | None:
    """The known dotted key most like ``key``: among its siblings, then anywhere by its last part, then as a whole."""
    plain = ".".join(part for part in key.split(".") if not part.isdigit())
    parent, _, last = plain.rpartition(".")
    known = list(_keys(Recipe))
    by_name: dict[str, str] = {}
    for name in known:
        by_name.setdefault(name.rpartition(".")[2], name)
    siblings = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == parent]
    close = difflib.get_close_matches(last, siblings, n=1, cutoff=0.7)
    if close:
        return ".".join([*key.split(".")[:-1], close[0]])
    close = difflib.get_close_matches(last, by_name, n=1, cutoff=0.7)
    if close:
        return by_name[close[0]]
    return nearest(plain, known)


def _keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key of a section, without list indices."""
    for name, field in section.model_fields.items():
        yield prefix + name
        for inner in _sections(field.annotation):
            yield from _keys(inner, f"{prefix}{name}.")


def _sections(annotation: Any) -> Iterable[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return (annotation,)
    return [inner for part in getattr(annotation, "__args__", ()) for inner in _sections(part)]


def _copy(values: Any) -> Any:
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
