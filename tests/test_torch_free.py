"""The device side runs where torch cannot be imported, and importing it loads nothing that is not used."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

from tests.device import tiny
from tests.device.graph import write_graph

ROOT = Path(__file__).parents[1]
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
