"""Sound → what an audio encoder reads, in numpy. (Files: sound.py.)

Any sampling rate and number of channels: channels are averaged, the rate is changed (resample.py), the clip is cut to
the encoder's length, and then normalised or turned into a spectrogram. Each clip is prepared alone, so its numbers
never depend on its batch-mates; and equal samples give equal bits on every machine.

Letters: B batch · S samples at the encoder's rate · T frames · M mel bands.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from mope_deploy.errors import MediaError
from mope_deploy.fields import FieldError, between, choice, shown
from mope_deploy.limits import MAX_PEAK, SAMPLE_RATES
from mope_deploy.preprocess.mel import log_mel
from mope_deploy.preprocess.resample import resample, support
from mope_deploy.preprocess.shared import Notice, Tensors, check_file, describe
from mope_deploy.preprocess.sound import Sound, check_sound, read_sound

__all__ = ["AudioSource", "AudioSpec", "Waveform", "read_waveform"]


@dataclass(frozen=True)
class Waveform:
    """Sound that is in memory already.

    Args:
        samples: float in ±1, or int16: (n,) or (n, channels).
        rate: Hz.
    """

    samples: NDArray[Any]
    rate: int


_Samples = Annotated[int, between(1, 10**9)]
_Size = Annotated[int, between(1, 1024)]
AudioSource = str | os.PathLike[str] | Waveform


@dataclass(frozen=True)
class AudioSpec:
    """How sound becomes what the audio encoder reads.

    Args:
        form: ``"waveform"`` or ``"log-mel"``.
        sample_rate: Hz at the encoder.
        max_samples: at that rate; longer clips are cut there.
        fixed: every clip is padded with silence to ``max_samples``. Else clips keep their length, and a batch is padded
            to its longest behind a mask.
        min_samples: shorter clips are padded with silence to it: what one output of the encoder's convolutions reads.
        normalise: each clip to mean 0 and variance 1, before any padding.
        mels, n_fft, hop: bands, window and step of the spectrogram; None for a waveform.
    """

    form: Annotated[str, choice("waveform", "log-mel")]
    sample_rate: Annotated[int, between(*SAMPLE_RATES)]
    max_samples: _Samples
    fixed: bool
    min_samples: _Samples
    normalise: bool
    mels: _Size | None = None
    n_fft: Annotated[int, between(2, 1024)] | None = None
    hop: _Size | None = None

    def __post_init__(self) -> None:
        def wrong(field: str, expected: str) -> FieldError:
            return FieldError(field, received=shown(getattr(self, field)), expected=expected)

        if self.min_samples > self.max_samples:
            raise wrong("min_samples", f"an integer from 1 to {self.max_samples:,}")
        spectrogram = self.form == "log-mel"
        for field in ("mels", "n_fft", "hop"):
            if (getattr(self, field) is None) == spectrogram:
                raise wrong(field, "an integer for a spectrogram" if spectrogram else "null for a waveform")
        if spectrogram and not self.fixed:
            raise wrong("fixed", "true for a spectrogram")
        n_fft = self.n_fft or 0
        if n_fft % 2 or n_fft >= 2 * self.max_samples or self.max_samples % (self.hop or 1):
            raise wrong("n_fft", "an even window shorter than the clip, and hops that divide the clip")

    @property
    def tensors(self) -> Tensors:
        """What the encoder reads: name → dtype and axes."""
        if self.mels is not None:
            return {"audio_features": ("float32", ("batch", self.mels, self.frames))}
        if self.fixed:
            return {"audio_values": ("float32", ("batch", self.max_samples))}
        axes = ("batch", "audio_length")
        return {"audio_values": ("float32", axes), "audio_mask": ("int64", axes)}

    @property
    def frames(self) -> int:
        """Frames of the spectrogram."""
        return self.max_samples // (self.hop or 1)

    @property
    def max_seconds(self) -> float:
        return self.max_samples / self.sample_rate

    def load(self, source: AudioSource, *, on_notice: Notice = lambda _: None) -> NDArray[np.float32]:
        """Decode, average the channels, resample, cut to the encoder's length, normalise. Deterministic.

        Args:
            source: a path, or a :class:`Waveform`.
            on_notice: told if the clip was cut, may be cut short, or is silent.

        Returns:
            float32 (S,), or of a spectrogram (M, T).

        Raises:
            MediaError: one line naming the file: missing, empty, not sound that can be read, cut short, without
                samples, with NaN or far beyond full scale, outside the stated limits.
            MissingExtraError: a file is to be read, and soundfile (or PyAV, for MP4 and the like) is not installed.
        """
        waveform = read_waveform(source, seconds=self.max_seconds, target=self.sample_rate, on_notice=on_notice)
        samples = resample(_mono(waveform.samples), waveform.rate, self.sample_rate)
        if len(samples) > self.max_samples:
            samples = samples[: self.max_samples]
            whole = "" if waveform.seconds is None else f" of its {waveform.seconds:,.1f}"
            on_notice(f"audio cut to the first {self.max_seconds:g}{whole} seconds")
        if not samples.any():
            on_notice(f"{describe('audio', source)} is silent")
        if self.mels is None or self.n_fft is None or self.hop is None:
            return _standardised(samples) if self.normalise else samples
        padded = np.pad(samples, (0, self.max_samples - len(samples)))
        return log_mel(padded, sample_rate=self.sample_rate, mels=self.mels, n_fft=self.n_fft, hop=self.hop)

    def batch(self, clips: Sequence[NDArray[np.float32] | None]) -> dict[str, NDArray[Any]]:
        """B results of :meth:`load` → the encoder's arrays, with names and axes of :attr:`tensors`.

        None is a clip that is missing: nothing of what stands in its place reaches the result.
        """
        if self.mels is not None:
            nothing = np.zeros((self.mels, self.frames), np.float32)
            return {"audio_features": np.stack([nothing if clip is None else clip for clip in clips])}  # (B, M, T)
        ready = [np.zeros(self.min_samples, np.float32) if clip is None else clip for clip in clips]
        lengths = [max(len(clip), self.min_samples) for clip in ready]
        S = self.max_samples if self.fixed else max(lengths)
        values = np.zeros((len(ready), S), np.float32)
        for row, clip in zip(values, ready, strict=True):
            row[: len(clip)] = clip
        if self.fixed:
            return {"audio_values": values}
        mask = (np.arange(S) < np.array(lengths)[:, None]).astype(np.int64)  # (B, S)
        return {"audio_values": values, "audio_mask": mask}


def read_waveform(source: AudioSource, *, seconds: float, target: int, on_notice: Notice = lambda _: None) -> Sound:
    """The first ``seconds`` of a clip, and what resampling to ``target`` Hz reads behind them; never more of a file.

    Raises as :meth:`AudioSpec.load`.
    """
    if isinstance(source, Waveform):
        return _from_memory(source)
    if not isinstance(source, str | os.PathLike):
        raise MediaError("audio", received=type(source).__name__, expected="a path, or a Waveform of samples and rate")
    name, path = describe("audio", source), Path(source)
    check_file(path, name, expected="an audio file")

    def wanted(rate: int) -> int:
        return max(math.ceil(seconds * rate) + support(rate, target) + 1, 1)

    sound = read_sound(path, name, wanted=wanted, on_notice=on_notice)
    _check_samples(sound.samples, name)
    return sound


def _from_memory(source: Waveform) -> Sound:
    samples, name = np.asarray(source.samples), "audio given as an array"
    if samples.dtype == np.int16:
        samples = samples.astype(np.float32) / np.float32(32768)
    if samples.dtype.kind != "f" or samples.ndim not in (1, 2):
        expected = "float in ±1 or int16, (samples,) or (samples, channels)"
        raise MediaError(name, received=f"{samples.dtype} {samples.shape}", expected=expected)
    if samples.ndim == 1:
        samples = samples[:, None]
    if isinstance(source.rate, bool) or not isinstance(source.rate, int | np.integer):
        raise MediaError(name, received=f"rate {source.rate!r}", expected="a whole number of Hz")
    check_sound(int(source.rate), samples.shape[1], samples.size, name)
    samples = samples.astype(np.float32)
    _check_samples(samples, name)
    return Sound(samples, int(source.rate), len(samples) / source.rate)


def _check_samples(samples: NDArray[np.float32], name: str) -> None:
    if not len(samples):
        raise MediaError(f"{name} has no samples (0 seconds)", expected="at least one")
    if not np.isfinite(samples).all():
        raise MediaError(f"{name} holds NaN or infinite samples")
    if (peak := float(np.abs(samples).max())) > MAX_PEAK:
        raise MediaError(
            f"{name} is far beyond full scale",
            received=f"samples of up to {peak:,.6g}",
            expected="floats in ±1",
            todo="divide it by what full scale is in it: by 32,768 where floats hold 16-bit numbers",
        )


def _mono(samples: NDArray[np.float32]) -> NDArray[np.float64]:
    """(n, channels) → their mean (n,); added one by one, so that the order is the same everywhere."""
    total = samples[:, 0].astype(np.float64)
    for channel in range(1, samples.shape[1]):
        total += samples[:, channel]
    return total / samples.shape[1]


def _standardised(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """(x − mean) / sqrt(variance + 1e-7), as the libraries' feature extractors do; sums are correctly rounded."""
    x = samples.astype(np.float64)
    x -= math.fsum(x.tolist()) / len(x)
    variance = math.fsum((x * x).tolist()) / len(x)
    return (x / math.sqrt(variance + 1e-7)).astype(np.float32)
