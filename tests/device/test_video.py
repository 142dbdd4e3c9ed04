"""Video: frames taken uniformly, each prepared like an image; and files that cannot be used."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from mope_deploy.errors import ConfigError, MediaError, MissingExtraError
from mope_deploy.preprocess import ImageSpec, Preprocessing, VideoSpec
from tests.device.clips import write_video

pytestmark = pytest.mark.device

IMAGE = ImageSpec(16, 16, 18, 18, "center", "bilinear", (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
SPEC = VideoSpec(4, "uniform", 60.0, IMAGE)
MADE = Preprocessing(None, None, video=SPEC)
STILL = Preprocessing(IMAGE, None)


def frames(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 20, 24, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("total", "taken"),
    [(1, [0, 0, 0, 0]), (2, [0, 0, 1, 1]), (3, [0, 1, 1, 2]), (4, [0, 1, 2, 3]), (8, [1, 3, 5, 7]), (11, [1, 4, 6, 9])],
)
def test_frames_are_taken_uniformly_and_prepared_like_images(total: int, taken: list[int], tmp_path: Path) -> None:
    """From a lossless file, from an array and from a stored clip: the same bits as each frame alone as an image."""
    clip = frames(total)
    expected = np.stack([STILL.load_image(clip[i]) for i in taken])
    assert np.array_equal(MADE.load_video(clip), expected)
    assert np.array_equal(MADE.load_video(write_video(tmp_path / "clip.mkv", clip)), expected)
    np.savez(tmp_path / "clip.npz", frames=clip)
    assert np.array_equal(MADE.load_video(tmp_path / "clip.npz"), expected)


def test_arrays_are_normalised_as_images_are() -> None:
    clips = [MADE.load_video(frames(5, seed)) for seed in range(3)]
    made = MADE.collate([{"video": clip} for clip in clips])
    assert {name: (array.dtype.name, array.shape[1:]) for name, array in made.items()} == {
        "video_values": ("float32", (4, 3, 16, 16))
    }
    for clip, values in zip(clips, made["video_values"], strict=True):
        assert values.tobytes() == STILL.normalise(clip).tobytes()


@pytest.mark.parametrize(("suffix", "codec"), [("mp4", "mpeg4"), ("avi", "mjpeg"), ("webm", "libvpx-vp9")])
def test_codecs(suffix: str, codec: str, tmp_path: Path) -> None:
    """Smooth frames of growing brightness come back in order and close to what they were."""
    if codec not in av.codecs_available:
        pytest.fail(f"PyAV's own wheels have {codec}")
    clip = np.stack([np.full((32, 32, 3), 20 * i + 20, np.uint8) for i in range(9)])
    path = tmp_path / f"a.{suffix}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for frame in clip:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    found = MADE.load_video(path).mean(axis=(1, 2, 3))
    assert np.abs(found - [20 * i + 20 for i in (1, 3, 5, 7)]).max() < 8


def test_a_long_video_is_cut_and_says_so(tmp_path: Path) -> None:
    clip = frames(30)
    heard: list[str] = []
    made = Preprocessing(None, None, video=VideoSpec(4, "uniform", 1.2, IMAGE))
    found = made.load_video(write_video(tmp_path / "long.mkv", clip), on_notice=heard.append)
    assert np.array_equal(found, np.stack([STILL.load_image(clip[i]) for i in (1, 4, 7, 10)]))
    assert heard == ["video cut to its first 1.2 seconds"]
    MADE.load_video(tmp_path / "long.mkv", on_notice=heard.append)
    assert len(heard) == 1


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    good = write_video(tmp_path / "good.mp4", frames(8), codec="mpeg4").read_bytes()
    with av.open(str(tmp_path / "sound.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    files = {
        "empty.mp4": b"",
        "text.mp4": b"not a video" * 99,
        "half.mp4": good[: len(good) // 2],
        "bad.npz": b"PK\3\4",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    np.savez(tmp_path / "other.npz", pictures=frames(2))
    np.savez(tmp_path / "none.npz", frames=frames(0))
    cases = {
        "absent.mp4": "does not exist",
        "empty.mp4": "is empty (0 bytes)",
        "text.mp4": "cannot be decoded",
        "half.mp4": "cannot be decoded",
        "sound.mkv": "has no picture",
        "bad.npz": "cannot be read",
        "other.npz": "cannot be read",
        "none.npz": "has no frames",
        ".": "is a folder",
    }
    for name, message in cases.items():
        with pytest.raises(MediaError) as caught:
            MADE.load_video(tmp_path / name)
        assert message in str(caught.value), name
        assert "\n" not in str(caught.value)
    for wrong in (7, np.zeros((4, 8, 8, 3)), np.zeros((4, 8, 8), np.uint8)):
        with pytest.raises(MediaError, match="video given as an array"):
            MADE.load_video(wrong)  # type: ignore[arg-type]


def test_says_which_extra_reads_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mkv", frames(4))
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(MissingExtraError, match=r"mope-deploy\[video\]"):
        MADE.load_video(path)
    assert MADE.load_video(frames(4)).shape == (4, 16, 16, 3)


def test_the_specification_survives_json_and_is_strict() -> None:
    document = MADE.to_dict()
    assert Preprocessing.from_dict(document) == MADE
    for key, value in (("frames", 0), ("sampling", "random"), ("max_seconds", 0), ("image", None), ("other", 1)):
        with pytest.raises(ConfigError, match="video"):
            Preprocessing.from_dict({**document, "video": {**document["video"], key: value}})
