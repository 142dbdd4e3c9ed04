"""Files that FFmpeg would read and a stranger should not choose: playlists, sizes, counts, tags, display matrices."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

import av
import numpy as np
import pytest

from mope_deploy.errors import MediaError
from mope_deploy.preprocess import ImageSpec, Preprocessing, VideoSpec, container, video
from tests.device.clips import write_video

pytestmark = pytest.mark.device

IMAGE = ImageSpec(16, 24, 16, 24, "squash", "nearest", (0.5,) * 3, (0.5,) * 3)
MADE = Preprocessing(None, None, video=VideoSpec(4, "uniform", 60.0, IMAGE))
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def refused(path: Path | str, words: str) -> None:
    with pytest.raises(MediaError, match=words) as caught:
        MADE.load_video(path)
    assert "\n" not in str(caught.value)


def quarters() -> np.ndarray:
    frame = np.zeros((32, 48, 3), np.uint8)
    frame[:16, :24], frame[:16, 24:], frame[16:, :24], frame[16:, 24:] = RED, GREEN, BLUE, WHITE
    return frame


def with_matrix(path: Path, matrix: tuple[int, int, int, int]) -> Path:
    """The same file whose track header has another matrix: a, b, c, d of a u / b v / c w, as 16.16."""
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 4 + 4 + 20 + 8 + 8
    a, b, c, d = (round(value * 65536) for value in matrix)
    content[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    turned = path.with_name("turned.mp4")
    turned.write_bytes(bytes(content))
    return turned


@pytest.fixture(scope="module")
def still(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("matrix") / "a.mp4", np.stack([quarters()] * 4), codec="mpeg4")


@pytest.mark.parametrize(
    ("matrix", "shown"),
    [
        ((1, 0, 0, 1), (RED, GREEN, BLUE, WHITE)),
        ((-1, 0, 0, 1), (GREEN, RED, WHITE, BLUE)),
        ((1, 0, 0, -1), (BLUE, WHITE, RED, GREEN)),
        ((-1, 0, 0, -1), (WHITE, BLUE, GREEN, RED)),
        ((0, 1, -1, 0), (BLUE, RED, WHITE, GREEN)),
        ((0, -1, 1, 0), (GREEN, WHITE, RED, BLUE)),
        ((0, 1, 1, 0), (RED, BLUE, GREEN, WHITE)),
        ((0, -1, -1, 0), (WHITE, GREEN, BLUE, RED)),
        ((2, 0, 0, -0.5), (BLUE, WHITE, RED, GREEN)),
        ((0, 0, 0, 0), (RED, GREEN, BLUE, WHITE)),
    ],
)
def test_every_display_matrix(still: Path, matrix: tuple[int, int, int, int], shown: tuple[tuple[int, ...]]) -> None:
    """Where the standard says that each quarter is shown: (x, y) goes to (a·x + c·y, b·x + d·y)."""
    found = MADE.load_video(with_matrix(still, matrix))[0]
    corners = [found[y, x] for y, x in ((4, 6), (4, 17), (11, 6), (11, 17))]
    for corner, colour in zip(corners, shown, strict=True):
        assert np.abs(corner.astype(int) - colour).max() < 16


def test_a_video_shown_askew_is_refused(still: Path) -> None:
    refused(with_matrix(still, (0.7, 0.7, -0.7, 0.7)), "askew")
    refused(with_matrix(still, (1, 0, 0, 0)), "askew")


def test_the_language_of_tags_is_nobodys_business(still: Path, tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mkv"), "w") as file:
        file.metadata["title"] = "MARK-MARK"
        stream = file.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuvj420p"
        file.mux(stream.encode(av.VideoFrame.from_ndarray(quarters(), format="rgb24")))
        file.mux(stream.encode())
    content = (tmp_path / "a.mkv").read_bytes()
    assert b"MARK-MARK" in content
    (tmp_path / "a.mkv").write_bytes(content.replace(b"MARK-MARK", b"\xff\xfe\xe9 \x80\xc0\xaf!!"))
    assert MADE.load_video(tmp_path / "a.mkv").shape == (4, 16, 24, 3)


def test_playlists_and_addresses_are_no_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "other.mp4", np.stack([quarters()] * 4), codec="mpeg4")
    lists = {
        "concat.mp4": b"ffconcat version 1.0\nfile other.mp4\n",
        "hls.mp4": b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nother.mp4\n#EXT-X-ENDLIST\n",
        "live.m3u8": b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nother.mp4\n#EXT-X-ENDLIST\n",
        "dash.mpd": b'<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><Period></Period></MPD>',
        "call.sdp": b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\n",
        "frames%03d.png": b"\x89PNG\r\n\x1a\n",
        "text.txt": b"file other.mp4\n" * 99,
    }
    for name, content in lists.items():
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, "cannot be decoded")
    # A name that reads like a protocol is a name.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "concat:other.mp4").write_bytes(b"no video")
    refused("concat:other.mp4", "cannot be decoded")
    (tmp_path / "concat:other.mp4").write_bytes((tmp_path / "other.mp4").read_bytes())
    assert MADE.load_video("concat:other.mp4").shape == (4, 16, 24, 3)


def test_the_size_of_frames_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mkv", np.zeros((2, 64, 48, 3), np.uint8))
    monkeypatch.setattr(video, "MAX_VIDEO_PIXELS", 64 * 48 - 1)
    refused(path, "a.mkv is too large; received 48 x 64 pixels; expected at most 0 megapixels a frame")
    monkeypatch.undo()
    assert container._OPTIONS["max_pixels"] == str(video.MAX_VIDEO_PIXELS)


def test_frames_that_grow_on_the_way_are_held_to_the_same_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The header speaks of the first frame; each is looked at before it is copied."""
    small, large = (
        write_video(tmp_path / f"{side}.mpg", np.full((4, side, side, 3), 90, np.uint8), codec="mpeg1video", rate=25)
        for side in (32, 96)
    )
    (tmp_path / "both.mpg").write_bytes(small.read_bytes() + large.read_bytes())
    sizes = []
    with av.open(str(tmp_path / "both.mpg")) as opened:
        sizes = [(frame.width, frame.height) for frame in opened.decode(video=0)]
    assert {(32, 32), (96, 96)} <= set(sizes)
    assert MADE.load_video(tmp_path / "both.mpg").shape == (4, 16, 24, 3)
    monkeypatch.setattr(video, "MAX_VIDEO_PIXELS", 64 * 64)
    refused(tmp_path / "both.mpg", "96 x 96")


def test_the_work_is_known_before_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mkv", np.zeros((12, 64, 48, 3), np.uint8))
    monkeypatch.setattr(video, "MAX_DECODED_PIXELS", 12 * 64 * 48)
    assert MADE.load_video(path).shape == (4, 16, 24, 3)
    monkeypatch.setattr(video, "MAX_DECODED_PIXELS", 12 * 64 * 48 - 1)
    monkeypatch.setattr(video, "_frames", lambda *_: pytest.fail("decoded"))
    refused(path, "a.mkv takes too long to decode")


def test_the_number_of_frames_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mkv", np.zeros((12, 32, 32, 3), np.uint8))
    monkeypatch.setattr(video, "MAX_FRAMES", 11)
    refused(path, "has too many frames; expected at most 11")


def test_frames_are_prepared_one_after_the_other(tmp_path: Path) -> None:
    """What is held of a clip is what ``make`` made of it."""
    clip = np.random.default_rng(0).integers(0, 255, (9, 20, 24, 3), dtype=np.uint8)
    np.savez_compressed(tmp_path / "a.npz", frames=clip)
    for source in (clip, tmp_path / "a.npz", write_video(tmp_path / "a.mkv", clip)):
        seen: list[np.ndarray] = []

        def make(frame: np.ndarray, seen: list[np.ndarray] = seen) -> np.ndarray:
            seen.append(frame)
            return frame[:1, :1]

        found = video.read_clip(source, VideoSpec(18, "uniform", 60.0, IMAGE), make=make)
        assert [frame.shape for frame in found] == [(1, 1, 3)] * 18
        assert np.array_equal(np.stack(seen), clip)  # each once


def npz(path: Path, header: str, content: bytes, *, magic: bytes = b"\x93NUMPY\x01\0") -> Path:
    text = (header + " " * (117 - len(header)) + "\n").encode()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("frames.npy", magic + struct.pack("<H", len(text)) + text + content)
    return path


@pytest.mark.parametrize(
    ("shape", "descr", "fortran", "words"),
    [
        ("(100000, 200, 200, 3)", "|u1", False, "is too large; received 12,000,000,000 bytes"),
        ("(9000000000, 1, 1, 3)", "|u1", False, "is too large"),
        ("(4, 20000, 1, 3)", "|u1", False, "limits of size"),
        ("(9, 8, 8, 3)", "|u1", False, "is cut short; received 2 of 9 frames"),
        ("(4, 8, 8, 3)", "|u1", True, "order of Fortran"),
        ("(4, 8, 8, 3)", "<f8", False, "float64"),
        ("(4, 8, 8, 3)", "|O", False, "object"),
        ("(4, 8, 8)", "|u1", False, "expected frames as uint8"),
        ("(4, 8, 8, -3)", "|u1", False, "expected frames as uint8"),
        ("(-4, 8, 8, 3)", "|u1", False, "a.npz"),
        ("'x'", "|u1", False, "cannot be read"),
    ],
)
def test_stored_clips_are_unpacked_within_limits(
    tmp_path: Path, shape: str, descr: str, fortran: bool, words: str
) -> None:
    header = f"{{'descr': '{descr}', 'fortran_order': {fortran}, 'shape': {shape}, }}"
    refused(npz(tmp_path / "a.npz", header, bytes(2 * 8 * 8 * 3 + 5)), words)
