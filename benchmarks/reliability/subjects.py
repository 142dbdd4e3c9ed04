"""What damaged inputs are given to, and what is right: refused in one line, or used as what it says.

Each subject takes a kit and a folder to write to, and returns what tries one mutant: it returns what is wrong, or None
where all is well, and raises :class:`MopeError` where the input is refused.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from benchmarks.reliability.kit import Kit
from benchmarks.reliability.mutate import mutate_bytes, mutate_json

__all__ = ["SUBJECTS", "Try"]

Try = Callable[[Random], str | None]
_OTHERS = ("tokenizer.json", "golden/samples.jsonl", "golden/inputs.npz", "golden/0.png", "model.onnx")


def _mutant(source: bytes, random: Random) -> bytes:
    """Of a document its values or its bytes."""
    if random.random() < 0.7:
        return mutate_json(source.decode("utf-8"), random).encode("utf-8", "surrogatepass")
    return mutate_bytes(source, random)


def manifests(kit: Kit, folder: Path) -> Try:
    """A bundle's manifest. One that is used says what the exporter wrote."""
    from mope_deploy.bundle import Bundle

    copied = Path(shutil.copytree(kit.bundle, folder / "bundle"))
    source = (kit.bundle / "manifest.json").read_bytes()
    original = json.loads(source)

    def attempt(random: Random) -> str | None:
        (copied / "manifest.json").write_bytes(_mutant(source, random))
        Bundle.open(copied)
        said = json.loads((copied / "manifest.json").read_bytes())
        return None if said == original else "a manifest that says something else was used"

    return attempt


def strangers(kit: Kit, folder: Path) -> Try:
    """A bundle that someone else sealed: its files fit its manifest, and one of them is damaged."""
    from mope_deploy.bundle import write_bundle
    from mope_deploy.predictor import load

    manifest = json.loads((kit.bundle / "manifest.json").read_bytes())
    files: dict[str, Path | bytes] = {name: kit.bundle / name for name in manifest["files"]}
    kept = {key: value for key, value in manifest.items() if key not in ("files", "digest", "seal")}

    def attempt(random: Random) -> str | None:
        name = random.choice(_OTHERS)
        source = (kit.bundle / name).read_bytes()
        damaged = _mutant(source, random) if name == "tokenizer.json" else mutate_bytes(source, random)
        shutil.rmtree(folder / "bundle", ignore_errors=True)
        write_bundle(folder / "bundle", files={**files, name: damaged}, manifest=kept)
        predictor = load(folder / "bundle", engine="onnxruntime", threads=1)
        found = predictor.predict(image=kit.bundle / "golden/1.png", text="the red card")
        assert not isinstance(found, list)
        return _wrong_probabilities(list(found.probabilities.values()))

    return attempt


def media(kit: Kit, folder: Path, *, modality: str) -> Try:
    """A picture, a sound or a clip. One that is used becomes an array of the documented form."""
    from mope_deploy.preprocess.audio import AudioSpec
    from mope_deploy.preprocess.image import ImageSpec
    from mope_deploy.preprocess.video import VideoSpec

    pixels = {"height": 24, "width": 24, "mean": [0.5] * 3, "std": [0.5] * 3}
    image = ImageSpec.from_dict({**_image_defaults(kit), **pixels})
    specs: dict[str, Any] = {
        "image": image,
        "audio": AudioSpec(
            form="waveform", sample_rate=16_000, max_samples=16_000, fixed=False, min_samples=400, normalise=True
        ),
        "video": VideoSpec(image=image, frames=4, max_seconds=10.0, sampling="uniform"),
    }
    forms = {"image": ("uint8", (24, 24, 3)), "audio": ("float32", (None,)), "video": ("uint8", (4, 24, 24, 3))}
    kinds = {"image": ("picture", "progressive", "grey16"), "audio": ("sound",), "video": ("clip",)}[modality]
    sources = sorted(path for path in kit.media.iterdir() if path.stem in kinds)

    def attempt(random: Random) -> str | None:
        source = random.choice(sources)
        path = folder / f"mutant{source.suffix}"
        path.write_bytes(mutate_bytes(source.read_bytes(), random))
        array = specs[modality].load(path)
        dtype, shape = forms[modality]
        fits = array.dtype == dtype and len(array.shape) == len(shape)
        fits = fits and all(axis is None or axis == size for axis, size in zip(shape, array.shape, strict=True))
        return None if fits and array.size and np.isfinite(array).all() else f"became {array.dtype} {array.shape}"

    return attempt


def rows(kit: Kit, folder: Path) -> Try:
    """A file of rows. Those that are used say what stands there."""
    from mope_deploy.data import open_samples
    from mope_deploy.task import SingleLabel

    lines = kit.rows.read_text(encoding="utf-8").splitlines()

    def attempt(random: Random) -> str | None:
        chosen = [line.encode() for line in random.sample(lines, 4)]
        at = random.randrange(4)
        chosen[at] = _mutant(chosen[at], random)
        path = folder / "rows.jsonl"
        path.write_bytes(b"\n".join(chosen) + b"\n")
        skip_bad = random.random() < 0.5
        samples = open_samples(path, task=SingleLabel(), skip_bad=skip_bad, modalities=("image", "text"))
        said = dict(enumerate(path.read_bytes().split(b"\n"), start=1))
        for sample in samples:
            row = json.loads(said[sample.line])
            if sample.text != row["text"] or str(sample.label) != str(row["label"]):
                return f"line {sample.line} was read as {sample.text!r}, {sample.label!r}"
        return None

    return attempt


def recipes(kit: Kit, folder: Path) -> Try:
    """A recipe. One that is used says the same once it was written down again."""
    import yaml

    from train.recipe import check_recipe, read_recipe, to_yaml

    source = kit.recipe.read_bytes()
    document = json.dumps(yaml.safe_load(source))
    odd = (
        "&a [*a]",
        "!!python/object:os.system x",
        "!!float x",
        "!!timestamp x",
        "1" * 5000,
        "{<<: {a: 1}}",
        "!x y",
        ".inf",
    )

    def attempt(random: Random) -> str | None:
        kind = random.random()
        if kind < 0.6:
            mutant = mutate_json(document, random).encode("utf-8", "surrogatepass")
        elif kind < 0.8:
            mutant = mutate_bytes(source, random)
        else:
            lines = source.decode().splitlines()
            at = random.randrange(len(lines))
            lines[at] = f"{lines[at].partition(':')[0]}: {random.choice(odd)}"
            mutant = "\n".join(lines).encode()
        path = folder / "recipe.yaml"
        path.write_bytes(mutant)
        recipe = check_recipe(read_recipe(str(path)), what="the mutant")
        path.write_text(to_yaml(recipe), encoding="utf-8")
        again = check_recipe(read_recipe(str(path)), what="the mutant")
        return None if again == recipe else "a recipe changes when it is written down"

    return attempt


def checkpoints(kit: Kit, folder: Path) -> Try:
    """A checkpoint. One that is used has the weights that were trained."""
    import torch

    from mope_deploy.model import MoPE

    def weights(path: Path) -> dict[str, torch.Tensor]:
        return MoPE.from_pretrained(path).state_dict()

    copied = Path(shutil.copytree(kit.run / "best", folder / "checkpoint"))
    trained = weights(copied)
    names = sorted(path.name for path in copied.iterdir() if path.suffix in (".json", ".safetensors"))

    def attempt(random: Random) -> str | None:
        name = random.choice(names)
        source = (kit.run / "best" / name).read_bytes()
        (copied / name).write_bytes(_mutant(source, random) if name.endswith(".json") else mutate_bytes(source, random))
        try:
            found = weights(copied)
        finally:
            (copied / name).write_bytes(source)
        if found.keys() == trained.keys() and all(torch.equal(found[key], trained[key]) for key in trained):
            return None
        return f"other weights were loaded beside a damaged {name}"

    return attempt


def _image_defaults(kit: Kit) -> dict[str, object]:
    manifest = json.loads((kit.bundle / "manifest.json").read_bytes())
    return dict(manifest["preprocess"]["image"])


def _wrong_probabilities(found: list[float]) -> str | None:
    if all(math.isfinite(p) and 0 <= p <= 1 for p in found) and abs(sum(found) - 1) < 1e-5:
        return None
    return f"probabilities are {found}"


# name → what tries its mutants, and how many of the whole 10,000 are its
SUBJECTS: dict[str, tuple[Callable[[Kit, Path], Try], int]] = {
    "manifests": (manifests, 3000),
    "bundles of strangers": (strangers, 1000),
    "pictures": (partial(media, modality="image"), 2000),
    "sounds": (partial(media, modality="audio"), 1000),
    "clips": (partial(media, modality="video"), 400),
    "rows": (rows, 1400),
    "recipes": (recipes, 800),
    "checkpoints": (checkpoints, 400),
}
