"""Preparation of sound and video against transformers' own feature extractors and image processors."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import VideoMAEImageProcessor, Wav2Vec2FeatureExtractor, WhisperFeatureExtractor

from mope_deploy.preprocess import AudioSpec, ImageSpec, Preprocessing, VideoSpec, Waveform

RATE = 16_000


def clip(seconds: float, seed: int = 0) -> np.ndarray:
    """Noise that swells, and a tone: loud and quiet bands, loud and quiet frames."""
    t = np.arange(round(seconds * RATE)) / RATE
    noise = np.random.default_rng(seed).standard_normal(len(t))
    return (0.1 * noise * t / seconds + 0.4 * np.sin(2 * np.pi * 440 * t)).astype(np.float32)


@pytest.mark.parametrize(("seconds", "mels"), [(0.05, 80), (7.3, 80), (30.0, 128), (33.1, 80)])
def test_the_spectrogram_is_whispers(seconds: float, mels: int) -> None:
    """Every value as near to the library's float64 implementation as samples in multiples of 2^-22 can bring it.

    Their rounding is noise of a known size in every Fourier sum: 10 of its standard deviations are allowed for. In
    v = log10(power) / 4 noise e in an amplitude |X| is e / (2 · ln 10 · |X|): the quieter the value, the more.
    """
    spec = AudioSpec("log-mel", RATE, 30 * RATE, True, 1, False, mels=mels, n_fft=400, hop=160)
    x = clip(seconds)
    made = Preprocessing(None, None, audio=spec).load_audio(Waveform(x, RATE))
    extractor = WhisperFeatureExtractor(feature_size=mels)
    assert made.shape == (mels, 3000)
    padded = np.pad(x, (0, max(0, 30 * RATE - len(x))))[: 30 * RATE]
    exact = extractor._np_extract_fbank_features(padded[None], "cpu")[0]
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(padded.astype(np.float64), 200, mode="reflect"), 400)[
        ::160
    ]
    peak = np.abs(np.fft.rfft(frames * window)).max()
    noise = 2.0**-22 / np.sqrt(12) * np.sqrt((window**2).sum() + (frames**2).sum(axis=1).max())  # of samples, of sines
    loudness = 10 ** (2 * (exact - exact.max()))  # amplitudes, as shares of the greatest
    rounding = 2.0**-19  # of the result to multiples of 2^-20, and of the library's to float32
    assert (np.abs(made - exact) < rounding + 10 * noise / (2 * np.log(10) * peak * loudness)).all()


@pytest.mark.parametrize("fixed", [False, True])
def test_waveforms_are_wav2vec2s(fixed: bool) -> None:
    """Normalised over what is real and padded with zeros, cut before either."""
    spec = AudioSpec("waveform", RATE, 2 * RATE, fixed, 400, True)
    made = Preprocessing(None, None, audio=spec)
    clips = [clip(0.7, 1), clip(1.9, 2), clip(3.0, 3)]
    arrays = made.collate([{"audio": made.load_audio(Waveform(x, RATE))} for x in clips])
    theirs = Wav2Vec2FeatureExtractor(return_attention_mask=True)(
        clips, sampling_rate=RATE, padding="max_length", max_length=2 * RATE, truncation=True, return_tensors="np"
    )
    assert np.abs(arrays["audio_values"] - theirs["input_values"]).max() < 1e-4
    if not fixed:
        assert np.array_equal(arrays["audio_mask"], theirs["attention_mask"])


def test_frames_are_videomaes() -> None:
    """To the last bit but the resizing filter's, which the library runs in another implementation."""
    image = ImageSpec(16, 16, 18, 18, "center", "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    made = Preprocessing(None, None, video=VideoSpec(4, "uniform", 60.0, image))
    frames = np.random.default_rng(0).integers(0, 256, (4, 40, 30, 3), dtype=np.uint8)
    processor = VideoMAEImageProcessor(size={"shortest_edge": 18}, crop_size={"height": 16, "width": 16})
    theirs = np.asarray(processor(list(frames), return_tensors="np")["pixel_values"])[0]
    ours = made.collate([{"video": made.load_video(frames)}])["video_values"][0]
    assert ours.shape == theirs.shape == (4, 3, 16, 16)
    assert np.abs(ours - theirs).max() < 2.1 / 255 / 0.5
