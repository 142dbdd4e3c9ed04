"""Video files. Imports only what a device has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def write_video(path: Path, frames: NDArray[np.uint8], *, codec: str = "ffv1", rate: int = 10) -> Path:
    """A file of frames (F, H, W, 3); ``ffv1`` in Matroska gives back the very same ones."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "bgr0" if codec == "ffv1" else "yuv420p"
        for frame in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path
