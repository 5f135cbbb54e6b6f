"""Videos that visitors bring: limited in size, and read frame by frame."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from diffusers.video_processor import VideoProcessor
from PIL import Image

from ..video_files import iterate_video

MAX_UPLOAD_MB = 20
MAX_UPLOAD_FRAMES = 600
MAX_UPLOAD_PIXELS = 1920 * 1088
# How a frame is made to fit, by what diffusers' VideoProcessor calls it.
FITS = {"crop to fill": "crop", "pad": "fill", "stretch": "default"}


def read_upload(path: str | Path, height: int, width: int, fit: str) -> np.ndarray:
    """Frames `[T, height, width, 3]` uint8 of a video or animated image.

    Args:
        path: of the file.
        height, width: in pixels.
        fit: one of `FITS`.

    Raises:
        ValueError: for a file that is too large, too long or not a video; the message is for the visitor.
    """
    if fit not in FITS:
        raise ValueError(f"fit={fit!r} must be one of {list(FITS)}")
    megabytes = Path(path).stat().st_size / 2**20
    if megabytes > MAX_UPLOAD_MB:
        raise ValueError(f"The file has {megabytes:.1f} MB: at most {MAX_UPLOAD_MB} MB.")
    processor = VideoProcessor(vae_scale_factor=1)
    frames: list[np.ndarray] = []
    for frame in _readable(path):
        if frame.shape[0] * frame.shape[1] > MAX_UPLOAD_PIXELS:
            raise ValueError(f"Frames have {frame.shape[1]} x {frame.shape[0]} pixels: at most 1920 x 1088.")
        if len(frames) == MAX_UPLOAD_FRAMES:
            raise ValueError(f"The video is too long: at most {MAX_UPLOAD_FRAMES} frames.")
        resized = processor.resize(Image.fromarray(frame), height, width, resize_mode=FITS[fit])
        frames.append(np.asarray(resized))
    return np.stack(frames)


def _readable(path: str | Path) -> Iterator[np.ndarray]:
    try:
        yield from iterate_video(path)
    except ValueError as error:
        raise ValueError(
            "The file cannot be read as a video: mp4, gif and other common kinds are."
        ) from error
