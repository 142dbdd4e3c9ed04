"""A model small enough to be written twice: as a graph (graph.py) and, here, as float64 loops that are its oracle.

Imports only what a device has: these files also run under Python 3.10 with the oldest supported packages.
"""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from mope_deploy.preprocess import ImageSpec, Preprocessing, TextSpec

SIZE, WIDTH, LAYERS, EXPERTS = 8, 6, 3, 4
LABELS = ("entailment", "neutral", "contradiction")
WORDS = ["the", "card", "is", "red", "green", "blue", "seven", "four", "even", "odd", "not", "left", "of", "café", "数"]
VOCABULARY = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
MAX_LENGTH = 12
IMAGE = ImageSpec(SIZE, SIZE, 9, 9, "center", "bicubic", (0.48, 0.45, 0.4), (0.22, 0.23, 0.25))
TEXT = TextSpec(max_length=MAX_LENGTH, pad_id=0)


def weights() -> dict[str, NDArray[np.float32]]:
    draw = np.random.default_rng(20240312).standard_normal
    shapes = {
        "words": (len(VOCABULARY), WIDTH),
        "pixels": (3 * SIZE * SIZE, WIDTH),
        "head": (WIDTH, len(LABELS)),
        "router": (WIDTH, LAYERS * EXPERTS),
        "stand_in": (1, WIDTH),
    }
    scale = {"words": 1.0, "pixels": 0.05, "head": 0.7, "router": 0.7, "stand_in": 1.0}
    return {name: (scale[name] * draw(shape)).astype(np.float32) for name, shape in shapes.items()}


def oracle(inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[np.float64]]:
    """``logits`` (B, C) and ``routing`` (B, layers, K) in float64, one sample at a time."""
    w = {name: value.astype(np.float64) for name, value in weights().items()}
    logits, routing = [], []
    texts = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    present = inputs.get("text_present", np.ones(len(inputs["pixel_values"]), np.int64))
    for pixels, (ids, mask), there in zip(inputs["pixel_values"], texts, present, strict=True):
        real = [w["words"][token] for token, keep in zip(ids, mask, strict=True) if keep] if there else [*w["stand_in"]]
        hidden = sum(real) / len(real) + pixels.astype(np.float64).reshape(-1) @ w["pixels"]  # (WIDTH,)
        logits.append(hidden @ w["head"])
        layers = []
        for scores in (hidden @ w["router"]).reshape(LAYERS, EXPERTS):
            powers = [math.exp(score - max(scores)) for score in scores]
            layers.append([power / sum(powers) for power in powers])
        routing.append(layers)
    return {"logits": np.array(logits), "routing": np.array(routing)}


def tokenizer_json() -> str:
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", VOCABULARY["[CLS]"]), ("[SEP]", VOCABULARY["[SEP]"])]
    )
    return tokenizer.to_str()


def preprocessing(*, missing: bool = False) -> Preprocessing:
    return Preprocessing(IMAGE, TEXT, tokenizer_json(), missing=("text",) if missing else ())


SAMPLES = (
    ("the card is red", (11, 9)),
    ("the card is not even", (8, 8)),
    ("SEVEN left of four", (30, 13)),
    ("café 数", (5, 21)),
    ("blue", (1, 1)),
    ("the green card is odd not blue not seven left of the red card is it", (64, 64)),
)


def picture(index: int, size: tuple[int, int]) -> Image.Image:
    pixels = np.random.default_rng(index).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def npz(arrays: dict[str, NDArray[Any]]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def write_samples(folder: Path, *, labels: list[Any] | None = None) -> Path:
    """The samples as a data file with its pictures, in ``folder``."""
    rows = []
    for i, (text, size) in enumerate(SAMPLES):
        picture(i, size).save(folder / f"{i}.png")
        row: dict[str, Any] = {"image": f"{i}.png", "text": text, "template": f"t{i % 2}"}
        if labels is not None:
            row["label"] = labels[i]
        rows.append(json.dumps(row, ensure_ascii=False))
    path = folder / "data.jsonl"
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def tensor(name: str, dtype: str, shape: list[Any], range: list[float] | None = None) -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "shape": shape, "range": range}


def manifest(**changes: Any) -> dict[str, Any]:
    """A manifest of today's schema for the tiny model, without ``files``."""
    graph = {
        "name": "model",
        "file": "model.onnx",
        "data": [],
        "precision": "fp32",
        "opset": 18,
        "ir_version": 10,
        "runs_on": "any",
        "inputs": [
            tensor("pixel_values", "float32", ["batch", 3, SIZE, SIZE]),
            tensor("input_ids", "int64", ["batch", "text_length"], [0, len(VOCABULARY) - 1]),
            tensor("attention_mask", "int64", ["batch", "text_length"], [0, 1]),
        ],
        "outputs": [
            tensor("logits", "float32", ["batch", len(LABELS)]),
            tensor("routing", "float32", ["batch", LAYERS, EXPERTS], [0, 1]),
        ],
        "tolerance": {"logits": 1e-5, "routing": 1e-5},
        "gate": None,
        "parts": [],
    }
    return {
        "name": "tiny",
        "created": "2025-01-31T12:00:00Z",
        "versions": {"mope-deploy": "0.1.0"},
        "task": {"type": "single-label", "labels": list(LABELS), "threshold": None},
        "modalities": {"main": "image", "complementary": ["text"]},
        "preprocess": {**preprocessing().to_dict(), "tokenizer": "tokenizer.json"},
        "graphs": [graph],
        "routing": {"layers": LAYERS, "experts": EXPERTS, "top_k": None},
        "golden": {
            "samples": "golden/samples.jsonl",
            "inputs": "golden/inputs.npz",
            "outputs": "golden/outputs.npz",
        },
        "parity": {"report": "parity.json", "figures": {"logits_error": 1.2e-7, "samples": 6, "passed": True}},
        "build": None,
        **changes,
    }


def split(document: dict[str, Any], *, missing: bool = False) -> dict[str, Any]:
    """The manifest of the same model as two files, as ``--split`` writes them; ``missing``: a stand-in for texts."""
    graph = document["graphs"][0]
    pixels, *texts = graph["inputs"]
    row = tensor("conditions_text", "float32", ["batch", 2 * WIDTH])
    part = {
        "modality": "text",
        "file": "model.text.onnx",
        "data": [],
        "inputs": texts,
        "outputs": [tensor("y_text", "float32", ["batch", WIDTH]), row],
    }
    if missing:
        part["inputs"] = [*texts, tensor("text_present", "int64", ["batch"], [0, 1])]
        document = {**document, "preprocess": {**document["preprocess"], "missing": ["text"]}}
    changes = {"runs_on": "onnxruntime", "inputs": [pixels, row], "parts": [part]}
    return {**document, "graphs": [{**graph, **changes}]}


def files(graph: Path, *, missing: bool = False) -> dict[str, Path | bytes]:
    """Every file of the tiny bundle; golden outputs come from the oracle, not from any engine."""
    pictures = [picture(i, size) for i, (_, size) in enumerate(SAMPLES)]
    texts: list[str | None] = [text for text, _ in SAMPLES]
    if missing:
        texts[2] = None
    made = preprocessing(missing=missing)
    inputs = made.collate([{"image": p, "text": t} for p, t in zip(pictures, texts, strict=True)])
    outputs = {name: value.astype(np.float32) for name, value in oracle(inputs).items()}
    rows = [
        json.dumps({"image": f"{i}.png"} | ({} if text is None else {"text": text})) for i, text in enumerate(texts)
    ]
    return {
        "model.onnx": graph,
        "tokenizer.json": tokenizer_json().encode(),
        "golden/samples.jsonl": "\n".join(rows).encode(),
        **{f"golden/{i}.png": png(p) for i, p in enumerate(pictures)},
        "golden/inputs.npz": npz(inputs),
        "golden/outputs.npz": npz(outputs),
        "parity.json": b"{}",
    }
