"""Imports flow one way, nothing goes in circles, and every file is what its place says (docs/architecture.md).

What counts as an import: tests/imports.py.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

from tests.imports import PACKAGES, ROOT, circles, files, graph, imported, imports_of

# What may be imported by whom, on the device side: a module imports its own level and those below it.
LEVELS = (
    {"errors", "extras", "console", "progress", "fields", "files", "limits", "reading"},
    {"preprocess", "manifest", "bundle", "data", "metrics", "targets", "task"},
    {"engines"},
    {"predictor", "bench", "cli", "__init__"},
)
LEVEL = {name: i for i, names in enumerate(LEVELS) for name in names}
DEVICE_PACKAGES = {
    *("numpy", "PIL", "tokenizers", "typer", "rich", "msgspec"),  # the base install
    *("onnxruntime", "soundfile", "av", "matplotlib", "pynvml"),  # extras
}
BELOW_MODEL = {"errors", "extras", "fields", "files", "limits", "preprocess", "reading", "task"}
ABOVE = {  # who must not be imported by whom
    "mope_deploy": {"train", "export", "benchmarks", "examples", "tests"},
    "train": {"export", "benchmarks", "examples", "tests"},
    "export": {"train", "benchmarks", "examples", "tests"},
    "benchmarks": {"examples", "tests"},
    "examples": {"benchmarks", "tests"},
}
MOST_LINES = 400


def piece(name: str) -> str:
    """``mope_deploy.engines.session`` → ``engines``: the piece of mope_deploy that a dotted name belongs to."""
    second = name.split(".")[1:2]
    return second[0] if second and second[0] in {*LEVEL, "model"} else "__init__"


def none(found: Iterable[str]) -> None:
    if said := list(found):
        pytest.fail("\n".join(said), pytrace=False)


def test_every_module_of_the_device_side_has_a_level() -> None:
    modules = [name for name in files("mope_deploy") if name != "mope_deploy"]
    unknown = [name for name in modules if name.split(".")[1] not in {*LEVEL, "model"}]
    assert not unknown, f"at no level, add them to LEVELS: {unknown}"
    assert {name.split(".")[1] for name in modules} == {*LEVEL, "model"} - {"__init__"}


def wrong_ways(modules: Mapping[str, Path]) -> Iterator[str]:
    """Imports that go up or out."""
    for module, path in modules.items():
        top = module.partition(".")[0]
        for name, line in imports_of(module, path).items():
            other = name.partition(".")[0]
            if other == "mope_deploy" == top:
                wrong = _wrong_in_mope_deploy(piece(module), name)
            elif other in PACKAGES:
                wrong = other in ABOVE[top]
            else:
                device = top == "mope_deploy" and piece(module) != "model"
                wrong = device and other not in {*DEVICE_PACKAGES, *sys.stdlib_module_names}
            if wrong:
                yield f"{path.relative_to(ROOT)}, line {line}, imports {name}"


def _wrong_in_mope_deploy(mine: str, name: str) -> bool:
    if mine == "model":
        return piece(name) not in {*BELOW_MODEL, "model"} and name != "mope_deploy.__version__"
    return piece(name) == "model" or LEVEL[piece(name)] > LEVEL[mine]


def test_imports_flow_one_way() -> None:
    none(wrong_ways(files(*ABOVE)))


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_goes_in_circles(package: str) -> None:
    """Imports inside functions and under ``TYPE_CHECKING`` counted. Packages cannot form a circle: see ``ABOVE``."""
    none(circles(graph(package)))


def defined(text: str) -> list[str]:
    """What a package's ``__init__`` defines, though it is there to re-export and to say what the package is."""
    return [
        f"line {node.lineno}: {ast.unparse(node).splitlines()[0]}"
        for node in ast.parse(text).body
        if not _re_exports(node)
    ]


def _re_exports(node: ast.stmt) -> bool:
    match node:
        case ast.Import() | ast.ImportFrom() | ast.Expr(value=ast.Constant(value=str())):
            return True
        case ast.Assign(targets=[ast.Name(id="__all__" | "__version__")]) | ast.FunctionDef(name="__getattr__"):
            return True  # a module's __getattr__ re-exports what is slow to import …
        case ast.Assign(targets=[ast.Name(id=name)], value=ast.Dict(values=homes)) if name.startswith("_"):
            return all(isinstance(home, ast.Constant) and isinstance(home.value, str) for home in homes)  # … from here
        case ast.If(test=ast.Name(id="TYPE_CHECKING"), body=body, orelse=[]):
            return all(isinstance(one, ast.ImportFrom) for one in body)
    return False


def test_init_files_only_re_export() -> None:
    none(
        f"{path.relative_to(ROOT)}, {what}"
        for path in files(*PACKAGES).values()
        if path.name == "__init__.py"
        for what in defined(path.read_text(encoding="utf-8"))
    )


def test_files_are_short() -> None:
    lines = {str(path.relative_to(ROOT)): path.read_bytes().count(b"\n") for path in files(*PACKAGES).values()}
    none(f"{name} has {n} lines, over {MOST_LINES}" for name, n in lines.items() if n > MOST_LINES)


# --- each check finds what is planted ---

PLANTED = """
import torch.nn as nn
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from mope_deploy.model import MoPE
def f():
    from .. import predictor
    from . import session
    require("timm", extra="model", purpose="x")
    importlib.import_module("transformers")
"""


def test_every_kind_of_import_is_found() -> None:
    assert dict(imported(PLANTED, "mope_deploy.engines.open", is_package=False)) == {
        "torch.nn": 2,
        "typing.TYPE_CHECKING": 3,
        "mope_deploy.model.MoPE": 5,
        "mope_deploy.predictor": 7,
        "mope_deploy.engines.session": 8,
        "timm": 9,
        "transformers": 10,
    }
    assert dict(imported("from . import session", "mope_deploy.engines", is_package=True)) == {
        "mope_deploy.engines.session": 1
    }


def plant(folder: Path, monkeypatch: pytest.MonkeyPatch, **modules: str) -> None:
    """Modules under another root: ``export__graph__lint="import torch"``; a package's own file ends in ``__``."""
    monkeypatch.setattr("tests.imports.ROOT", folder)
    monkeypatch.setitem(globals(), "ROOT", folder)
    for name, text in modules.items():
        path = folder / (
            name.replace("__", "/") + "__init__.py" if name.endswith("__") else name.replace("__", "/") + ".py"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def test_a_circle_is_found_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(
        tmp_path,
        monkeypatch,
        export__="from export.pipeline import export\n",
        export__pipeline="from export.graph import lint\n\n\ndef export():\n    from export import recheck\n",
        export__graph__="",
        export__graph__lint="if TYPE_CHECKING:\n    from export.pipeline import Options\n",
        export__recheck="import importlib\n\npipeline = importlib.import_module('export.pipeline')\n",
        export__limits="import math\n",
    )
    (said,) = circles(graph("export"))
    assert said.splitlines() == [
        "3 modules import each other, such as",
        "    export.graph.lint, line 2, imports export.pipeline",
        "    export.pipeline, line 1, imports export.graph.lint",
    ]


def test_a_package_and_its_module_are_a_circle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(
        tmp_path,
        monkeypatch,
        train__data__="from train.data.rows import Rows\n\nLIMIT = 3\n",
        train__data__rows="def rows():\n    from train.data import LIMIT\n",
        train__own="from . import data\n",
    )
    assert [said.splitlines()[0] for said in circles(graph("train"))] == ["2 modules import each other, such as"]


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("mope_deploy__engines__open", "import torch"),
        ("mope_deploy__engines__open", "from mope_deploy import predictor"),
        ("mope_deploy__data", "from mope_deploy.model import MoPE"),
        ("mope_deploy__model__heads", "from mope_deploy.bundle import Bundle"),
        ("mope_deploy__model__heads", "import train.recipe"),
        ("train__cli", "from export import options"),
        ("export__cli", "require('train.cli')"),
        ("export__cli", "from tests import tiny"),
    ],
)
def test_a_wrong_way_is_found(module: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(tmp_path, monkeypatch, **{module: f"import math\n\n{text}\n"})
    (said,) = wrong_ways(files(module.partition("__")[0]))
    assert said.startswith(f"{module.replace('__', '/')}.py, line 3, imports ")


def test_a_definition_in_an_init_file_is_found() -> None:
    allowed = '"""What it is."""\n\nfrom a import b\n\n__all__ = ["b"]\n\n\ndef __getattr__(name):\n    return b\n'
    assert defined(allowed) == []
    assert defined("if TYPE_CHECKING:\n    from a import b\n") == []
    assert defined("from a import b\n\nLIMIT = 3\n\n\nclass C:\n    pass\n") == [
        "line 3: LIMIT = 3",
        "line 6: class C:",
    ]
    assert defined('_HOMES = {"b": "a"}\n') == []
    assert defined('_HOMES = {"b": f()}\n') == ["line 1: _HOMES = {'b': f()}"]
    assert defined("if TYPE_CHECKING:\n    x = 1\n") == ["line 1: if TYPE_CHECKING:"]
