"""The README's commands, run as they are written, on a user's own files; only the encoders are local ones."""

from __future__ import annotations

import json
import random
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from PIL import Image

import export.cli
import mope_deploy.cli
import train.cli
from tests.tiny import bert_folder, vit_folder

ROOT = Path(__file__).parent.parent
COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255)}
MAIN: dict[str, Callable[[Sequence[str]], int]] = {
    "python -m train": train.cli.main,
    "mope-export": export.cli.main,
    "mope": mope_deploy.cli.main,
}


def commands(heading: str) -> list[str]:
    """The lines of the shell block under a heading of the README."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.split(f"## {heading}", 1)[1].split("\n## ", 1)[0]
    found = re.search(r"```sh\n(.*?)```", section, re.DOTALL)
    assert found, f"no shell block under {heading!r}"
    return found.group(1).strip().splitlines()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: photographs, three JSONL files, and two encoders."""
    folder = tmp_path_factory.mktemp("user")
    random.seed(0)
    (folder / "photos").mkdir()
    for colour, rgb in COLOURS.items():
        for i in range(4):
            Image.new("RGB", (40 + 7 * i, 30), rgb).save(folder / "photos" / f"{colour}{i}.jpg")
    Image.new("RGB", (64, 48), COLOURS["red"]).save(folder / "photo.jpg")
    for split, count in (("train", 48), ("validation", 16), ("test", 24)):
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for _ in range(count):
                shown, said = random.choice(list(COLOURS)), random.choice(list(COLOURS))
                label = "entailment" if shown == said else "contradiction"
                row = {"image": f"photos/{shown}{random.randrange(4)}.jpg", "text": f"the {said} card", "label": label}
                file.write(json.dumps(row) + "\n")
    vit_folder(folder / "vit")
    bert_folder(folder / "bert")
    return folder


def test_five_commands_on_one_s_own_data(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    lines = commands("Your own data in five commands")
    assert len(lines) == 5
    for line in lines:
        command = next(name for name in MAIN if line.startswith(name + " "))
        arguments = shlex.split(line[len(command) :])
        if command == "python -m train":  # no hub in a test, and no need for ten epochs
            arguments += ["model.main.source=dir:vit", "model.complementary.0.source=dir:bert", "train.epochs=2"]
        code = MAIN[command](arguments)
        said = capfd.readouterr()
        assert code == 0, f"{line}\n{said.out}\n{said.err}"
    assert (workplace / "runs/mine/expert_usage.png").is_file()
    assert (workplace / "bundles/mine/manifest.json").is_file()
    assert "entailment" in said.out or "contradiction" in said.out

    python = (ROOT / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    exec(compile(python, "README.md", "exec"), {})
    assert re.search(r"(entailment|contradiction) \{", capfd.readouterr().out)
