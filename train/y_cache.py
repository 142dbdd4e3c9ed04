"""Features of frozen encoders on disk, so that no later run computes them again.

A folder per encoder, named by everything that its features depend on; in it a file per computation (a *shard*), with
features and the keys of what they are features of. A shard is written whole or not at all, and never changed: runs
that compute the same at once write the same. What cannot be proved to be as it was written is computed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from mope_deploy.console import err
from mope_deploy.engines.onnxruntime.providers import cache_root
from mope_deploy.errors import DataError
from mope_deploy.extras import installed_versions
from mope_deploy.model.backbones import Encoder as Backbone
from mope_deploy.model.backbones.sources import fingerprint
from mope_deploy.preprocess import Preprocessing

__all__ = ["YCache", "batch_keys", "cache_folder", "encoder_key"]

SCHEMA = 1  # raised whenever this project computes features in another way
DIGEST = 32  # bytes of SHA-256
STALE_S = 86_400.0  # a temporary file as old as that belongs to no running process
# Versions that may change the values of features, beyond those that prepare one kind of input.
PACKAGES = ("mope-deploy", "torch", "timm", "transformers", "numpy")
READERS = {"image": ("Pillow",), "text": ("tokenizers",), "audio": ("soundfile", "av"), "video": ("av", "Pillow")}


def cache_folder(choice: str) -> Path | None:
    """Where ``train.y_cache`` says that features are kept; None for nowhere.

    ``auto``: ``y`` in :func:`mope_deploy.engines.onnxruntime.providers.cache_root`.
    """
    if choice == "off":
        return None
    if choice != "auto":
        return Path(choice).expanduser()
    root = cache_root()
    return None if root is None else root / "y"


@dataclass
class YCache:
    """A folder of features, up to a stated size.

    Args:
        folder: made where it is not there.
        limit_mb: largest size of all files in it in MiB; those not used for the longest time go first.
    """

    folder: Path
    limit_mb: int
    _told: bool = field(default=False, repr=False)

    def read(self, encoder: str, samples: Sequence[bytes], *, width: int) -> tuple[Tensor, Tensor]:
        """What is there of ``samples``.

        Args:
            encoder: from :func:`encoder_key`.
            samples: n keys from :func:`batch_keys`.
            width: D_y.

        Returns:
            Features float32 (n, D_y), and which of them were found, bool (n,); the others are zeros.
        """
        features, found = torch.zeros(len(samples), width), torch.zeros(len(samples), dtype=torch.bool)
        wanted = {key: i for i, key in enumerate(samples)}
        for shard in sorted((self.folder / encoder).glob("*.safetensors")):
            loaded = _load(shard, encoder, width=width)
            if loaded is None:
                continue
            keys, values = loaded
            flat = keys.numpy().tobytes()
            there = [wanted.get(flat[i : i + DIGEST], -1) for i in range(0, len(flat), DIGEST)]
            rows = torch.tensor([row for row, i in enumerate(there) if i >= 0], dtype=torch.long)
            if len(rows):
                targets = torch.tensor(there)[rows]
                features[targets], found[targets] = values[rows], True
                with contextlib.suppress(OSError):  # used just now; a folder that is read-only stays as it is
                    os.utime(shard)
            if bool(found.all()):
                break
        return features, found

    def write(self, encoder: str, samples: Sequence[bytes], features: Tensor) -> None:
        """Keep features float32 (n, D_y) of n samples; a notice, once, where that is not possible."""
        if not samples:
            return
        keys = torch.frombuffer(bytearray(b"".join(samples)), dtype=torch.uint8).reshape(-1, DIGEST)
        features = features.contiguous()
        content = save({"keys": keys, "y": features}, {"digest": _digest(encoder, keys, features)})
        if len(content) > self.limit_mb * 2**20:
            self._tell(f"{len(content) / 2**20:,.0f} MiB of features are more than train.y_cache_disk_mb allows")
            return
        folder = self.folder / encoder
        name = hashlib.sha256(keys.numpy().tobytes()).hexdigest()[:32]
        staging = folder / f".{name}.{os.getpid()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            staging.write_bytes(content)
            staging.replace(folder / f"{name}.safetensors")
        except OSError as error:
            with contextlib.suppress(OSError):
                staging.unlink(missing_ok=True)
            self._tell(f"features cannot be kept in {self.folder}: {error.strerror or error}")
            return
        self._shrink(keep=folder / f"{name}.safetensors")

    def _shrink(self, *, keep: Path) -> None:
        """Remove the files used longest ago until the rest is within the limit, and what killed processes left."""
        with contextlib.suppress(OSError):
            for left in self.folder.glob("*/.*"):
                if left.stat().st_mtime < time.time() - STALE_S:
                    left.unlink(missing_ok=True)
        shards = sorted(_states(self.folder.glob("*/*.safetensors")), key=lambda state: state[1])
        total = sum(size for _, _, size in shards)
        for path, _, size in shards:
            if total <= self.limit_mb * 2**20:
                return
            if path != keep:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
                total -= size

    def _tell(self, what: str) -> None:
        if not self._told:
            self._told = True
            err.print(f"note: {what}; the next run computes them again (train.y_cache)", markup=False)


def encoder_key(backbone: Backbone, preprocessing: Preprocessing, modality: str, *, device: torch.device) -> str:
    """A name for everything that a feature depends on, its batch apart.

    That is the encoder's weights, architecture and options; how an input is prepared; the versions of what computes;
    and what decides how sums are rounded: device, threads, precision of products.
    """
    encoder = backbone.encoder
    tokenizer = (preprocessing.tokenizer or "") if modality == "text" else ""
    packages = (*PACKAGES, *READERS[modality])
    versions = installed_versions(packages)
    parts = {
        "schema": SCHEMA,
        "backbone": type(backbone).__name__,
        "weights": fingerprint(encoder),
        "architecture": _architecture(encoder),
        "preprocess": preprocessing.to_dict()[modality],
        "tokenizer": hashlib.sha256(tokenizer.encode()).hexdigest(),
        "versions": {name: versions.get(name) for name in packages},
        "device": _device(device),
        "products": torch.get_float32_matmul_precision(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def batch_keys(modality: str, values: Sequence[str]) -> list[bytes]:
    """The key of each input of a batch: its place, and the content of all of them, in order.

    Not of one alone: batch-mates and padding decide how sums are rounded, and what is found must be what computing
    would give.

    Args:
        modality: of the batch.
        values: texts, or paths of files.

    Raises:
        DataError: a file cannot be read.
    """
    together = hashlib.sha256(b"".join(_content(modality, value) for value in values)).digest()
    return [hashlib.sha256(together + place.to_bytes(4, "big")).digest() for place in range(len(values))]


def _content(modality: str, value: str) -> bytes:
    """SHA-256 of a text, or of the content of a file at path ``value``."""
    if modality == "text":
        return hashlib.sha256(value.encode()).digest()
    try:
        with open(value, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise DataError(f"{value} cannot be read: {error.strerror or error}") from error


def _architecture(encoder: nn.Module) -> list[Any]:
    """What weights do not tell: numbers of heads, epsilons, activations, as its modules hold them."""
    # Where it was loaded from, by which version, and its mode (it is always that of evaluation) change nothing.
    outer = {"name_or_path", "_name_or_path", "transformers_version", "training"}
    found: list[Any] = []
    for name, module in encoder.named_modules():
        plain = {key: value for key, value in vars(module).items() if isinstance(value, bool | int | float | str)}
        found.append([name, type(module).__name__, {key: plain[key] for key in plain.keys() - outer}])
    config = getattr(encoder, "config", None)
    if config is not None:
        found.append({key: value for key, value in config.to_dict().items() if key not in outer})
    return found


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, tf32 {torch.backends.cudnn.allow_tf32}"
    return f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def _load(shard: Path, encoder: str, *, width: int) -> tuple[Tensor, Tensor] | None:
    """Keys uint8 (n, 32) and features float32 (n, D_y) of a shard; None, with a notice, where it is damaged."""
    try:
        with safe_open(shard, "pt") as file:
            keys, features = file.get_tensor("keys"), file.get_tensor("y")
            digest = (file.metadata() or {}).get("digest")
    except FileNotFoundError:
        return None  # another run has just removed it to keep within the limit
    except (OSError, SafetensorError) as error:
        _remove(shard, str(error))
        return None
    if digest != _digest(encoder, keys, features) or features.shape != (len(keys), width):
        _remove(shard, "its content is not what was written")
        return None
    return keys, features


def _remove(shard: Path, why: str) -> None:
    err.print(f"note: {shard} is damaged ({why}); its features are computed again", markup=False)
    with contextlib.suppress(OSError):
        shard.unlink(missing_ok=True)


def _digest(encoder: str, keys: Tensor, features: Tensor) -> str:
    digest = hashlib.sha256(encoder.encode())
    for tensor in (keys, features):
        digest.update(f"|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _states(paths: Iterable[Path]) -> Iterator[tuple[Path, float, int]]:
    """Path, time of last use and size of each file that is still there."""
    for path in paths:
        with contextlib.suppress(OSError):
            state = path.stat()
            yield path, state.st_mtime, state.st_size
