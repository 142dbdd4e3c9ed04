"""Imports flow one way (docs/architecture.md), and the device side runs where torch cannot be imported.

Every import statement counts, wherever it stands: in a function, under TYPE_CHECKING, or as a name handed to
``importlib.import_module`` or ``mope_deploy.extras.require``.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.device import tiny
from tests.device.graph import write_graph

ROOT = Path(__file__).parents[1]
OURS = ("mope_deploy", "train", "export", "examples", "benchmarks", "tests")

# What may be imported by whom: a module imports its own level and those below it.
LEVELS = (
    {"errors", "extras", "console", "progress", "fields", "files", "paths"},
    {"preprocess", "manifest", "bundle", "data", "metrics", "targets", "task"},
    {"engines"},
    {"predictor", "bench", "cli", "__init__"},
)
LEVEL = {name: i for i, names in enumerate(LEVELS) for name in names}
BELOW_MODEL = {"errors", "extras", "fields", "files", "paths", "preprocess", "task"}
DEVICE_PACKAGES = {"numpy", "PIL", "tokenizers", "typer", "rich", "onnxruntime", "soundfile", "av", "msgspec", "matplotlib", "pynvml"}
HEAVY = (
    "torch",
    "torchvision",
    "timm",
    "transformers",
    "onnx",
    "safetensors",
    "huggingface_hub",
    "datasets",
    "sklearn",
)


def modules(package: str) -> list[str]:
    """Dotted names of every module of a package, tests of their own excluded."""
    found = []
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = list(path.relative_to(ROOT).with_suffix("").parts)
        found.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return found


def source(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def imported(text: str, module: str, is_package: bool) -> Iterator[str]:
    """Dotted names that a module imports; ``from a import b`` gives ``a.b``, which may be a name of ``a``."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join([*here, base] if base else here)
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            if name in ("import_module", "require", "__import__") and isinstance(node.args[0].value, str):
                yield node.args[0].value


def imports(module: str) -> set[str]:
    path = source(module)
    return set(imported(path.read_text(encoding="utf-8"), module, path.name == "__init__.py"))


def part(name: str) -> str:
    """``mope_deploy.engines.session`` → ``engines``: the piece of mope_deploy that a dotted name belongs to."""
    pieces = name.split(".")
    known = {*LEVEL, "model"}
    return pieces[1] if len(pieces) > 1 and pieces[1] in known else "__init__"


DEVICE = [m for m in modules("mope_deploy") if part(m) != "model"]
MODEL = [m for m in modules("mope_deploy") if part(m) == "model"]
STANDARD = set(sys.stdlib_module_names) | {"__future__"}


def test_every_module_has_a_level() -> None:
    for module in DEVICE:
        assert module == "mope_deploy" or module.split(".")[1] in LEVEL, (
            f"{module} stands at no level: add it to LEVELS"
        )
    assert len(DEVICE) > 10
    assert len(MODEL) > 5


@pytest.mark.parametrize("module", DEVICE)
def test_device_side_imports_downwards(module: str) -> None:
    mine = LEVEL[part(module)]
    for name in imports(module):
        top = name.partition(".")[0]
        if top == "mope_deploy":
            assert part(name) != "model", f"{module} imports {name}"
            # `from mope_deploy import console` names no higher module than console
            assert LEVEL[part(name)] <= mine, f"{module} (level {mine}) imports {name} (level {LEVEL[part(name)]})"
        else:
            assert top in STANDARD | DEVICE_PACKAGES, f"{module} imports {name}"


def test_device_side_has_no_cycles() -> None:
    def target(name: str) -> str:
        return max((m for m in DEVICE if f"{name}.".startswith(f"{m}.")), key=len)

    edges = {m: {target(name) for name in imports(m) if name.startswith("mope_deploy")} for m in DEVICE}
    done: set[str] = set()
    while len(done) < len(edges):
        ready = {m for m in edges if m not in done and edges[m] - {m} <= done}
        assert ready, f"these import each other: {sorted(set(edges) - done)}"
        done |= ready


@pytest.mark.parametrize("module", MODEL)
def test_model_imports_little_of_the_device_side(module: str) -> None:
    for name in imports(module):
        top = name.partition(".")[0]
        if top == "mope_deploy":
            assert part(name) in {*BELOW_MODEL, "model"} or name == "mope_deploy.__version__", (
                f"{module} imports {name}"
            )
        assert top not in ("train", "export", "tests", "benchmarks", "examples"), f"{module} imports {name}"


@pytest.mark.parametrize(("package", "other"), [("train", "export"), ("export", "train")])
def test_train_and_export_never_import_each_other(package: str, other: str) -> None:
    found = modules(package)
    assert len(found) > 3
    for module in found:
        for name in imports(module):
            assert name.partition(".")[0] not in (other, "tests", "benchmarks", "examples"), f"{module} imports {name}"


def test_these_checks_bite() -> None:
    text = """
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
    found = set(imported(text, "mope_deploy.engines.open", is_package=False))
    assert found == {
        "torch.nn",
        "typing.TYPE_CHECKING",
        "mope_deploy.model.MoPE",
        "mope_deploy.predictor",
        "mope_deploy.engines.session",
        "timm",
        "transformers",
    }
    assert set(imported("from . import session", "mope_deploy.engines", is_package=True)) == {
        "mope_deploy.engines.session"
    }


# --- the device side, alone ---

BLOCK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HEAVY:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)
sys.meta_path.insert(0, Blocked())
""".replace("HEAVY", repr(HEAVY))

END_TO_END = """
import contextlib, io, json
from mope_deploy import console, load
from mope_deploy.bundle import write_bundle
from mope_deploy.cli import app
from tests.device import tiny

graph, folder = sys.argv[1:]
from pathlib import Path
folder = Path(folder)
bundle = write_bundle(folder / "bundle", files=tiny.files(Path(graph)), manifest=tiny.manifest()).path
data = tiny.write_samples(folder, labels=[tiny.LABELS[i % 3] for i in range(6)])
predictor = load(bundle)
found = predictor.predict(image=folder / "0.png", text="the card is red", routing=True)
checked = predictor.verify()
codes = []
for arguments in (
    ["run", bundle, "--image", folder / "0.png", "--text", "red", "--routing"],
    ["run", bundle, "--data", data, "--out", folder / "out.jsonl"],
    ["eval", bundle, data],
    ["verify", bundle],
    ["info", bundle],
    ["bench", bundle, "--duration", "0.1", "--json", folder / "figures.json", "--plot", folder / "figures.png"],
):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        codes.append(console.run_app(app, [str(a) for a in arguments]))
import mope_deploy.metrics, mope_deploy.data
heavy = sorted({name.partition(".")[0] for name in sys.modules} & set(HEAVY))
print(json.dumps({"label": found.label, "routing": found.routing.shape, "samples": checked.samples,
                  "codes": codes, "rows": len((folder / "out.jsonl").read_text().splitlines()), "heavy": heavy}))
""".replace("HEAVY", repr(HEAVY))


def python(code: str, *arguments: object) -> str:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_block_blocks() -> None:
    code = BLOCK + "\ntry:\n    import timm\nexcept ModuleNotFoundError as error:\n    print(error)"
    assert python(code) == "timm is blocked\n"


def test_device_side_runs_with_torch_blocked(tmp_path: Path) -> None:
    graph = write_graph(tmp_path / "model.onnx")
    (tmp_path / "work").mkdir()
    found = json.loads(python(BLOCK + END_TO_END, graph, tmp_path / "work"))
    assert found.pop("label") in tiny.LABELS
    assert found == {
        "routing": [tiny.LAYERS, tiny.EXPERTS],
        "samples": 6,
        "codes": [0, 0, 0, 0, 0, 0],
        "rows": 6,
        "heavy": [],
    }


def test_import_mope_deploy_imports_nothing_else() -> None:
    code = "import sys; before = set(sys.modules); import mope_deploy; print(sorted(set(sys.modules) - before))"
    loaded = {name.partition(".")[0] for name in ast.literal_eval(python(code))}
    assert loaded - set(sys.stdlib_module_names) == {"mope_deploy"}
    code = "import sys, mope_deploy.cli; print(sorted(sys.modules))"
    loaded = {name.partition(".")[0] for name in ast.literal_eval(python(code))}
    assert not loaded & {*HEAVY, "numpy", "PIL", "tokenizers", "onnxruntime"}  # `mope --help` answers at once
