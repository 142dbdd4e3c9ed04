"""Configurations as strict types: known keys, stated types and ranges, and every mistake at once in words.

A boolean is no number, 1.5 no count and a word no list of letters; lists stand for tuples, as in JSON and YAML, and
whole numbers for others. Recipes, model configurations and checkpoints are read by these rules. Imports no torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from mope_deploy.errors import ConfigError
from mope_deploy.fields import nearest, shown

__all__ = ["Listed", "Strict", "dotted_keys", "problems", "refused", "unknown_key"]

T = TypeVar("T")
_MOST = 40  # problems that are named
Listed = Annotated[tuple[T, ...], BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)]
"""A tuple of any length, which JSON and YAML write as a list."""


class Strict(BaseModel):
    """Values of which each is as its field says; made of keywords or by ``model_validate``.

    Raises:
        ConfigError: made of keywords that are not so. (``model_validate`` raises pydantic's own, for :func:`problems`.)
    """

    model_config = ConfigDict(
        strict=True,
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )

    if not TYPE_CHECKING:  # type checkers make the signature of the fields

        def __init__(self, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise refused(type(self).__name__, problems(error, type(self))) from None

        # What is nested is read by pydantic itself, so that its mistakes come together with all others.
        __init__.__pydantic_base_init__ = True


def refused(what: str, problems: list[str]) -> ConfigError:
    """The error that names every problem of ``what``; there is at least one."""
    if len(problems) == 1:
        return ConfigError(f"{what}: {problems[0]}")
    return ConfigError(f"{what} has {len(problems)} problems:" + "".join(f"\n  {problem}" for problem in problems))


def problems(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """Each of pydantic's errors about ``model`` as a phrase: the dotted key, what was received, what was expected.

    Of very many only the first: a file may have thousands of unknown keys.
    """
    items = error.errors(include_url=False)
    more = [f"{len(items) - _MOST:,} more"] if len(items) > _MOST else []
    return [_problem(item, model) for item in items[:_MOST]] + more


def unknown_key(key: str, model: type[BaseModel]) -> str:
    """The phrase that says that ``model`` has no dotted ``key``, with the one that was probably meant."""
    hint = _nearest_key(key, list(dotted_keys(model)))
    name = key if key.isprintable() and len(key) <= 80 else shown(key)
    if hint == key:
        return f"unknown key {name} (a list: its entries have numbers from 0, and this one is not there)"
    return f"unknown key {name}" + (f" (did you mean {hint}?)" if hint else "")


def dotted_keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key of a section, without list indices."""
    for name, field in section.model_fields.items():
        yield prefix + (field.alias or name)
        for inner in _sections(field.annotation):
            yield from dotted_keys(inner, f"{prefix}{name}.")


def _problem(item: Any, model: type[BaseModel]) -> str:
    where = ".".join(str(part) for part in item["loc"])
    kind, message = item["type"], item["msg"]
    if kind in ("extra_forbidden", "invalid_key"):
        return unknown_key(where, model)
    if kind == "missing":
        return f"{where} is missing"
    if kind == "value_error":
        text = str(item["ctx"]["error"])
        return f"{where}: {text}" if where else text
    expected = message.removeprefix("Input should be ").removeprefix("a valid ")
    if kind in ("model_type", "model_attributes_type"):
        expected = "a mapping"
    elif kind == "tuple_type":
        expected = "a list"
    hint = "; quote it" if kind == "string_type" and isinstance(item["input"], bool | int | float) else ""
    return f"{where}: ".removeprefix(": ") + f"received {shown(item['input'])}, expected {expected}{hint}"


def _nearest_key(key: str, known: list[str]) -> str | None:
    """The known dotted key most like ``key``: among its siblings, then anywhere by its last part, then as a whole."""
    plain = ".".join(part for part in key.split(".") if not part.isdigit())
    parent, _, last = plain.rpartition(".")
    by_name: dict[str, str] = {}
    for name in known:
        by_name.setdefault(name.rpartition(".")[2], name)
    siblings = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == parent]
    if close := _close(last, siblings):
        return ".".join([*key.split(".")[:-1], close])
    if close := _close(last, by_name):
        return by_name[close]
    return None if parent else nearest(plain, known)


def _close(word: str, known: Iterable[str]) -> str | None:
    """The one that goes on as ``word`` begins, or is like it."""
    longer = [name for name in known if len(word) > 1 and name.startswith(word)]
    return longer[0] if longer else next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=0.7)), None)


def _sections(annotation: Any) -> Iterable[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return (annotation,)
    return [inner for part in getattr(annotation, "__args__", ()) for inner in _sections(part)]
