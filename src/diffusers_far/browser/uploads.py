"""Files that visitors bring: opened only where their kind is known and their size is bounded."""

import base64
import binascii
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from ..inputs import fit_frame
from ..video_files import iterate_video, rgb_pixels, stated_size
from .players import VisitorError

MAX_UPLOAD_MB = 20
MAX_UPLOAD_FRAMES = 600
MAX_UPLOAD_PIXELS = 1920 * 1088
MAX_IMAGE_BYTES = 4 * 2**20
MAX_IMAGE_PIXELS = 15_000_000
MAX_SIDE = 8192
MAX_ASPECT_RATIO = 8  # a long thin picture grows very large when its short side is made to fit
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
# As FFmpeg calls them. Its other kinds include lists of further files to open.
VIDEO_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2",
    "matroska,webm",
    "avi",
    "gif",
    "mpeg",
    "mpegts",
    "webp_pipe",
    "ogg",
)
# What visitors choose from, by what `fit_frame` calls it.
FITS: dict[str, Literal["crop", "pad", "stretch"]] = {
    "crop to fill": "crop",
    "pad": "pad",
    "stretch": "stretch",
}

NO_IMAGE = "The file cannot be read as an image: JPEG, PNG, WebP, GIF and BMP are."
NO_VIDEO = "The file cannot be read as a video: mp4, gif and other common kinds are."


def read_image(url: object, height: int, width: int) -> np.ndarray:
    """The image of a data URL, upright and cropped to fit, `[height, width, 3]` uint8.

    Args:
        url: as the page sends it.
        height, width: in pixels.

    Raises:
        VisitorError: for what is too large, or no image.
    """
    encoded = url.partition("base64,")[2] if isinstance(url, str) else ""
    if len(encoded) > 4 * MAX_IMAGE_BYTES / 3 + 4:
        raise VisitorError(f"The image is too large: at most {MAX_IMAGE_BYTES // 2**20} MB.")
    try:
        file = io.BytesIO(base64.b64decode(encoded, validate=True))
    except binascii.Error as error:
        raise VisitorError(NO_IMAGE) from error
    return fit_frame(np.asarray(open_image(file)), height, width)


def open_image(file: io.BytesIO | Path) -> Image.Image:
    """A picture in RGB, upright; its size is looked at before any pixel is decoded.

    Raises:
        VisitorError: for what is too large, or no image.
    """
    try:
        with Image.open(file, formats=IMAGE_FORMATS) as image:
            check_sides(image.width, image.height, MAX_IMAGE_PIXELS)
            image.draft("RGB", (1024, 1024))  # a JPEG is decoded in a lower resolution, if it has so much
            return Image.fromarray(rgb_pixels(image))
    except VisitorError:
        raise
    except Image.DecompressionBombError as error:
        raise VisitorError(
            f"The picture has too many pixels: at most {MAX_IMAGE_PIXELS // 10**6} million."
        ) from error
    except Exception as error:  # Pillow raises a dozen types, each for another way in which a file is broken
        raise VisitorError(NO_IMAGE) from error


def read_upload(path: str | Path, height: int, width: int, fit: str) -> np.ndarray:
    """Frames `[T, height, width, 3]` uint8 of a video or animated image.

    Args:
        path: of the file.
        height, width: in pixels.
        fit: one of `FITS`.

    Raises:
        VisitorError: for a file that is too large, too long or not a video; the message is for the visitor.
    """
    if fit not in FITS:
        raise VisitorError(f"fit={fit!r} must be one of {list(FITS)}")
    megabytes = Path(path).stat().st_size / 2**20
    if megabytes > MAX_UPLOAD_MB:
        raise VisitorError(f"The file has {megabytes:.1f} MB: at most {MAX_UPLOAD_MB} MB.")
    check_sides(*video_size(path), MAX_UPLOAD_PIXELS)
    frames: list[np.ndarray] = []
    for frame in _readable(path):
        check_sides(frame.shape[1], frame.shape[0], MAX_UPLOAD_PIXELS)  # it may change on the way
        if len(frames) == MAX_UPLOAD_FRAMES:
            raise VisitorError(f"The video is too long: at most {MAX_UPLOAD_FRAMES} frames.")
        frames.append(fit_frame(frame, height, width, FITS[fit]))
    return np.stack(frames)


def video_size(path: str | Path) -> tuple[int, int]:
    """Width and height of a video or animated image, without decoding a frame.

    Raises:
        VisitorError: for a file that is none of the kinds that are taken.
    """
    try:
        with Image.open(path, formats=("WEBP", "GIF")) as image:
            return image.size
    except Exception:  # no picture, then, or a broken one
        pass
    try:
        return stated_size(path, VIDEO_FORMATS)
    except ValueError as error:
        raise VisitorError(NO_VIDEO) from error


def check_sides(width: int, height: int, max_pixels: int) -> None:
    """Raise a VisitorError for a picture that is too large, or too long and thin."""
    if width < 1 or height < 1:
        raise VisitorError(f"The picture has {width} x {height} pixels: it is empty.")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise VisitorError(
            f"The picture has {width} x {height} pixels: no side may be more than {MAX_ASPECT_RATIO} times "
            "the other."
        )
    if width * height > max_pixels or max(width, height) > MAX_SIDE:
        raise VisitorError(
            f"The picture has {width} x {height} pixels: at most {max_pixels / 10**6:.3g} million, and "
            f"{MAX_SIDE} on a side."
        )


def _readable(path: str | Path) -> Iterator[np.ndarray]:
    try:
        yield from iterate_video(path)
    except ValueError as error:
        raise VisitorError(NO_VIDEO) from error
