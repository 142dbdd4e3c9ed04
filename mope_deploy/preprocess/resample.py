"""Change of sampling rate: polyphase filtering by a Kaiser-windowed sinc, equal to the last bit on every machine.

Band-limited interpolation after J. O. Smith, "Digital Audio Resampling": the pass band ends at 0.88 of the lower
Nyquist frequency and the stop band, 90 dB down, begins at that frequency itself, so nothing audible folds back.

A sum of floats depends on the order that a machine's vector units add in. Here samples and filter are whole numbers
small enough that every partial sum is exact in float64: any order gives the same bits.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from mope_deploy.limits import MAX_PEAK

__all__ = ["SAMPLE_BITS", "resample", "support", "whole"]

SAMPLE_BITS = 22  # samples are multiples of 2^-22: 132 dB below full scale
_FILTER_BITS = 26
_CROSSINGS = 48  # zero crossings of the sinc on each side
_CUTOFF = 0.94  # of the lower Nyquist frequency, in the middle of the transition
_BETA = 8.96  # Kaiser's, for 90 dB
_PHASES = 1024  # filters made at once: rates without a common divisor need as many as there are Hz


def resample(samples: NDArray[np.floating], rate: int, target: int) -> NDArray[np.float32]:
    """``samples`` (n,) at ``rate`` Hz → (ceil(n · target / rate),) float32 at ``target`` Hz, without delay."""
    if rate == target:
        return samples.astype(np.float32)
    up, down = target // math.gcd(rate, target), rate // math.gcd(rate, target)
    reach = support(rate, target)
    n = len(samples)
    padded = np.zeros(n + 2 * reach + 1)
    padded[reach : reach + n] = whole(samples)
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1)  # (n + 1, 2 · reach + 1), a view
    out = np.empty(-(-n * up // down))
    for phase in range(min(up, len(out))):
        taps = _filter(up, down, phase // _PHASES)[phase % _PHASES]  # (2 · reach + 1,)
        count = -(-(len(out) - phase) // up)
        # Output phase + i · up lies at input time (phase + i · up) · down / up, whose whole part steps by `down`.
        first = phase * down // up
        picked = windows[first::down][:count]  # (count, 2 · reach + 1)
        out[phase::up] = np.einsum("nk,k->n", picked, taps)
    return (out * 2.0 ** -(SAMPLE_BITS + _FILTER_BITS)).astype(np.float32)


def support(rate: int, target: int) -> int:
    """Input samples on each side that one output sample is made from."""
    return 0 if rate == target else math.ceil(_CROSSINGS / (_CUTOFF * min(1.0, target / rate)))


def whole(samples: NDArray[np.floating]) -> NDArray[np.float64]:
    """Samples as whole multiples of 2^-22, clipped to ±2."""
    return np.rint(np.clip(samples.astype(np.float64), -MAX_PEAK, MAX_PEAK) * 2.0**SAMPLE_BITS)


@lru_cache(maxsize=8)
def _filter(up: int, down: int, block: int) -> NDArray[np.float64]:
    """Filters of a block of output phases (at most 1024, 2 · reach + 1) in multiples of 2^-26."""
    cutoff = _CUTOFF * min(1.0, up / down)
    half = _CROSSINGS / cutoff
    reach = math.ceil(half)
    phases = np.arange(block * _PHASES, min(up, (block + 1) * _PHASES))
    fraction = (phases * down % up) / up  # of the output's time after its whole part
    t = np.arange(-reach, reach + 1)[None] - fraction[:, None]  # (phases, taps)
    inside = np.clip(1.0 - (t / half) ** 2, 0.0, None)
    taps = np.sinc(cutoff * t) * np.i0(_BETA * np.sqrt(inside)) * (np.abs(t) <= half)
    taps /= taps.sum(axis=1, keepdims=True)  # a constant stays what it is, whatever the phase
    taps = np.rint(taps * 2.0**_FILTER_BITS)
    # Exact as long as peak · Σ|taps| stays below 2^53.
    assert MAX_PEAK * 2.0**SAMPLE_BITS * np.abs(taps).sum(axis=1).max() < 2.0**53
    taps.flags.writeable = False
    return taps
