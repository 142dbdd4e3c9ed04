"""Files of sound → samples: by soundfile (the extra ``audio``), and by PyAV (``video``) what is in a video's container.

What a file holds decides who reads it, not its name. Only what an encoder will hear is decoded. A file that promises
more samples than it has is refused where the format says exactly how many; where it only says about how many, it is
read, with a notice.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mope_deploy.errors import MediaError, MopeError
from mope_deploy.extras import require
from mope_deploy.limits import MAX_CHANNELS, MAX_SOUND_VALUES, SAMPLE_RATES
from mope_deploy.preprocess.container import opened
from mope_deploy.preprocess.shared import Notice, one_line

__all__ = ["Sound", "check_sound", "read_sound"]

_EXACT = ("WAV", "WAVEX", "FLAC", "AIFF", "W64", "RF64", "AU", "CAF")  # libsndfile counts their samples, not blocks
_UNKNOWN = 2**62  # libsndfile's count of samples where a file written to a pipe has none
_STREAMED = 0x7FFF0000  # sizes from here on are what programs write that do not know them yet
_TOLERANCE = 0.25  # seconds between what containers and MP3 say and what comes out of their decoders
# What libsndfile notes about a file whose size is not what its header promises; RIFF's own size is often wrong.
_PROMISED = re.compile(r"^\s*(?:data|SSND|BODY|Data Size|riff|Riff size)\s*: (\d+) \(should be (\d+)\)", re.MULTILINE)
_COUNTED = re.compile(r"^\s*Frames\s*: (\d+)$", re.MULTILINE)  # of formats whose size libsndfile does not check
_UNCHECKED = ("RF64", "AVR", "MPC2K")
_TRUNCATED = ("Seems to be a truncated file", "File seems to be truncated")
_NO_END = "Last page lacks an end-of-stream bit"
_MAGIC = (b"\x1aE\xdf\xa3", b"FLV\1", b"0&\xb2u\x8ef\xcf\x11", b"#!AMR")  # Matroska and WebM, FLV, ASF, AMR
_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")  # MP4, M4A, MOV


@dataclass(frozen=True)
class Sound:
    """What was read of a file.

    Args:
        samples: float32 (n, channels).
        rate: Hz.
        seconds: how long the whole file is; None where it does not say.
    """

    samples: NDArray[np.float32]
    rate: int
    seconds: float | None


def read_sound(path: Path, name: str, *, wanted: Callable[[int], int], on_notice: Notice) -> Sound:
    """The first samples of a file.

    Args:
        path: a file that is there.
        name: what messages call it.
        wanted: the number of samples to read, by the sampling rate.
        on_notice: told of a file that may be cut short.

    Raises:
        MediaError: not sound that can be read, cut short, outside the stated limits.
        MissingExtraError: the package that reads this format is not installed.
    """
    with path.open("rb") as file:
        head = file.read(192)
    if _in_container(head):
        if head[:4] == b"RIFF" and path.stat().st_size < 8 + int.from_bytes(head[4:8], "little") < _STREAMED:
            on_notice(f"{name} may be cut short: its header promises more bytes than it has")
        return _from_container(path, name, wanted, on_notice)
    return _from_file(path, name, wanted, on_notice)


def check_sound(rate: int, channels: int, values: int, name: str) -> None:
    """Raises MediaError for a sampling rate, channels, or a number of values to read outside the stated limits."""
    if not (SAMPLE_RATES[0] <= rate <= SAMPLE_RATES[1] and 1 <= channels <= MAX_CHANNELS):
        expected = f"1 to {MAX_CHANNELS} channels at {SAMPLE_RATES[0]:,} to {SAMPLE_RATES[1]:,} Hz"
        received = f"{channels:,} channels at {rate:,} Hz"
        raise MediaError(f"{name} is outside the limits", received=received, expected=expected)
    if values > MAX_SOUND_VALUES:
        received, expected = f"{values:,} values to read", f"at most {MAX_SOUND_VALUES:,}, all channels together"
        raise MediaError(f"{name} is outside the limits", received=received, expected=expected)


def _in_container(head: bytes) -> bool:
    """Whether a file begins like one that soundfile does not know and PyAV does."""
    return (
        head[4:8] in _BOXES
        or head.startswith(_MAGIC)
        or (head[:4], head[8:12]) == (b"RIFF", b"AVI ")
        or (head[:1], head[188:189]) == (b"G", b"G")  # an MPEG transport stream
        or (len(head) > 1 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0)  # AAC in ADTS; MPEG audio has another layer
    )


def _from_file(path: Path, name: str, wanted: Callable[[int], int], on_notice: Notice) -> Sound:
    soundfile = require("soundfile", extra="audio", purpose="reading audio")
    try:
        # By its descriptor: soundfile goes by the suffix of a name, and libsndfile opens files beside it.
        with path.open("rb") as opened_file, soundfile.SoundFile(opened_file.fileno(), closefd=False) as file:
            rate, total, log = file.samplerate, file.frames, file.extra_info
            count = min(wanted(rate), total)
            check_sound(rate, file.channels, count * file.channels, name)
            if total >= _UNKNOWN:
                file.seekable = lambda: False  # soundfile seeks behind what it read, which needs a known end
            samples = file.read(count, dtype="float32", always_2d=True)
            kind = file.format
    except MopeError:
        raise
    except Exception as error:  # soundfile's own, and whatever else a damaged header makes it stumble over
        raise MediaError(
            f"{name} is not audio that can be read",
            received=one_line(error),
            expected="WAV, FLAC, OGG, MP3 or AIFF, complete; or AAC, MP4, WebM or Matroska",
            todo="convert it first",
        ) from error
    known = total < _UNKNOWN
    if known and len(samples) < count and kind in _EXACT:
        raise MediaError(f"{name} is cut short", received=f"{len(samples):,} of {total:,} samples")
    _check_promises(log, kind, total, name)
    if (known and len(samples) < count - _TOLERANCE * rate) or _NO_END in log:
        on_notice(f"{name} may be cut short: it has {len(samples) / rate:,.1f} seconds and no proper end")
    return Sound(samples, rate, max(total, len(samples)) / rate if known else None)


def _check_promises(log: str, kind: str, total: int, name: str) -> None:
    """Raises MediaError for a header that promises more than libsndfile, whose notes these are, has found."""
    promised = [(int(said), int(there)) for said, there in _PROMISED.findall(log)]
    cut = [
        f"{there:,} of the {said:,} bytes that its header promises"
        for said, there in promised
        if there < said < _STREAMED
    ]
    counted = [int(said) for said in _COUNTED.findall(log) if kind in _UNCHECKED]
    cut += [f"{total:,} of {said:,} samples" for said in counted if total < said < _STREAMED]
    if cut or any(words in log for words in _TRUNCATED):
        raise MediaError(f"{name} is cut short", received=cut[0] if cut else None)


def _from_container(path: Path, name: str, wanted: Callable[[int], int], on_notice: Notice) -> Sound:
    blocks: list[NDArray[np.float32]] = []
    rate = channels = have = 0
    count = 1
    with opened(path, name, purpose="reading the sound of MP4, WebM, Matroska and AAC files") as container:
        if not container.streams.audio:
            raise MediaError(f"{name} has no sound", received="a picture or data alone", expected="an audio stream")
        stream = container.streams.audio[0]
        seconds = _seconds(container, stream)
        for frame in container.decode(stream):
            if not blocks:
                rate, channels = frame.sample_rate, len(frame.layout.channels)
                count = wanted(rate)
                there = count if seconds is None else min(count, math.ceil(seconds * rate))
                check_sound(rate, channels, channels * there, name)
            if (frame.sample_rate, len(frame.layout.channels)) != (rate, channels):
                raise MediaError(
                    f"{name} changes its sampling rate or its channels on the way", todo="convert it first"
                )
            blocks.append(_floats(frame, channels))
            have += len(blocks[-1])
            if have >= count:
                break
    if not blocks:
        raise MediaError(f"{name} has no samples (0 seconds)", expected="at least one")
    if seconds is not None and have < count and have < (seconds - _TOLERANCE) * rate:
        on_notice(f"{name} may be cut short: it has {have / rate:,.1f} of {seconds:,.1f} seconds")
    return Sound(np.concatenate(blocks)[:count], rate, seconds and max(seconds, have / rate))


def _seconds(container: Any, stream: Any) -> float | None:
    """How long the sound is, as far as the file itself says so."""
    if stream.duration is not None and "mov" in container.format.name:
        return float(stream.duration * stream.time_base)
    alone = len(container.streams) == 1 and "matroska" in container.format.name
    return container.duration / 1e6 if alone and container.duration else None


def _floats(frame: Any, channels: int) -> NDArray[np.float32]:
    """PyAV's frame of any format → float32 (n, channels), full scale ±1."""
    values = frame.to_ndarray()
    values = values.T if frame.format.is_planar else values.reshape(-1, channels)
    if values.dtype.kind == "f":
        return values.astype(np.float32)
    middle = 128 if values.dtype.kind == "u" else 0
    return ((values.astype(np.float64) - middle) / 2.0 ** (8 * values.itemsize - 1)).astype(np.float32)
