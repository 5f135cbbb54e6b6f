"""Real video files for tests, small, and with frames that can be told apart after they were encoded."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

MILLISECOND = Fraction(1, 1000)


def numbered_frames(num_frames: int, height: int = 32, width: int = 48) -> np.ndarray:
    """uint8 `[T, H, W, 3]`: frame t is of one grey, 8 * t."""
    greys = (8 * np.arange(num_frames)).astype(np.uint8)
    return np.broadcast_to(greys[:, None, None, None], (num_frames, height, width, 3)).copy()


def numbers(frames: Sequence[np.ndarray]) -> list[int]:
    """Which of `numbered_frames` these are, from the middle of each."""
    return [round(float(frame[len(frame) // 2, frame.shape[1] // 2].mean()) / 8) for frame in frames]


def write_video(file: Path, frames: np.ndarray, rate: int = 10, times: Sequence[int] | None = None) -> None:
    """Write frames `[T, H, W, 3]`.

    Args:
        times: milliseconds at which each is shown, where the rate is not constant.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(file), "w") as container:
        stream = container.add_stream("mpeg4" if file.suffix == ".avi" else "libx264", rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        if times is not None:
            stream.time_base = stream.codec_context.time_base = MILLISECOND
        for number, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts = number if times is None else times[number]
            picture.time_base = Fraction(1, rate) if times is None else MILLISECOND
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
