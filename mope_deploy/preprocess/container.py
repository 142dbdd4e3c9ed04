"""Files of video, and of sound that soundfile does not know, opened by PyAV (the extra ``video``): one of the formats
that are named here, and nothing but the file itself.

FFmpeg reads some 300 formats. Some are lists of other files (HLS, DASH, concat), some are addresses (SDP, RTSP), and
some read whatever lies beside the file. What a file is called decides nothing; what it is must be on the list.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mope_deploy.errors import MediaError, MopeError
from mope_deploy.extras import require
from mope_deploy.limits import MAX_VIDEO_PIXELS
from mope_deploy.preprocess.shared import one_line

__all__ = ["opened"]

# FFmpeg's names of demuxers that read one file, and that file alone.
_FORMATS = (
    *(
        "mov",
        "mp4",
        "m4a",
        "3gp",
        "3g2",
        "mj2",
        "matroska",
        "webm",
        "avi",
        "mpegts",
        "mpeg",
        "mpegvideo",
        "m4v",
        "h264",
    ),
    *("hevc", "obu", "ivf", "ogg", "flv", "asf", "mxf", "dv", "nut", "gif", "apng", "yuv4mpegpipe"),
    *("aac", "ac3", "eac3", "amr", "mp3", "flac", "wav", "w64", "aiff", "caf", "wv", "ape", "tta"),
)
_OPTIONS = {
    "format_whitelist": ",".join(_FORMATS),
    "protocol_whitelist": "file",
    "max_pixels": str(MAX_VIDEO_PIXELS),  # decoders refuse larger frames before they take memory for them
}


@contextmanager
def opened(path: Path, name: str, *, purpose: str) -> Iterator[Any]:
    """PyAV's container of a file; whatever PyAV raises inside the ``with`` is one line that names the file.

    Args:
        path: a file that is there.
        name: what messages call it.
        purpose: what needs PyAV, as :func:`mope_deploy.extras.require` has it.

    Raises:
        MediaError: not one of the formats, damaged, or it cannot be decoded.
        MissingExtraError: PyAV is not installed.
    """
    av = require("av", extra="video", purpose=purpose)
    try:
        # As "file:", a name with a colon is no protocol. Tags are not read, whatever they are written in.
        address = f"file:{os.path.abspath(path)}"
        with av.open(address, options=_OPTIONS, metadata_errors="replace") as container:
            yield container
    except MopeError:
        raise
    except Exception as error:  # PyAV has an exception for each of ffmpeg's codes
        expected = "a complete file of MP4, MOV, Matroska, WebM, AVI, MPEG, Ogg, FLV, ASF, AAC or the like; no playlist"
        raise MediaError(f"{name} cannot be decoded", received=one_line(error), expected=expected) from error
