"""YAML as recipes have it: mappings, lists, strings, numbers, true, false and null, each as it is written.

YAML itself is more: aliases that multiply until memory ends, values that contain themselves, tags that make other
types. What expands beyond a limit, and every tag, is refused; a date is a string.
"""

from __future__ import annotations

import math
import re
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from mope_deploy.fields import hidden, shown
from mope_deploy.limits import MAX_DIGITS, MAX_RECIPE_BYTES, MAX_RECIPE_VALUES

__all__ = ["YamlError", "dump_yaml", "load_yaml"]

_FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")  # 3e-4, which YAML 1.1 reads as a string


class YamlError(ValueError):
    """What is wrong with a document, in one line."""


def load_yaml(text: str) -> Any:
    """One document.

    Raises:
        YamlError: it is none, or more than recipes need: see above.
    """
    if len(text) > MAX_RECIPE_BYTES:
        raise YamlError(f"{len(text):,} characters, at most {MAX_RECIPE_BYTES:,}")
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _expanded(node, {})
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError:
        raise YamlError("nested too deeply") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise YamlError(" ".join(str(error).split())[:300]) from error


def dump_yaml(values: Any) -> str:
    """A document that :func:`load_yaml` reads back."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _expanded(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node is once its aliases are copied; 0 stands for one that is being counted."""
    if id(node) in known:
        if not (count := known[id(node)]):
            raise YamlError("a value that contains itself")
        return count
    known[id(node)] = 0
    count = 1
    if isinstance(node, yaml.CollectionNode):
        for item in node.value:
            count += sum(_expanded(one, known) for one in (item if isinstance(item, tuple) else (item,)))
            if count > MAX_RECIPE_VALUES:
                raise YamlError(f"more than {MAX_RECIPE_VALUES:,} values, aliases counted as often as they stand there")
    known[id(node)] = count
    return count


class _Loader(yaml.SafeLoader):
    """Safe YAML without tags, in which keys are strings given once and 3e-4 is a number."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if getattr(event, "tag", None) is not None:
            raise ConstructorError(None, None, f"tags are not taken: {shown(event.tag)}", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise ConstructorError(None, None, f"a key that is no string: {shown(key)}", key_node.start_mark)
            if key in seen:
                raise ConstructorError(None, None, f"the key {shown(key)} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        value = super().construct_scalar(node)
        if isinstance(value, str) and (found := hidden(value)):
            raise ConstructorError(None, None, f"a control character: {found}", node.start_mark)
        return value


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    digits = loader.construct_scalar(node)
    if len(digits) > MAX_DIGITS:
        raise ConstructorError(None, None, f"an integer of {len(digits):,} digits", node.start_mark)
    return loader.construct_yaml_int(node)


def _number(loader: _Loader, node: yaml.ScalarNode) -> float:
    value = loader.construct_yaml_float(node)
    if math.isinf(value) and "inf" not in node.value.lower():  # .inf and .nan are for the field to refuse
        raise ConstructorError(None, None, f"more than any number holds: {shown(node.value)}", node.start_mark)
    return value


class _Dumper(yaml.SafeDumper):
    """Quotes what the loader would take for a number."""


_UNUSED = ("timestamp", "merge", "value")  # types that plain text would have: dates, <<, =
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in _UNUSED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_constructor("tag:yaml.org,2002:int", _integer)
_Loader.add_constructor("tag:yaml.org,2002:float", _number)
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
