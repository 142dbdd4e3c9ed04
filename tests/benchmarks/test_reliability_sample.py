"""A sample of the damaged inputs that ``python -m benchmarks reliability`` tries by the thousand: no fault among them.

The kit here is the tiny bundle of the device's tests; checkpoints are damaged in tests/model, and commands killed in
tests/device, tests/train and tests/engines.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from benchmarks.reliability.kit import Kit, make_media
from benchmarks.reliability.subjects import SUBJECTS
from benchmarks.reliability.trial import tried
from mope_deploy.bundle import write_bundle
from tests.device import tiny
from tests.device.graph import write_graph
from train.recipe import load_recipe, to_yaml


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    kit = Kit(tmp_path_factory.mktemp("kit"))
    graph = write_graph(tmp_path_factory.mktemp("graph") / "model.onnx")
    write_bundle(kit.bundle, files=tiny.files(graph), manifest=tiny.manifest())
    make_media(kit.media)
    shutil.copy(kit.media / "picture.png", kit.folder / "a.png")
    rows = [{"image": "a.png", "text": f"text {i}", "label": "ab"[i % 2]} for i in range(6)]
    rows = [row | {"image": str(kit.folder / "a.png")} for row in rows]
    kit.rows.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    kit.recipe.write_text(to_yaml(load_recipe("digits-ve")), encoding="utf-8")
    return kit


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("manifests", 250),
        ("bundles of strangers", 60),
        ("pictures", 150),
        ("sounds", 80),
        ("clips", 60),
        ("rows", 150),
        ("recipes", 60),
    ],
)
def test_no_damaged_input_is_more_than_refused(name: str, count: int, kit: Kit, tmp_path: Path) -> None:
    make, _ = SUBJECTS[name]
    attempt, outcomes = make(kit, tmp_path), Counter[str]()
    for number in range(count):
        outcome, detail = tried(attempt, Random(f"0 {name} {number}"))
        assert outcome in ("used", "refused"), f"mutant {number} of {name}: {outcome}, {detail}"
        outcomes[outcome] += 1
    assert outcomes["refused"] > count / 10
