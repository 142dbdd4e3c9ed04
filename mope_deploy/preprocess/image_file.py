"""A picture's file → an opened Pillow image, not decoded yet: what would make its reader crawl or allocate is refused.

Pillow reads headers in Python, piece by piece, and believes what they claim; so the pieces are counted, and what is
claimed is looked at first.
"""

from __future__ import annotations

import io
import os
import re
import struct
from pathlib import Path
from typing import Any

from PIL import Image

from mope_deploy.errors import MediaError
from mope_deploy.limits import (
    MAX_HEADER_READS,
    MAX_IMAGE_BYTES,
    MAX_IMAGE_READS,
    MAX_PIXELS,
    MAX_SCANNED_PIXELS,
    MAX_SCANS,
    MAX_SIDE,
    MAX_SLOW_BYTES,
    MAX_TAG_VALUES,
)
from mope_deploy.preprocess.shared import check_file, one_line

__all__ = ["SIZES", "check_decoder", "check_size", "open_picture", "plain_tags"]

# EPS would run Ghostscript, and rarely used decoders are where decoders have their holes: only these are ever tried.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
SIZES = f"1 to {MAX_SIDE:,} pixels a side and at most {MAX_PIXELS // 1_000_000} megapixels"
_PYTHON_DECODERS = ("ppm", "ppm_plain", "bmp_rle")  # of Pillow
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_BYTES = {1: 1, 2: 1, 6: 1, 7: 1, 3: 2, 8: 2, 4: 4, 9: 4, 11: 4, 13: 4, 5: 8, 10: 8, 12: 8, 16: 8, 17: 8, 18: 8}


class _Counted(io.BytesIO):
    """A file in memory that may only be read so often."""

    def __init__(self, content: bytes, name: str) -> None:
        super().__init__(content)
        self.what, self.left = name, MAX_HEADER_READS

    def read(self, size: int | None = -1, /) -> bytes:
        self._count()
        return super().read(size)

    def readline(self, size: int | None = -1, /) -> bytes:
        self._count()
        return super().readline(size)

    def _count(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise MediaError(f"{self.what} is in too many pieces to be read", todo="save it again, as PNG or JPEG")


def open_picture(path: Path, name: str) -> Image.Image:
    """A picture whose header is read and whose size is within the limits.

    Raises:
        MediaError: one line naming the file: missing, empty, not a picture, outside the stated limits.
    """
    check_file(path, name, expected="an image file")
    if (size := os.stat(path).st_size) > MAX_IMAGE_BYTES:
        raise MediaError(f"{name} is too large", received=f"{size:,} bytes", expected=f"at most {MAX_IMAGE_BYTES:,}")
    content = path.read_bytes()
    _check_claims(content, name)
    file = _Counted(content, name)
    try:
        image = Image.open(file, formats=FORMATS)
        check_size(*image.size, name)
        check_decoder(image, content, name)
    except MediaError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # the latter by filters, -W error
        raise MediaError(f"{name} is too large", expected=SIZES) from error
    except Image.UnidentifiedImageError as error:
        raise MediaError(f"{name} is not an image that can be read", expected=f"one of {', '.join(FORMATS)}") from error
    except Exception as error:  # readers raise whatever a damaged file makes them stumble over
        raise MediaError(f"{name} cannot be read", received=one_line(error)) from error
    file.left = MAX_IMAGE_READS
    return image


def check_size(width: int, height: int, name: str) -> None:
    """Raises MediaError for a picture outside the limits of size."""
    if not (1 <= width <= MAX_SIDE and 1 <= height <= MAX_SIDE and width * height <= MAX_PIXELS):
        received = f"{width:,} x {height:,} pixels"
        raise MediaError(f"{name} is outside the limits of size", received=received, expected=SIZES)


def plain_tags(content: bytes) -> bool:
    """Whether the first directory of TIFF tags (a file's, or EXIF's) claims no more than there is.

    Pillow copies what each of up to 65,535 tags points to, be it the same place, and makes a tuple of its numbers.
    """
    try:
        order = {b"II": "<", b"MM": ">"}[content[:2]]
        large = struct.unpack_from(order + "H", content, 2)[0] == 43
        (start,) = struct.unpack_from(order + ("Q" if large else "L"), content, 8 if large else 4)
        (count,) = struct.unpack_from(order + ("Q" if large else "H"), content, start)
        start, step = start + (8 if large else 2), 20 if large else 12
        if count * step > len(content):
            return False
        entries = [
            struct.unpack_from(order + ("HHQ" if large else "HHL"), content, start + i * step) for i in range(count)
        ]
    except (KeyError, struct.error):
        return True  # no such directory: nothing is read
    total = sum(values * _BYTES.get(kind, 1) for _, kind, values in entries)
    numbers = max((values for _, kind, values in entries if kind not in (1, 2, 6, 7)), default=0)
    return total <= 2 * len(content) + 2**16 and numbers <= MAX_TAG_VALUES


def _check_claims(content: bytes, name: str) -> None:
    """What Pillow, or a library below it, allocates when it opens a file."""
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        check_size(*_webp_size(content), name)
    if content[:2] in (b"II", b"MM") and not plain_tags(content):
        raise MediaError(f"{name} is no TIFF that can be read", received="tags that claim more than the file has")


def _webp_size(content: bytes) -> tuple[int, int]:
    """Of the canvas; (1, 1) where there is none."""
    kind, head = content[12:16], content[20:30].ljust(10, b"\0")
    if kind == b"VP8X":
        return 1 + int.from_bytes(head[4:7], "little"), 1 + int.from_bytes(head[7:10], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(head[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        return tuple(int.from_bytes(head[i : i + 2], "little") & 0x3FFF for i in (6, 8))  # type: ignore[return-value]
    return 1, 1


def check_decoder(image: Image.Image, content: bytes, name: str) -> None:
    """Raises MediaError where decoding would take too long: scans of a JPEG, tiles of a TIFF, decoders in Python.

    Args:
        image: opened and not decoded.
        content: the bytes of its file.
        name: what messages call it.
    """
    pixels = image.width * image.height
    tags: Any = getattr(image, "tag_v2", {})
    tiles: Any = getattr(image, "tile", None)
    if tiles and tiles[0][0] in _PYTHON_DECODERS and len(content) > MAX_SLOW_BYTES:
        received, expected = f"{len(content):,} bytes of {image.format}", f"at most {MAX_SLOW_BYTES:,} of this kind"
        raise MediaError(
            f"{name} takes too long to decode", received=received, expected=expected, todo="save it as PNG"
        )
    if image.format == "TIFF":
        check_size(int(tags.get(322, 1)), int(tags.get(323, 1)), f"a tile of {name}")
    scans: float = 1
    if image.format in ("JPEG", "MPO"):
        scans = _scans(content)
    elif "jpeg" in str(image.info.get("compression")):
        scans = content.count(b"\xff\xda") / max(1, len(_several(tags.get(324) or tags.get(273) or ())))
    if scans > MAX_SCANS or scans * pixels > MAX_SCANNED_PIXELS:
        raise MediaError(
            f"{name} takes too long to decode",
            received=f"{scans:,.0f} scans of {pixels / 1e6:,.1f} megapixels",
            expected=f"at most {MAX_SCANS}, and {MAX_SCANNED_PIXELS // 1_000_000:,} megapixels in all of them",
            todo="save it again",
        )


def _several(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _scans(content: bytes) -> int:
    """Scans of a JPEG: its SOS markers, but for those inside segments (a thumbnail's). Stops beyond the limit."""
    at, scans, segments = 2, 0, 0
    while scans <= MAX_SCANS and segments <= MAX_HEADER_READS and (found := _MARKER.search(content, at)):
        at, marker = found.end(), content[found.end() - 1]
        if marker == 0xD9:  # the end of the image
            return scans
        scans, segments = scans + (marker == 0xDA), segments + 1
        if marker not in (0x01, 0xD8):
            at += max(2, int.from_bytes(content[at : at + 2], "big"))
    return scans if segments <= MAX_HEADER_READS else MAX_SCANS + 1
