"""Video → a clip of a fixed number of frames, each prepared like an image; files are decoded by PyAV (extra ``video``).

Frames are taken uniformly: of T frames, number ``floor((i + ½) · T / F)`` for each i of the F that the encoder reads. A
clip of exactly F frames is taken as it is. A clip may also be an array, or an ``.npz`` file with an array ``frames``,
which needs no decoder: bundles keep their golden clips that way, because lossy codecs differ between machines.

One frame at a time is held at its own size. How long decoding may take is known before it begins, from the number of
packets and the size of a frame.

Letters: B batch · T frames of the file · F frames at the encoder · H, W height and width.
"""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mope_deploy.errors import MediaError
from mope_deploy.fields import between, choice
from mope_deploy.limits import MAX_CLIP_BYTES, MAX_DECODED_PIXELS, MAX_FRAMES, MAX_VIDEO_PIXELS
from mope_deploy.preprocess.container import opened
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
        name = describe("video", source)

        def prepared(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
            return fit(Image.fromarray(frame), self.image, name)

        return np.stack(read_clip(source, self, make=prepared, on_notice=on_notice))

    def batch(self, clips: Sequence[NDArray[np.uint8] | None]) -> dict[str, NDArray[Any]]:
        """B results of :meth:`load` → ``video_values`` float32 (B, F, 3, H, W).

        None is a clip that is missing: nothing of what stands in its place reaches the result.
        """
        black = np.zeros((self.frames, self.image.height, self.image.width, 3), np.uint8)
        return {"video_values": normalise(np.stack([black if clip is None else clip for clip in clips]), self.image)}


def read_clip(
    source: VideoSource,
    spec: VideoSpec,
    *,
    make: Callable[[NDArray[np.uint8]], NDArray[np.uint8]] = lambda frame: frame,
    on_notice: Notice = lambda _: None,
) -> list[NDArray[np.uint8]]:
    """The F frames that the encoder reads.

    Args:
        source, on_notice: as of :meth:`VideoSpec.load`.
        spec: which frames.
        make: what is kept of a frame, uint8 (h, w, 3) RGB at the file's own size, upright; called once for each
            different frame, before the next one is decoded.

    Raises as :meth:`VideoSpec.load`.
    """
    name = describe("video", source)
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        check_file(path, name, expected="a video file")
        if path.suffix.lower() == ".npz":
            return _from_npz(path, spec, name, make)
        return _decoded(path, spec, name, make, on_notice)
    if not isinstance(source, np.ndarray) or source.dtype != np.uint8 or source.ndim != 4 or source.shape[3] != 3:
        received = f"{source.dtype} {source.shape}" if isinstance(source, np.ndarray) else type(source).__name__
        raise MediaError(name, received=received, expected="a path, or a uint8 array (frames, H, W, 3) RGB")
    if not len(source):
        raise MediaError(f"{name} has no frames")
    check_size(source.shape[2], source.shape[1], name)
    wanted = _positions(len(source), spec.frames)
    found = {i: make(np.ascontiguousarray(source[i])) for i in sorted(set(wanted))}
    return [found[i] for i in wanted]


def _positions(total: int, wanted: int) -> list[int]:
    """Which of ``total`` frames stand for ``wanted`` equal parts of the clip: the one in the middle of each."""
    return [(2 * i + 1) * total // (2 * wanted) for i in range(wanted)]


def _decoded(
    path: Path, spec: VideoSpec, name: str, make: Callable[[NDArray[np.uint8]], NDArray[np.uint8]], on_notice: Notice
) -> list[NDArray[np.uint8]]:
    total, cut = _packets(path, spec, name)
    for _ in range(2):
        found, seen = {}, 0
        for pixels in _frames(path, spec, name, set(_positions(total, spec.frames))):
            if pixels is not None:
                found[seen] = make(pixels)
            seen += 1
        if seen == total:
            break
        total = seen  # packets and frames are not always one to one: now their number is known
    if not seen:
        raise MediaError(f"{name} has no frames that can be decoded")
    if cut:
        on_notice(f"video cut to its first {spec.max_seconds:g} seconds")
    return [found[i] for i in _positions(seen, spec.frames)]


def _packets(path: Path, spec: VideoSpec, name: str) -> tuple[int, bool]:
    """Packets of the first ``max_seconds``, counted without decoding, and whether there are more."""
    total, cut = 0, False
    with opened(path, name, purpose="reading video") as container:
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
        _check_work(total * stream.codec_context.width * stream.codec_context.height, name)
    return total, cut


def _frames(path: Path, spec: VideoSpec, name: str, wanted: set[int]) -> Iterator[NDArray[np.uint8] | None]:
    """The first ``max_seconds`` decoded, frame by frame: its pixels upright, or None where it is not wanted."""
    first, work = None, 0
    with opened(path, name, purpose="reading video") as container:
        for number, frame in enumerate(container.decode(_stream(container, name))):
            if frame.time is not None:
                first = frame.time if first is None else first
                if frame.time - first >= spec.max_seconds:
                    break
            _check_frame(frame.width, frame.height, name)  # frames may change their size
            _check_work(work := work + frame.width * frame.height, name)
            yield _upright(frame, name) if number in wanted else None


def _stream(container: Any, name: str) -> Any:
    if not container.streams.video:
        raise MediaError(f"{name} has no picture", received="sound or data alone", expected="a video stream")
    stream = container.streams.video[0]
    _check_frame(stream.codec_context.width, stream.codec_context.height, name)
    return stream


def _check_frame(width: int, height: int, name: str) -> None:
    check_size(width, height, name)
    if width * height > MAX_VIDEO_PIXELS:
        expected = f"at most {MAX_VIDEO_PIXELS // 1_000_000} megapixels a frame"
        raise MediaError(f"{name} is too large", received=f"{width:,} x {height:,} pixels", expected=expected)


def _check_work(pixels: int, name: str) -> None:
    if pixels > MAX_DECODED_PIXELS:
        raise MediaError(
            f"{name} takes too long to decode",
            received=f"{pixels / 1e9:,.1f} thousand megapixels in all frames",
            expected=f"at most {MAX_DECODED_PIXELS // 10**9}",
            todo="cut it, or write it with smaller or fewer frames",
        )


def _upright(frame: Any, name: str) -> NDArray[np.uint8]:
    """RGB, turned and mirrored as the file's display matrix says: what cameras write instead of turning the picture.

    Stored (x, y) is shown at (a·x + c·y, b·x + d·y), x to the right and y down: four turns, each mirrored or not.
    """
    pixels = frame.to_ndarray(format="rgb24")
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return pixels
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix))
    swapped = abs(a) + abs(d) < abs(b) + abs(c)
    largest, smallest = ((b, c), (a, d)) if swapped else ((a, d), (b, c))
    if not any(largest):  # no matrix at all
        return pixels
    if 0 in largest or max(map(abs, smallest)) * 100 > min(map(abs, largest)):
        received = f"a display matrix of {a / 65536:g} {b / 65536:g} {c / 65536:g} {d / 65536:g}"
        raise MediaError(f"{name} is to be shown askew", received=received, expected="quarter turns and mirrors alone")
    if swapped:
        pixels, (a, d) = pixels.swapaxes(0, 1), (c, b)
    return np.ascontiguousarray(pixels[:: 1 if d > 0 else -1, :: 1 if a > 0 else -1])


def _from_npz(
    path: Path, spec: VideoSpec, name: str, make: Callable[[NDArray[np.uint8]], NDArray[np.uint8]]
) -> list[NDArray[np.uint8]]:
    """Frames of the array ``frames``, unpacked one after the other."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("frames.npy") as file:
            read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            shape, fortran, dtype = read_header[np.lib.format.read_magic(file)](file)
            if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran:
                received = f"{dtype} {shape}{' in the order of Fortran' if fortran else ''}"
                raise MediaError(name, received=received, expected="frames as uint8 (frames, H, W, 3) RGB, in C order")
            count, height, width, _ = shape
            if not count:
                raise MediaError(f"{name} has no frames")
            check_size(width, height, name)
            size = height * width * 3
            if count * size > MAX_CLIP_BYTES:
                received = f"{count * size:,} bytes unpacked"
                raise MediaError(f"{name} is too large", received=received, expected=f"at most {MAX_CLIP_BYTES:,}")
            wanted, found = _positions(count, spec.frames), {}
            for i in range(max(wanted) + 1):
                if len(content := file.read(size)) < size:
                    raise MediaError(f"{name} is cut short", received=f"{i:,} of {count:,} frames")
                if i in wanted:
                    found[i] = make(np.frombuffer(content, np.uint8).reshape(height, width, 3))
            return [found[i] for i in wanted]
    except MediaError:
        raise
    except Exception as error:  # numpy and zipfile raise whatever a damaged file makes them stumble over
        raise MediaError(f"{name} cannot be read", received=one_line(error), expected="an array 'frames'") from error
