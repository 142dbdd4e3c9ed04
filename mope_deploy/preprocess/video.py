"""Video → a clip of a fixed number of frames, each prepared like an image; files are decoded by PyAV (extra ``video``).

Frames are taken uniformly: of T frames, number ``floor((i + ½) · T / F)`` for each i of the F that the encoder reads. A
clip of exactly F frames is taken as it is. A clip may also be an array, or an ``.npz`` file with an array ``frames``,
which needs no decoder: bundles keep their golden clips that way, because lossy codecs differ between machines.

Letters: B batch · T frames of the file · F frames at the encoder · H, W height and width.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mope_deploy.errors import MediaError
from mope_deploy.extras import require
from mope_deploy.fields import between, choice
from mope_deploy.limits import MAX_CLIP_BYTES, MAX_FRAMES
from mope_deploy.preprocess.image import ImageSpec, check_size, fit, normalise
from mope_deploy.preprocess.shared import Notice, Tensors, check_file, describe, one_line

__all__ = ["VideoSource", "VideoSpec", "read_clip"]

VideoSource = str | os.PathLike[str] | NDArray[np.uint8]


@dataclass(frozen=True)
class VideoSpec:
    """How a video becomes what the video encoder reads.

    Args:
        frames: F.
        sampling: ``"uniform"``, over the whole clip.
        max_seconds: what comes later is not looked at.
        image: what becomes of each frame.
    """

    frames: Annotated[int, between(1, 4096)]
    sampling: Annotated[str, choice("uniform")]
    max_seconds: Annotated[float, between(0.01, 86_400)]
    image: ImageSpec

    @property
    def tensors(self) -> Tensors:
        """What the encoder reads: name → dtype and axes."""
        return {"video_values": ("float32", ("batch", self.frames, 3, self.image.height, self.image.width))}

    def load(self, source: VideoSource, *, on_notice: Notice = lambda _: None) -> NDArray[np.uint8]:
        """Decode, take frames uniformly, and each of them as an image. Deterministic for one release of the decoder.

        Args:
            source: a path of a video, or of an ``.npz`` with ``frames``; or uint8 (frames, H, W, 3) RGB.
            on_notice: told if the clip was cut.

        Returns:
            uint8 (F, height, width, 3) of the encoder.

        Raises:
            MediaError: one line naming the file: missing, empty, not a video that can be decoded, without frames,
                outside the stated limits.
            MissingExtraError: a video file is to be read and PyAV is not installed.
        """
        clip, name = read_clip(source, self, on_notice=on_notice), describe("video", source)
        return np.stack([fit(Image.fromarray(frame), self.image, name) for frame in clip])

    def batch(self, clips: Sequence[NDArray[np.uint8] | None]) -> dict[str, NDArray[Any]]:
        """B results of :meth:`load` → ``video_values`` float32 (B, F, 3, H, W).

        None is a clip that is missing: nothing of what stands in its place reaches the result.
        """
        black = np.zeros((self.frames, self.image.height, self.image.width, 3), np.uint8)
        return {"video_values": normalise(np.stack([black if clip is None else clip for clip in clips]), self.image)}


def read_clip(source: VideoSource, spec: VideoSpec, *, on_notice: Notice = lambda _: None) -> list[NDArray[np.uint8]]:
    """The F frames that the encoder reads, each uint8 (h, w, 3) RGB at the file's own size, upright.

    Raises as :meth:`VideoSpec.load`.
    """
    name = describe("video", source)
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        check_file(path, name, expected="a video file")
        if path.suffix.lower() != ".npz":
            return _decoded(path, spec, name, on_notice)
        source = _from_npz(path, name)
    if not isinstance(source, np.ndarray) or source.dtype != np.uint8 or source.ndim != 4 or source.shape[3] != 3:
        received = f"{source.dtype} {source.shape}" if isinstance(source, np.ndarray) else type(source).__name__
        raise MediaError(name, received=received, expected="a path, or a uint8 array (frames, H, W, 3) RGB")
    if not len(source):
        raise MediaError(f"{name} has no frames")
    check_size(source.shape[2], source.shape[1], name)
    return [np.ascontiguousarray(source[i]) for i in _positions(len(source), spec.frames)]


def _positions(total: int, wanted: int) -> list[int]:
    """Which of ``total`` frames stand for ``wanted`` equal parts of the clip: the one in the middle of each."""
    return [(2 * i + 1) * total // (2 * wanted) for i in range(wanted)]


def _decoded(path: Path, spec: VideoSpec, name: str, on_notice: Notice) -> list[NDArray[np.uint8]]:
    av = require("av", extra="video", purpose="reading video")
    try:
        total, cut = _packets(av, path, spec, name)
        for _ in range(2):
            found, seen = _pick(av, path, spec, name, set(_positions(total, spec.frames)))
            if seen == total:
                break
            total = seen  # packets and frames are not always one to one: now their number is known
    except MediaError:
        raise
    except Exception as error:  # PyAV has an exception for each of ffmpeg's codes
        what, received = f"{name} cannot be decoded", one_line(error)
        raise MediaError(what, received=received, expected="a complete video file") from error
    if not seen:
        raise MediaError(f"{name} has no frames that can be decoded")
    if cut:
        on_notice(f"video cut to its first {spec.max_seconds:g} seconds")
    return [found[i] for i in _positions(seen, spec.frames)]


def _packets(av: Any, path: Path, spec: VideoSpec, name: str) -> tuple[int, bool]:
    """Packets of the first ``max_seconds``, counted without decoding, and whether there are more."""
    total, cut = 0, False
    with av.open(os.fspath(path)) as container:
        stream = _stream(container, name)
        for packet in container.demux(stream):
            if not packet.size:
                continue
            start = stream.start_time or 0
            if packet.pts is not None and float((packet.pts - start) * packet.time_base) >= spec.max_seconds:
                cut = True
                continue
            total += 1
            if total > MAX_FRAMES:
                raise MediaError(f"{name} has too many frames", expected=f"at most {MAX_FRAMES:,}")
    return total, cut


def _pick(
    av: Any, path: Path, spec: VideoSpec, name: str, wanted: set[int]
) -> tuple[dict[int, NDArray[np.uint8]], int]:
    """Decode the first ``max_seconds`` and keep the wanted frames; (frame by number, frames in all)."""
    found: dict[int, NDArray[np.uint8]] = {}
    seen, first = 0, None
    with av.open(os.fspath(path)) as container:
        for frame in container.decode(_stream(container, name)):
            if frame.time is not None:
                first = frame.time if first is None else first
                if frame.time - first >= spec.max_seconds:
                    break
            if seen in wanted:
                found[seen] = _upright(frame.to_ndarray(format="rgb24"), getattr(frame, "rotation", 0))
            seen += 1
    return found, seen


def _stream(container: Any, name: str) -> Any:
    if not container.streams.video:
        raise MediaError(f"{name} has no picture", received="sound or data alone", expected="a video stream")
    stream = container.streams.video[0]
    check_size(stream.codec_context.width, stream.codec_context.height, name)
    return stream


def _upright(frame: NDArray[np.uint8], degrees: int) -> NDArray[np.uint8]:
    """Undo the rotation that a camera noted instead of turning the picture; ``degrees`` counter-clockwise."""
    return np.ascontiguousarray(np.rot90(frame, (degrees // 90) % 4)) if degrees % 360 else frame


def _from_npz(path: Path, name: str) -> NDArray[np.uint8]:
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(item.file_size for item in archive.infolist())
        if size > MAX_CLIP_BYTES:
            raise MediaError(f"{name} is too large", received=f"{size:,} bytes", expected=f"{MAX_CLIP_BYTES:,}")
        with np.load(path, allow_pickle=False) as arrays:
            return arrays["frames"]
    except MediaError:
        raise
    except Exception as error:  # numpy and zipfile raise whatever a damaged file makes them stumble over
        raise MediaError(f"{name} cannot be read", received=one_line(error), expected="an array 'frames'") from error
