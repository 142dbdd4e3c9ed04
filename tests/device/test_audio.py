"""Sound: decoded, resampled and prepared in numpy, against independent implementations; and files that cannot be used.

The tones are synthetic.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from mope_deploy.errors import ConfigError, MediaError, MissingExtraError, UsageError
from mope_deploy.preprocess import AudioSpec, Preprocessing, Waveform
from mope_deploy.preprocess.resample import resample

pytestmark = pytest.mark.device

RATE = 16_000
DYNAMIC = AudioSpec("waveform", RATE, 2 * RATE, False, 400, True)
FIXED = AudioSpec("waveform", RATE, RATE, True, 400, True)
MEL = AudioSpec("log-mel", RATE, 2 * RATE, True, 1, False, mels=80, n_fft=400, hop=160)


def prepare(spec: AudioSpec) -> Preprocessing:
    return Preprocessing(None, None, audio=spec)


def sine(hertz: float, seconds: float, rate: int, level: float = 0.5) -> np.ndarray:
    return (level * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 32_000, 44_100, 48_000, 96_000])
def test_a_tone_is_the_same_tone_at_any_rate(rate: int) -> None:
    """In the pass band 90 dB close to the exact tone, aligned to the sample; lengths as the durations say."""
    for hertz in (60.0, 0.42 * min(rate, RATE)):
        made = resample(sine(hertz, 0.5, rate), rate, RATE)
        assert made.dtype == np.float32
        assert len(made) == -(-round(0.5 * rate) * RATE // rate)
        exact = sine(hertz, len(made) / RATE + 1, RATE)[: len(made)]
        assert np.abs(made - exact)[400:-400].max() < 0.5 * 10 ** (-90 / 20)


@pytest.mark.parametrize("rate", [22_050, 44_100, 48_000])
def test_what_the_encoder_cannot_hear_does_not_fold_back(rate: int) -> None:
    """Tones above its Nyquist frequency are 90 dB down; dropping samples instead would keep them whole."""
    for hertz in (8_050.0, 0.45 * rate):
        heard = np.abs(resample(sine(hertz, 0.5, rate), rate, RATE)[400:-400]).max()
        assert heard < 0.5 * 10 ** (-90 / 20)
    assert np.abs(sine(0.45 * 48_000, 0.5, 48_000)[::3]).max() > 0.4


def test_a_constant_stays_what_it_is_and_an_impulse_keeps_its_place() -> None:
    made = resample(np.full(4410, 0.25, np.float32), 44_100, RATE)
    assert np.abs(made[300:-300] - 0.25).max() < 1e-6
    impulse = np.zeros(4410, np.float32)
    impulse[2205] = 1.0
    assert np.abs(resample(impulse, 44_100, RATE)).argmax() == 800
    assert resample(impulse, 44_100, 44_100).tobytes() == impulse.tobytes()


def test_resampling_is_a_sum_of_the_filter_over_the_samples() -> None:
    """Against the plain definition, sample by sample in extended precision, at a rate with no nice ratio."""
    x = np.random.default_rng(0).uniform(-0.5, 0.5, 700).astype(np.float32)
    rate, target = 11_025, 16_000
    made = resample(x, rate, target)
    cutoff, crossings, beta = 0.94, 48, 8.96
    half = crossings / cutoff
    for m in (0, 1, 333, 640, 641, len(made) - 1):
        time = m * rate / target
        n = np.arange(len(x), dtype=np.longdouble)
        everywhere = np.arange(-200, 1000, dtype=np.longdouble)

        def weight(at: Any, time: float = time) -> Any:
            t = np.asarray(at - time, np.float64)
            inside = np.clip(1 - (t / half) ** 2, 0, None)
            return np.sinc(cutoff * t) * np.i0(beta * np.sqrt(inside)) * (np.abs(t) <= half)

        assert abs(made[m] - (weight(n) * x).sum() / weight(everywhere).sum()) < 1e-6


def test_a_clip_does_not_depend_on_what_comes_after_it(tmp_path: Path) -> None:
    """Only what is needed of a long file is read, and that gives the bits that the whole file would."""
    x = np.random.default_rng(1).uniform(-0.5, 0.5, 44_100 * 6).astype(np.float32)
    soundfile.write(tmp_path / "long.wav", x, 44_100, subtype="FLOAT")
    heard: list[str] = []
    made = prepare(AudioSpec("waveform", RATE, 2 * RATE, False, 400, False)).load_audio(
        tmp_path / "long.wav", on_notice=heard.append
    )
    assert made.tobytes() == resample(x, 44_100, RATE)[: 2 * RATE].tobytes()
    assert heard == ["audio cut to the first 2 of its 6.0 seconds"]


@pytest.mark.parametrize(
    ("suffix", "subtype"), [("wav", "PCM_16"), ("wav", "PCM_24"), ("flac", "PCM_16"), ("ogg", None)]
)
def test_formats_rates_and_channels(suffix: str, subtype: str | None, tmp_path: Path) -> None:
    """Stereo at 44.1 kHz in every format comes close to the tone it was made from, lossless ones to their rounding."""
    left, right = sine(300, 0.4, 44_100), sine(500, 0.4, 44_100)
    file = tmp_path / f"a.{suffix}"
    soundfile.write(file, np.stack([left, right], 1), 44_100, subtype=subtype)
    made = prepare(AudioSpec("waveform", RATE, RATE, False, 400, False)).load_audio(file)
    exact = (sine(300, 0.4, RATE) + sine(500, 0.4, RATE)) / 2
    assert made.shape == exact.shape
    assert np.abs(made - exact)[400:-400].max() < (0.05 if suffix == "ogg" else 1e-4)


def test_arrays_in_memory() -> None:
    x = sine(300, 0.3, RATE)
    made = prepare(DYNAMIC)
    expected = made.load_audio(Waveform(x, RATE))
    assert np.array_equal(made.load_audio(Waveform(np.stack([x, x, x], 1), RATE)), expected)
    whole = np.rint(x * 32768).clip(-32768, 32767).astype(np.int16)
    assert np.abs(made.load_audio(Waveform(whole, RATE)) - expected).max() < 1e-3


def test_normalised_to_mean_0_and_variance_1_before_padding() -> None:
    clips = [sine(300, 0.3, RATE) + np.float32(0.2), sine(700, 0.7, RATE, 0.01)]
    for spec, length in ((DYNAMIC, round(0.7 * RATE)), (FIXED, RATE)):
        made = prepare(spec)
        arrays = made.collate([{"audio": made.load_audio(Waveform(clip, RATE))} for clip in clips])
        assert arrays["audio_values"].shape == (2, length)
        for row, clip in zip(arrays["audio_values"], clips, strict=True):
            real = clip.astype(np.float64)
            expected = (real - real.mean()) / np.sqrt(real.var() + 1e-7)
            assert np.abs(row[: len(clip)] - expected).max() < 1e-5
            assert not row[len(clip) :].any()
        assert set(arrays) == set(made.tensors)
    assert arrays.keys() == {"audio_values"}


def test_padding_is_masked_and_the_shortest_clips_are_filled_up() -> None:
    made = prepare(DYNAMIC)
    lengths = [1, 399, 400, 401, 5000]
    arrays = made.collate([{"audio": made.load_audio(Waveform(sine(900, n / RATE, RATE), RATE))} for n in lengths])
    assert arrays["audio_mask"].dtype == np.int64
    assert arrays["audio_mask"].sum(1).tolist() == [400, 400, 400, 401, 5000]
    assert (np.diff(arrays["audio_mask"]) <= 0).all()
    assert not arrays["audio_values"][arrays["audio_mask"] == 0].any()


def test_a_clip_is_prepared_alone_bit_for_bit() -> None:
    for spec in (FIXED, MEL):
        made = prepare(spec)
        clips = [made.load_audio(Waveform(sine(200 + 50 * i, 0.2 + 0.5 * i, RATE), RATE)) for i in range(4)]
        (name,) = made.tensors
        together = made.collate([{"audio": clip} for clip in clips])[name]
        for clip, row in zip(clips, together, strict=True):
            assert made.collate([{"audio": clip}])[name][0].tobytes() == row.tobytes()


def test_the_spectrogram_shows_the_tone_and_has_the_stated_size() -> None:
    """The band that holds 1 kHz is the loudest (Slaney's scale is linear up to there); silence is the floor."""
    made = prepare(MEL).load_audio(Waveform(sine(1000, 1.0, RATE), RATE))
    assert made.shape == (80, 200)
    assert made.dtype == np.float32
    edges = 1000 / (200 / 3)  # mels of 1 kHz
    top = 15 + 27 * np.log(8) / np.log(6.4)
    assert abs(made[:, 50].argmax() - (edges / (top / 81) - 1)) <= 1
    assert made.max() - made[:, 150:].max() == pytest.approx(2.0, abs=1e-5)  # 8 decades, over 4
    assert (made * 2.0**20 == np.rint(made * 2.0**20)).all()


def test_silence_is_a_notice_and_no_division_by_zero() -> None:
    for spec in (DYNAMIC, FIXED, MEL):
        heard: list[str] = []
        made = prepare(spec).load_audio(Waveform(np.zeros(8000, np.float32), RATE), on_notice=heard.append)
        assert np.isfinite(made).all()
        assert heard == ["audio given as an array is silent"]


def write(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    good = tmp_path / "good.flac"
    soundfile.write(good, np.random.default_rng(0).uniform(-0.5, 0.5, RATE), RATE)
    soundfile.write(tmp_path / "none.wav", np.zeros(0, np.float32), RATE)
    soundfile.write(tmp_path / "nan.wav", np.full(99, np.nan, np.float32), RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "slow.wav", np.zeros(99, np.float32), 100)
    content = good.read_bytes()
    cases = {
        tmp_path / "absent.wav": "does not exist",
        tmp_path: "is a folder",
        write(tmp_path, "empty.wav", b""): "is empty (0 bytes)",
        write(tmp_path, "text.mp3", b"not a sound at all" * 9): "is not audio that can be read",
        write(tmp_path, "half.flac", content[: len(content) // 2]): "half.flac",
        write(tmp_path, "head.flac", content[:60]): "head.flac",
        write(tmp_path, "aac.m4a", b"\0\0\0\x20ftypM4A \0\0\0\0M4A mp42isom\0\0\0\0" + bytes(99)): "cannot be decoded",
        tmp_path / "none.wav": "has no samples (0 seconds)",
        tmp_path / "nan.wav": "NaN",
        tmp_path / "slow.wav": "outside the limits",
    }
    for path, message in cases.items():
        with pytest.raises(MediaError) as caught:
            prepare(DYNAMIC).load_audio(path)
        assert message in str(caught.value), path
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)
    for wrong in (
        3,
        np.zeros(8, np.float32),
        Waveform(np.zeros((2, 2, 2), np.float32), RATE),
        Waveform(np.zeros(9, np.int64), RATE),
        Waveform(np.zeros(9, np.float32), 16_000.5),  # type: ignore[arg-type]
        Waveform(np.zeros(0, np.float32), RATE),
    ):
        with pytest.raises(MediaError, match="audio"):
            prepare(DYNAMIC).load_audio(wrong)  # type: ignore[arg-type]


def test_says_which_extra_reads_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    soundfile.write(tmp_path / "a.wav", sine(300, 0.1, RATE), RATE)
    monkeypatch.setitem(__import__("sys").modules, "soundfile", None)
    with pytest.raises(MissingExtraError, match=r"mope-deploy\[audio\]"):
        prepare(DYNAMIC).load_audio(tmp_path / "a.wav")
    assert len(prepare(DYNAMIC).load_audio(Waveform(sine(300, 0.1, RATE), RATE))) == 1600


@pytest.mark.parametrize("spec", [DYNAMIC, FIXED, MEL])
def test_specifications_survive_json_and_are_strict(spec: AudioSpec) -> None:
    made = prepare(spec)
    document = made.to_dict()
    assert Preprocessing.from_dict(document) == made
    for key, value in (
        ("form", "mfcc"),
        ("sample_rate", 0),
        ("max_samples", 1.5),
        ("fixed", 1),
        ("min_samples", 10**7),
        ("normalise", None),
        ("mels", 0 if spec is MEL else 80),
        ("hop", 7 if spec is MEL else 160),
        ("other", 1),
    ):
        with pytest.raises(ConfigError):
            Preprocessing.from_dict({**document, "audio": {**document["audio"], key: value}})


def test_a_missing_clip_has_harmless_values_and_says_so() -> None:
    for spec in (DYNAMIC, FIXED, MEL):
        with pytest.raises(UsageError, match="audio is missing"):
            prepare(spec).collate([{"audio": None}])
        made = Preprocessing(None, None, audio=spec, missing=("audio",))
        clip = made.load_audio(Waveform(sine(300, 0.2, RATE), RATE))
        arrays = made.collate([{"audio": None}, {"audio": clip}, {}])
        assert arrays["audio_present"].tolist() == [0, 1, 0]
        assert {name: array.dtype.name for name, array in arrays.items()} == {k: v[0] for k, v in made.tensors.items()}
        assert all(np.isfinite(array).all() for array in arrays.values())
        if spec is DYNAMIC:
            assert arrays["audio_mask"].sum(1).tolist() == [400, 3200, 400]
