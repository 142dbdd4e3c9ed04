"""Whisper's log-mel spectrogram, equal to the last bit on every machine.

As ``transformers.WhisperFeatureExtractor`` computes it: reflected at both ends, periodic Hann window, power spectrum,
Slaney's mel filters up to 8 kHz, log10 with a floor 8 decades below the clip's maximum, ``(x + 4) / 4``. Its last frame
is dropped. The Fourier sums are over whole numbers that are exact in float64 (see resample.py), and the result is
rounded to multiples of 2^-20, which hides what is left of a machine's own logarithm.

Letters: n samples · T frames · M mel bands · F frequency bins.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from mope_deploy.preprocess.resample import SAMPLE_BITS, whole

__all__ = ["log_mel", "mel_filters"]

_BASIS_BITS = 22
_OUTPUT_BITS = 20
_FLOOR = 1e-10
_TOP_HZ = 8000.0


def log_mel(samples: NDArray[np.floating], *, sample_rate: int, mels: int, n_fft: int, hop: int) -> NDArray[np.float32]:
    """``samples`` (n,) in ±1 → (M, n // hop) float32, about -1 to 2.

    Args:
        samples: more than ``n_fft / 2`` of them.
        sample_rate: Hz.
        mels: M.
        n_fft: samples of one window, even and at most 1024.
        hop: samples between two windows.
    """
    padded = np.pad(whole(samples), n_fft // 2, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, n_fft)[::hop][: len(samples) // hop]  # (T, n_fft), a view
    spectrum = _basis(n_fft) @ np.ascontiguousarray(frames.T)  # (2F, T), cosines above sines
    spectrum *= 2.0 ** -(SAMPLE_BITS + _BASIS_BITS)
    F = n_fft // 2 + 1
    power = spectrum[:F] ** 2 + spectrum[F:] ** 2  # (F, T)
    bands = np.zeros((mels, power.shape[1]))
    for band, weights in zip(bands, mel_filters(sample_rate=sample_rate, mels=mels, n_fft=n_fft), strict=True):
        for k in np.flatnonzero(weights):  # one by one: the order of the sum is part of its bits
            band += weights[k] * power[k]
    logs = np.log10(np.maximum(bands, _FLOOR))
    logs = (np.maximum(logs, logs.max() - 8.0) + 4.0) / 4.0
    return (np.rint(logs * 2.0**_OUTPUT_BITS) * 2.0**-_OUTPUT_BITS).astype(np.float32)


@lru_cache(maxsize=4)
def _basis(n_fft: int) -> NDArray[np.float64]:
    """Windowed cosines and sines (2F, n_fft) in multiples of 2^-22."""
    n = np.arange(n_fft)
    window = 0.5 - 0.5 * np.cos(2.0 * np.pi * n / n_fft)
    # k · n modulo n_fft first: sines of large angles lose digits.
    angles = 2.0 * np.pi * (np.outer(np.arange(n_fft // 2 + 1), n) % n_fft) / n_fft  # (F, n_fft)
    basis = np.rint(np.concatenate([np.cos(angles), np.sin(angles)]) * window * 2.0**_BASIS_BITS)
    assert 2.0 * 2.0**SAMPLE_BITS * np.abs(basis).sum(axis=1).max() < 2.0**53  # every partial sum is exact
    basis.flags.writeable = False
    return basis


@lru_cache(maxsize=4)
def mel_filters(*, sample_rate: int, mels: int, n_fft: int) -> NDArray[np.float64]:
    """Triangular filters (M, F) of equal area, equally spaced on Slaney's mel scale from 0 Hz to 8 kHz at most."""
    top = min(_TOP_HZ, sample_rate / 2)
    edges = [_hertz(_mel(top) * i / (mels + 1)) for i in range(mels + 2)]
    bins = np.arange(n_fft // 2 + 1) * (sample_rate / n_fft)  # (F,) Hz
    filters = np.empty((mels, len(bins)))
    for i, (low, middle, high) in enumerate(zip(edges, edges[1:], edges[2:], strict=False)):
        rising, falling = (bins - low) / (middle - low), (high - bins) / (high - middle)
        filters[i] = np.maximum(0.0, np.minimum(rising, falling)) * (2.0 / (high - low))
    filters.flags.writeable = False
    return filters


def _mel(hertz: float) -> float:
    """Slaney's scale: linear below 1 kHz, logarithmic above."""
    return hertz * 3.0 / 200.0 if hertz < 1000.0 else 15.0 + 27.0 * math.log(hertz / 1000.0) / math.log(6.4)


def _hertz(mel: float) -> float:
    return mel * 200.0 / 3.0 if mel < 15.0 else 1000.0 * math.exp(math.log(6.4) / 27.0 * (mel - 15.0))
