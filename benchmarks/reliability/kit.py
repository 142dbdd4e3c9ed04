"""What reliability is tried on: a short training of the embedded data, its bundle, and a file of every medium."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import wave
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.child import environment
from mope_deploy.console import err
from mope_deploy.errors import MopeError

__all__ = ["Kit", "command", "make_kit", "make_media"]

_MODULES = {"mope": "mope_deploy", "mope-export": "export.cli", "train": "train"}


@dataclass(frozen=True)
class Kit:
    """Files to damage; never written to."""

    folder: Path

    @property
    def run(self) -> Path:
        """A finished run."""
        return self.folder / "run"

    @property
    def bundle(self) -> Path:
        """Its fp32 bundle."""
        return self.folder / "bundle"

    @property
    def rows(self) -> Path:
        """48 rows of its data, with labels."""
        return self.folder / "rows.jsonl"

    @property
    def recipe(self) -> Path:
        """The recipe that the run was made by."""
        return self.folder / "recipe.yaml"

    @property
    def media(self) -> Path:
        """Pictures, sounds and clips."""
        return self.folder / "media"


def command(name: str, *arguments: object) -> list[str]:
    """The command line of ``mope``, ``mope-export`` or ``train``, as it is typed."""
    return [sys.executable, "-m", _MODULES[name], *map(str, arguments)]


def make_kit(folder: Path) -> Kit:
    """Make what is missing in ``folder``.

    Raises:
        MopeError: a command failed.
    """
    kit = Kit(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not kit.rows.exists():
        from train.embedded.digits_ve import ensure_digits_ve

        data = ensure_digits_ve(folder / "data", train_pairs=96, validation_pairs=24, test_pairs=48)
        for split in ("train", "validation", "test"):
            rows = [json.loads(line) for line in (data / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
            named = ({**row, "image": str((data / row["image"]).absolute())} for row in rows)
            path = kit.rows if split == "test" else folder / f"{split}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in named), encoding="utf-8")
    if not kit.recipe.exists():
        shown = _call("train", "digits-ve", "--show", *_settings(kit)).stdout
        kit.recipe.write_text(shown, encoding="utf-8")
    if not (kit.run / "evaluation.json").exists():
        err.print("training the run that is tried", markup=False)
        _call("train", kit.recipe)
    if not kit.bundle.exists():
        err.print("exporting its bundle", markup=False)
        _call("mope-export", kit.run, "--out", kit.bundle)
    if not kit.media.exists():
        make_media(kit.media)
    return kit


def _settings(kit: Kit) -> Sequence[str]:
    absolute = kit.folder.absolute()
    return (
        "name=reliability",
        "data.name=null",
        f"data.train={absolute / 'train.jsonl'}",
        f"data.validation={absolute / 'validation.jsonl'}",
        f"data.test={absolute / 'rows.jsonl'}",
        "train.epochs=3",
        "baselines=false",
        f"run.dir={absolute / 'run'}",
    )


def _call(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command(name, *arguments), capture_output=True, text=True, env=environment(threads=1), check=False
    )
    if done.returncode:
        raise MopeError(f"{name} left with exit code {done.returncode}: {' '.join(done.stderr.split())[-300:]}")
    return done


def make_media(folder: Path) -> None:
    """Small files of every kind that is read, of noise: it compresses badly, so that much of a file is data."""
    folder.mkdir()
    random = np.random.default_rng(0)
    pixels = random.integers(0, 255, (40, 30, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    for name in ("png", "jpg", "webp", "gif", "bmp", "ppm", "tiff"):
        picture.save(folder / f"picture.{name}")
    picture.save(folder / "progressive.jpg", progressive=True)
    picture.convert("I").convert("I;16").save(folder / "grey16.png")
    samples = (random.standard_normal(4000) * 8000).astype(np.int16)
    with wave.open(str(folder / "sound.wav"), "wb") as file:
        file.setparams((1, 2, 16_000, len(samples), "NONE", ""))
        file.writeframes(samples.tobytes())
    import soundfile

    for name in ("flac", "ogg"):
        soundfile.write(folder / f"sound.{name}", samples, 16_000)
    np.savez(folder / "clip.npz", frames=random.integers(0, 255, (5, 24, 32, 3), dtype=np.uint8))
    import av

    with av.open(str(folder / "clip.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 32, 24, "yuv420p"
        wide = random.integers(0, 255, (5, 24, 32, 3), dtype=np.uint8)
        frames = (av.VideoFrame.from_ndarray(one, "rgb24") for one in wide)
        for frame in itertools.chain(frames, [None]):  # None flushes
            container.mux(stream.encode(frame))
