"""Run a bundle without mope-deploy: onnxruntime, numpy, Pillow and tokenizers alone.

    python plain_onnxruntime.py BUNDLE picture.png "a text"

Everything it needs to know stands in the bundle's manifest.json (docs/bundle.md). What the library adds and this leaves
out: hashes, limits on what is read, 16-bit images, clear errors.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps
from tokenizers import Tokenizer


def read_image(path: str | Path, spec: dict) -> np.ndarray:
    """A picture → float32 (1, 3, H, W)."""
    image = ImageOps.exif_transpose(Image.open(path))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image.convert("RGBA"))
    image = image.convert("RGB")
    filter_ = Image.Resampling[spec["interpolation"].upper()]
    pixels = np.asarray(image.resize(resized(image.size, spec), filter_))  # (h, w, 3)
    border = [round(255 * mean) for mean in spec["mean"]] if spec["crop_mode"] == "border" else [0, 0, 0]
    pixels = center_crop(pixels, spec["height"], spec["width"], border)
    x = pixels.transpose(2, 0, 1)[None].astype(np.float32) / np.float32(255)  # (1, 3, H, W)
    mean, std = (np.float32(spec[key]).reshape(1, 3, 1, 1) for key in ("mean", "std"))
    return (x - mean) / std


def resized(size: tuple[int, int], spec: dict) -> tuple[int, int]:
    """(width, height) after the resize that comes before the crop."""
    (width, height), (to_width, to_height) = size, (spec["resize_width"], spec["resize_height"])
    if spec["crop_mode"] == "squash":
        return to_width, to_height
    if spec["crop_mode"] == "center" and to_width == to_height:  # the shorter side meets it, the longer is rounded down
        short = min(width, height)
        return (to_width if width == short else int(to_width * width / short)), (
            to_width if height == short else int(to_width * height / short)
        )
    choose = max if spec["crop_mode"] == "border" else min
    ratio = choose(height / to_height, width / to_width)
    return round(width / ratio), round(height / ratio)


def center_crop(pixels: np.ndarray, height: int, width: int, border: list[int]) -> np.ndarray:
    """(h, w, 3) → (height, width, 3), padded with the colour ``border`` where it is too small."""
    h, w = max(pixels.shape[0], height), max(pixels.shape[1], width)
    canvas = np.full((h, w, 3), border, np.uint8)
    top, left = (h - pixels.shape[0]) // 2, (w - pixels.shape[1]) // 2
    canvas[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
    top, left = round((h - height) / 2), round((w - width) / 2)
    return canvas[top : top + height, left : left + width]


def read_text(text: str, tokenizer: Tokenizer, max_length: int) -> dict[str, np.ndarray]:
    """A text → its token ids and mask, int64 (1, T). One text needs no padding."""
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)
    ids = np.array([tokenizer.encode(text).ids], np.int64)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def run(bundle: Path, file: dict, feeds: dict[str, np.ndarray], output: str) -> np.ndarray:
    """One output of one ONNX file; ``feeds`` may have more than it reads."""
    session = onnxruntime.InferenceSession(str(bundle / file["file"]), providers=["CPUExecutionProvider"])
    (found,) = session.run([output], {tensor["name"]: feeds[tensor["name"]] for tensor in file["inputs"]})
    return found


def predict(bundle: Path, image: str | Path, text: str) -> dict[str, float]:
    """Probability of every label."""
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    if manifest["schema"] != 4:
        raise SystemExit(f"this example reads bundles of schema 4, not {manifest['schema']}")
    prepare, task = manifest["preprocess"], manifest["task"]
    graph = next(graph for graph in manifest["graphs"] if graph["runs_on"] in ("any", "onnxruntime"))
    feeds = {}
    if prepare["image"] is not None:
        feeds["pixel_values"] = read_image(image, prepare["image"])
    if prepare["text"] is not None:
        tokenizer = Tokenizer.from_file(str(bundle / prepare["tokenizer"]))
        feeds |= read_text(text, tokenizer, prepare["text"]["max_length"])
    for part in graph["parts"]:  # of a graph exported with --split: each gives the main file one of its inputs
        name = f"conditions_{part['modality']}"
        feeds[name] = run(bundle, part, feeds, name)  # (1, F); keep it for as long as this input stays the same
    x = run(bundle, graph, feeds, "logits")[0].astype(np.float64)  # (C,)
    if task["type"] == "multi-label":  # every label with at least task["threshold"] applies
        probabilities = 1 / (1 + np.exp(-x))
    else:
        probabilities = np.exp(x - x.max()) / np.exp(x - x.max()).sum()
    return dict(zip(task["labels"], probabilities.tolist(), strict=True))


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit('usage: python plain_onnxruntime.py BUNDLE picture.png "a text"')
    print(json.dumps(predict(Path(sys.argv[1]), sys.argv[2], sys.argv[3]), indent=2, ensure_ascii=False))
