"""Files of sound as they are found: without a length, cut, misnamed, beyond full scale, inside a video's file."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

from mope_deploy.errors import MediaError, MissingExtraError
from mope_deploy.preprocess import AudioSpec, Preprocessing, Waveform, sound

pytestmark = pytest.mark.device

RATE = 16_000
MADE = Preprocessing(None, None, audio=AudioSpec("waveform", RATE, 2 * RATE, False, 400, False))
NOISE = np.random.default_rng(0).uniform(-0.5, 0.5, 24_000).astype(np.float32)
TONE = (0.5 * np.sin(2 * np.pi * 440 * np.arange(48_000) / 48_000)).astype(np.float32)


def refused(source: Path | Waveform, words: str) -> None:
    with pytest.raises(MediaError, match=words) as caught:
        MADE.load_audio(source)
    assert "\n" not in str(caught.value)


def written(kind: str, subtype: str | None = None) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, NOISE, RATE, format=kind, subtype=subtype)
    return buffer.getvalue()


@pytest.mark.parametrize("seconds", [1, 2])
def test_flac_that_was_written_to_a_pipe(tmp_path: Path, seconds: int) -> None:
    """It does not say how long it is: 36 bits of zeros."""
    content = bytearray(written("FLAC"))
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    (tmp_path / "a.flac").write_bytes(bytes(content))
    heard: list[str] = []
    made = Preprocessing(None, None, audio=AudioSpec("waveform", RATE, seconds * RATE, False, 400, False))
    found = made.load_audio(tmp_path / "a.flac", on_notice=heard.append)
    assert np.array_equal(found, np.rint(NOISE * 32768).astype(np.float32)[: seconds * RATE] / 32768)
    assert heard == (["audio cut to the first 1 seconds"] if seconds == 1 else [])


@pytest.mark.parametrize("rate", [8_000, RATE, 48_000])
@pytest.mark.parametrize("peak", [2.001, 12_000.0])
def test_floats_far_beyond_full_scale_are_refused_at_every_rate(tmp_path: Path, rate: int, peak: float) -> None:
    loud = NOISE * np.float32(peak / np.abs(NOISE).max())
    soundfile.write(tmp_path / "a.wav", loud, rate, subtype="FLOAT")
    for source in (tmp_path / "a.wav", Waveform(loud, rate), Waveform(np.stack([loud * 0, loud], 1), rate)):
        refused(source, "is far beyond full scale; received samples of up to .*divide it by")
    assert len(MADE.load_audio(Waveform(NOISE * 4, rate)))  # the overshoot of a lossy decoder passes


@pytest.mark.parametrize(
    "kind", ["WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "SVX", "VOC", "MAT4", "AVR", "MPC2K", "FLAC"]
)
def test_a_file_that_is_cut_is_refused_in_every_format_that_says_how_long_it_is(tmp_path: Path, kind: str) -> None:
    content = written(kind)
    (tmp_path / "whole").write_bytes(content)
    assert len(MADE.load_audio(tmp_path / "whole")) == len(NOISE)
    for share in (0.5, 0.97):
        (tmp_path / "cut").write_bytes(content[: int(len(content) * share)])
        refused(tmp_path / "cut", "cut is cut short|cut is not audio that can be read")


@pytest.mark.parametrize("kind", ["OGG", "MP3"])
def test_a_file_that_is_cut_is_read_with_a_notice_where_it_only_says_about_how_long_it_is(
    tmp_path: Path, kind: str
) -> None:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.tile(NOISE, 4), RATE, format=kind)
    for share, notices in ((1.0, 0), (0.5, 1)):
        heard: list[str] = []
        (tmp_path / "a").write_bytes(buffer.getvalue()[: int(len(buffer.getvalue()) * share)])
        long = Preprocessing(None, None, audio=AudioSpec("waveform", RATE, 60 * RATE, False, 400, False))
        long.load_audio(tmp_path / "a", on_notice=heard.append)
        assert len(heard) == notices
        assert all("may be cut short" in notice for notice in heard)


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000])
def test_wav_that_was_written_to_a_pipe_is_whole(tmp_path: Path, size: int) -> None:
    """Programs that do not know the length yet write a great number."""
    content = bytearray(written("WAV"))
    at = content.index(b"data") + 4
    content[4:8] = content[at : at + 4] = struct.pack("<I", size)
    (tmp_path / "a.wav").write_bytes(bytes(content))
    assert len(MADE.load_audio(tmp_path / "a.wav")) == len(NOISE)


@pytest.mark.parametrize("name", ["a.raw", "a.mp3", "a", "a.vox", "a.sd2", "b.wav.bak"])
def test_the_content_decides_and_not_the_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(written("WAV"))
    assert len(MADE.load_audio(tmp_path / name)) == len(NOISE)
    (tmp_path / name).write_bytes(bytes(99))
    refused(tmp_path / name, "is not audio that can be read")


def in_container(path: Path, codec: str, form: str | None = None, *, picture: bool = False) -> Path:
    """A second of 440 Hz at 48 kHz."""
    with av.open(str(path), "w", format=form) as file:
        stream = file.add_stream(codec, rate=48_000, layout="mono")
        stream.bit_rate = 192_000
        if picture:
            video = file.add_stream("mpeg4", rate=10)
            video.width = video.height = 32
            for _ in range(20):
                file.mux(video.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
            file.mux(video.encode())
        fifo = av.AudioFifo()
        frame = av.AudioFrame.from_ndarray(TONE[None], format="fltp", layout="mono")
        frame.rate = 48_000
        resampler = av.AudioResampler(format=stream.codec_context.format.name, layout="mono", rate=48_000)
        for ready in resampler.resample(frame):
            fifo.write(ready)
        while chunk := fifo.read(stream.codec_context.frame_size or 1024) or fifo.read(0, partial=True):
            file.mux(stream.encode(chunk))
        file.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("name", "codec", "form"),
    [
        ("a.m4a", "aac", None),
        ("a.mp4", "aac", None),
        ("a.aac", "aac", "adts"),
        ("a.webm", "libopus", None),
        ("a.mka", "aac", None),
        ("b.mka", "pcm_s16le", None),
        ("c.mka", "flac", None),
        ("a.mov", "pcm_s16be", None),
        ("a.avi", "pcm_u8", None),
        ("a.ts", "aac", "mpegts"),
        ("no-name", "aac", "mp4"),
    ],
)
def test_sound_inside_the_files_of_videos(tmp_path: Path, name: str, codec: str, form: str | None) -> None:
    """The tone that was written, to the codec's loss; alone, and beside a picture."""
    for picture in (False, True) if name in ("a.mp4", "a.avi") else (False,):
        heard: list[str] = []
        path = in_container(tmp_path / name, codec, form, picture=picture)
        found = MADE.load_audio(path, on_notice=heard.append)
        assert abs(len(found) - RATE) < 0.05 * RATE
        assert heard == []
        spectrum = np.abs(np.fft.rfft(found[2000:14_000]))
        assert spectrum.argmax() * RATE / 12_000 == pytest.approx(440, abs=2)
        assert np.abs(found[2000:14_000]).max() == pytest.approx(0.5, abs=0.03)


def test_sound_in_a_container_is_cut_to_what_is_read_and_said_to_be_cut_short(tmp_path: Path) -> None:
    path = in_container(tmp_path / "a.mka", "pcm_s16le")
    short = Preprocessing(None, None, audio=AudioSpec("waveform", RATE, RATE // 2, False, 400, False))
    heard: list[str] = []
    assert len(short.load_audio(path, on_notice=heard.append)) == RATE // 2
    assert heard == ["audio cut to the first 0.5 of its 1.0 seconds"]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    heard.clear()
    assert len(MADE.load_audio(path, on_notice=heard.append)) < 0.6 * RATE
    assert len(heard) == 1
    assert "may be cut short: it has 0.5 of 1.0 seconds" in heard[0]


def test_a_picture_has_no_sound_and_a_playlist_is_not_read(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mp4"), "w") as file:
        stream = file.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        file.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        file.mux(stream.encode())
    refused(tmp_path / "a.mp4", "has no sound")
    in_container(tmp_path / "other.m4a", "aac")
    for content in (b"ffconcat version 1.0\nfile other.m4a\n", b"#EXTM3U\n#EXTINF:1,\nother.m4a\n#EXT-X-ENDLIST\n"):
        (tmp_path / "list.m4a").write_bytes(content)
        refused(tmp_path / "list.m4a", "is not audio that can be read")


def test_says_which_extra_reads_containers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = in_container(tmp_path / "a.m4a", "aac")
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(MissingExtraError, match=r"mope-deploy\[video\]"):
        MADE.load_audio(path)
    (tmp_path / "a.wav").write_bytes(written("WAV"))
    assert len(MADE.load_audio(tmp_path / "a.wav")) == len(NOISE)


def test_what_is_read_of_many_channels_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros((1000, 4)), RATE)
    monkeypatch.setattr(sound, "MAX_SOUND_VALUES", 4000)
    assert len(MADE.load_audio(tmp_path / "a.wav")) == 1000
    monkeypatch.setattr(sound, "MAX_SOUND_VALUES", 3999)
    refused(tmp_path / "a.wav", "outside the limits; received 4,000 values to read")
    refused(Waveform(np.zeros((1000, 4), np.float32), RATE), "outside the limits")
    refused(in_container(tmp_path / "a.m4a", "aac"), "outside the limits")
