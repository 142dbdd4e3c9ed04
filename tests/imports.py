"""What our modules import, read from their source: the graph that tests/test_layering.py judges.

Every import statement counts, wherever it stands: in a function, under ``TYPE_CHECKING`` (two files whose types need
each other cannot be read one after the other), or as a name handed to ``importlib.import_module`` or
``mope_deploy.extras.require``. Importing ``a.b`` also runs ``a/__init__.py``; that is not counted, or no package could
re-export anything of its own.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("mope_deploy", "train", "export", "benchmarks", "examples", "tests")

Graph = Mapping[str, Mapping[str, int]]  # module → what it imports → the first line that does


def files(*packages: str) -> dict[str, Path]:
    """Dotted name → file of every module of the packages."""
    found = {}
    for package in packages:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports_of(module: str, path: Path) -> dict[str, int]:
    return dict(imported(path.read_text(encoding="utf-8"), module, is_package=path.name == "__init__.py"))


def imported(text: str, module: str, *, is_package: bool) -> Iterator[tuple[str, int]]:
    """Dotted names imported, and the lines; ``from a import b`` gives ``a.b``, which may be a name of ``a``."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join([*here, base] if base else here)
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            if name in ("import_module", "require", "__import__") and isinstance(node.args[0].value, str):
                yield node.args[0].value, node.lineno


def graph(*packages: str) -> Graph:
    """Our modules and which others of them each one imports."""
    here = files(*packages)
    edges: dict[str, dict[str, int]] = {module: {} for module in here}
    for module, path in here.items():
        for name, line in imports_of(module, path).items():
            target = owner(name, here)
            if target not in (None, module):
                edges[module].setdefault(target, line)
    return edges


def owner(name: str, modules: Mapping[str, object]) -> str | None:
    """The module that a dotted name is, or is a name of."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name or None


def circles(edges: Graph) -> list[str]:
    """For each group of modules that import each other: how many they are, and one shortest way around."""
    reach = {module: _reached(edges, module) for module in edges}
    said, groups = [], set()
    for module in edges:
        group = frozenset(other for other in reach[module] if module in reach[other])
        if group and group not in groups:
            groups.add(group)
            way = min((_way_around(edges, one) for one in sorted(group)), key=len)
            said.append(f"{len(group)} modules import each other, such as\n" + _written(edges, way))
    return said


def _reached(edges: Graph, start: str) -> set[str]:
    """All that ``start`` imports, directly or through others; itself only by a circle."""
    found: set[str] = set()
    waiting = [*edges[start]]
    while waiting:
        if (module := waiting.pop()) not in found:
            found.add(module)
            waiting.extend(edges[module])
    return found


def _way_around(edges: Graph, start: str) -> list[str]:
    """Breadth first from ``start`` back to it, which must be possible."""
    ways = [[start]]
    seen: set[str] = set()
    for way in ways:
        for module in edges[way[-1]]:
            if module == start:
                return [*way, start]
            if module not in seen:
                seen.add(module)
                ways.append([*way, module])
    raise AssertionError(f"{start} is on no circle")


def _written(edges: Graph, way: list[str]) -> str:
    return "\n".join(f"    {a}, line {edges[a][b]}, imports {b}" for a, b in pairwise(way))
