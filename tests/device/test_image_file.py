"""Pictures that would make a reader crawl or allocate, refused before; and transparency in a PNG's own bits."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mope_deploy.errors import MediaError
from mope_deploy.preprocess import ImageSpec, Preprocessing, image_file

pytestmark = pytest.mark.device

PLAIN = Preprocessing(ImageSpec(4, 6, 4, 6, "squash", "nearest", (0.5,) * 3, (0.5,) * 3), None)


def refused(path: Path, words: str) -> None:
    with pytest.raises(MediaError, match=words) as caught:
        PLAIN.load_image(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def saved(form: str, mode: str = "L", side: int = 16, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (side, side)).save(buffer, form, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(depth: int, colour: int, rows: list[bytes], key: bytes, width: int) -> bytes:
    head = struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"tRNS", key) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def tiff(*entries: tuple[int, int, int, int], data: bytes = b"") -> bytes:
    """Little-endian, one directory of (tag, type, count, value)."""
    packed = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + packed + bytes(4) + data


@pytest.mark.parametrize(
    ("depth", "colour", "row", "key", "shown"),
    [
        (16, 0, struct.pack(">3H", 0x1234, 0x1235, 0xFFFF), 0x1234, [255, 18, 255]),
        (16, 0, struct.pack(">3H", 0, 1, 0x8000), 0, [255, 0, 128]),
        (8, 0, bytes([7, 8, 9]), 7, [255, 8, 9]),
        (4, 0, bytes([0x3A, 0xF0]), 0xA, [51, 255, 255]),
        (2, 0, bytes([0b00011100]), 1, [0, 255, 255]),
        (1, 0, bytes([0b01000000]), 0, [255, 255, 255]),
    ],
)
def test_the_transparent_grey_of_a_png_is_in_its_own_bits(
    tmp_path: Path, depth: int, colour: int, row: bytes, key: int, shown: list[int]
) -> None:
    (tmp_path / "a.png").write_bytes(png(depth, colour, [row] * 2, struct.pack(">H", key), 3))
    still = Preprocessing(ImageSpec(2, 3, 2, 3, "squash", "nearest", (0.5,) * 3, (0.5,) * 3), None)
    assert still.load_image(tmp_path / "a.png")[0, :, 0].tolist() == shown
    if depth in (1, 8, 16):  # of the others, a picture that was opened no longer says how many bits it had
        for _ in range(2):
            assert still.load_image(opened := Image.open(tmp_path / "a.png"))[0, :, 0].tolist() == shown
            assert opened.info["transparency"] == (255 * key if depth == 1 else key)


@pytest.mark.parametrize("depth", [8, 16])
def test_the_transparent_colour_of_a_png_is_in_its_own_bits(tmp_path: Path, depth: int) -> None:
    kind, wide = (">3B", 1) if depth == 8 else (">3H", 257)
    colours = [(200, 100, 50), (1, 2, 3)]
    row = b"".join(struct.pack(kind, *(value * wide for value in colour)) for colour in colours)
    key = struct.pack(">3H", *(value * wide for value in colours[0]))
    (tmp_path / "a.png").write_bytes(png(depth, 2, [row] * 2, key, 2))
    still = Preprocessing(ImageSpec(2, 2, 2, 2, "squash", "nearest", (0.5,) * 3, (0.5,) * 3), None)
    assert still.load_image(tmp_path / "a.png")[0].tolist() == [[255, 255, 255], [1, 2, 3]]


def scans(side: int, more: int) -> bytes:
    """A progressive JPEG of 6 scans and so many more."""
    content = saved("JPEG", side=side, progressive=True)
    last = content[content.rindex(b"\xff\xda") : -2]
    return content[:-2] + last * more + b"\xff\xd9"


def test_scans_of_a_jpeg_are_counted_before_it_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(scans(16, 94))
    assert PLAIN.load_image(path).shape == (4, 6, 3)
    path.write_bytes(scans(16, 95))
    refused(path, "takes too long to decode; received 101 scans of 0.0 megapixels; expected at most 100")
    with pytest.raises(MediaError, match="takes too long"):
        PLAIN.load_image(Image.open(path))
    path.write_bytes(scans(4000, 70))  # 76 x 16 megapixels
    refused(path, "76 scans of 16.0 megapixels; expected at most 100, and 1,200 megapixels in all of them")
    path.write_bytes(scans(16, 0)[:2] + b"\xff\xe5\0\x02" * 6000 + scans(16, 0)[2:])
    refused(path, "too many pieces")


def test_a_thumbnail_is_no_scan(tmp_path: Path) -> None:
    content, inside = saved("JPEG"), scans(16, 200)
    segment = b"\xff\xe5" + struct.pack(">H", len(inside) + 2) + inside
    (tmp_path / "a.jpg").write_bytes(content[:2] + segment + content[2:])
    assert PLAIN.load_image(tmp_path / "a.jpg").shape == (4, 6, 3)


def test_a_jpeg_inside_a_tiff_has_the_same_limits(tmp_path: Path) -> None:
    inside = scans(16, 120)
    size, (byte, long) = (16, 16), (3, 4)
    entries = [
        (256, byte, 1, size[0]),
        (257, byte, 1, size[1]),
        (258, byte, 1, 8),
        (259, byte, 1, 7),
        (262, byte, 1, 1),
    ]
    entries += [(277, byte, 1, 1), (278, byte, 1, 16), (273, long, 1, 8 + 2 + 12 * 9 + 4), (279, long, 1, len(inside))]
    (tmp_path / "a.tif").write_bytes(tiff(*entries, data=inside))
    refused(tmp_path / "a.tif", "126 scans")


def crawling() -> dict[str, bytes]:
    jpeg, gif, still = saved("JPEG"), saved("GIF", "P"), saved("PNG")
    table = 13 + 3 * (2 << (gif[10] & 7))
    return {
        "comment.ppm": b"P6\n#" + b"a" * 20_000 + b"\n2 2\n255\n" + bytes(12),
        "space.ppm": b"P6" + b" " * 20_000 + b"2 2\n255\n" + bytes(12),
        "comment.gif": gif[:table] + b"\x21\xfe" + (b"\xff" + b"a" * 255) * 6000 + b"\0" + gif[table:],
        "padding.jpg": jpeg[:2] + b"\xff" * 20_000 + jpeg[2:],
        "chunks.png": still[:33] + chunk(b"prVt", b"") * 5000 + still[33:],
    }


@pytest.mark.parametrize("name", crawling())
def test_headers_in_too_many_pieces(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(crawling()[name])
    refused(tmp_path / name, "is in too many pieces to be read")


def test_pieces_behind_the_header_are_counted_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    still = saved("PNG")
    (tmp_path / "a.png").write_bytes(still[:-12] + chunk(b"prVt", b"") * 5000 + still[-12:])
    assert PLAIN.load_image(tmp_path / "a.png").shape == (4, 6, 3)
    monkeypatch.setattr(image_file, "MAX_IMAGE_READS", 10_000)
    refused(tmp_path / "a.png", "is in too many pieces to be read")


def test_what_pillow_decodes_in_python_is_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_file, "MAX_SLOW_BYTES", 5000)
    pictures = {
        "digits.ppm": b"P3\n40 40\n255\n" + b"0 " * 4800,
        "scaled.ppm": b"P6\n50 50\n254\n" + bytes(7500),
        "runs.bmp": b"BM"
        + struct.pack("<IHHIIiiHHIIiiII", 9000, 0, 0, 1078, 40, 90, 90, 1, 8, 1, 9000, 0, 0, 0, 0)
        + bytes(1024)
        + b"\1\2" * 4500,
    }
    for name, content in pictures.items():
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, "takes too long to decode")
    (tmp_path / "plain.ppm").write_bytes(b"P6\n50 50\n255\n" + bytes(7500))
    assert PLAIN.load_image(tmp_path / "plain.ppm").shape == (4, 6, 3)


def test_the_canvas_of_a_webp_is_looked_at_before_it_is_allocated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("opened"))
    large = (16_383).to_bytes(3, "little") + (65_535).to_bytes(3, "little")
    bodies = {
        b"VP8X": b"\2\0\0\0" + large,
        b"VP8L": b"\x2f" + struct.pack("<I", 16_383 | 16_383 << 14),
        b"VP8 ": b"\0\0\0\x9d\1\x2a" + struct.pack("<HH", 16_383, 16_383),
    }
    for kind, body in bodies.items():
        (tmp_path / "a.webp").write_bytes(b"RIFF\0\1\0\0WEBP" + kind + struct.pack("<I", len(body)) + body)
        refused(tmp_path / "a.webp", "limits of size")


def test_every_kind_of_webp_has_the_size_that_pillow_finds(tmp_path: Path) -> None:
    for i, options in enumerate(({"lossless": True}, {"quality": 50}, {"exif": b"Exif\0\0II*\0\x08\0\0\0\0\0"})):
        buffer = io.BytesIO()
        Image.new("RGB", (31 + i, 17)).save(buffer, "WEBP", **options)  # type: ignore[arg-type]
        assert image_file._webp_size(buffer.getvalue()) == (31 + i, 17)


def test_tags_that_claim_more_than_the_file_has(tmp_path: Path) -> None:
    content = bytes(50_000)
    many = [(40_000 + i, 7, 40_000, 8) for i in range(2000)]  # each is copied
    huge = [(324, 4, 2**21, 8)]  # a tuple of that many numbers
    for entries in (many, huge):
        (tmp_path / "a.tif").write_bytes(tiff(*entries, data=content))
        refused(tmp_path / "a.tif", "tags that claim more")
    assert image_file.plain_tags(saved("TIFF"))
    tile = [(256, 4, 1, 16), (257, 4, 1, 16), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1)]
    tile += [(322, 4, 1, 46_000), (323, 4, 1, 46_000), (324, 4, 1, 200), (325, 4, 1, 100)]
    (tmp_path / "a.tif").write_bytes(tiff(*tile, data=content))
    refused(tmp_path / "a.tif", "a tile of .* limits of size; received 46,000 x 46,000")


def test_exif_that_claims_more_than_there_is_leaves_the_picture_as_it_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exif = b"Exif\0\0" + tiff(*((40_000 + i, 7, 40_000, 8) for i in range(2000)), data=bytes(30_000))
    still = saved("PNG")
    (tmp_path / "a.png").write_bytes(still[:33] + chunk(b"eXIf", exif[6:]) + still[33:])
    monkeypatch.setattr(Image.Image, "getexif", lambda _: pytest.fail("read"))
    assert PLAIN.load_image(tmp_path / "a.png").shape == (4, 6, 3)


def test_files_are_not_read_beyond_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(saved("PNG"))
    monkeypatch.setattr(image_file, "MAX_IMAGE_BYTES", 20)
    refused(tmp_path / "a.png", "is too large; received")


def test_the_file_is_closed(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(saved("PNG"))
    assert np.array_equal(PLAIN.load_image(tmp_path / "a.png"), np.zeros((4, 6, 3), np.uint8))
    (tmp_path / "a.png").unlink()  # fails on Windows while it is open
