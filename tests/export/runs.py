"""A tiny data set and a run folder as training leaves it, made without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mope_deploy.model import MoPE
from tests.tiny import LABELS, WORDS

ROWS = 70  # 3 logits each: more than the 128 values that the gate wants


def write_data(folder: Path, *, rows: int = ROWS, labels: tuple[str, ...] = LABELS, seed: int = 0) -> Path:
    """``folder/test.jsonl`` with random pictures of awkward sizes and sentences of 1 to 9 known words."""
    random = np.random.default_rng(seed)
    (folder / "pictures").mkdir(parents=True)
    for i in range(12):
        size = tuple(random.integers(20, 60, 2).tolist())
        pixels = random.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{i}.png")
    lines = []
    for i in range(rows):
        words = random.choice(WORDS[5:], random.integers(1, 10))
        row = {"image": f"pictures/{i % 12}.png", "text": " ".join(words), "label": labels[i % len(labels)]}
        lines.append(json.dumps(row) + "\n")
    file = folder / "test.jsonl"
    file.write_text("".join(lines), encoding="utf-8")
    return file


def write_run(folder: Path, model: MoPE, data: Path, **changes: Any) -> Path:
    """A run folder of ``model`` with the documented keys of ``run.json``; ``changes`` replace some of them."""
    folder.mkdir(parents=True)
    model.save_pretrained(folder / "best", standalone=True)
    description = {
        "schema": 1,
        "command": "python -m train tiny.yaml",
        "status": "finished",
        "checkpoint": "best",
        "data": {"test": str(data), "validation": str(data)},
        "metrics": {"test": {"accuracy": 0.5}},
    }
    (folder / "run.json").write_text(json.dumps(description | changes), encoding="utf-8")
    return folder
