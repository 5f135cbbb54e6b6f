"""Video and image files: frames as a player shows them, from the start or from the end, and new files.

Nothing else in the package uses PyAV, which is imported when the first file is read or written.
"""

import itertools
import math
import os
import stat
import struct
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .whole_files import written_whole

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

# What is opened, by the names that Pillow and FFmpeg have for them. Others either hold no video (FFmpeg draws
# a text as a picture of a terminal) or lead to other files and addresses (ffconcat, HLS, DASH, SDP).
_IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
_VIDEO_FORMATS = (
    "3gp,asf,av1,avi,dv,flv,gxf,h261,h263,h264,hevc,ivf,m4v,matroska,mov,mp4,mpeg,mpegts,mpegvideo,mxf,"
    "nut,obu,ogg,rm,vc1,webm,wtv,yuv4mpegpipe"
)
_TAKES = "it takes mp4, mov, webm, mkv, avi and other videos, gif, webp, png, jpeg, tiff, avif and bmp"

# Frames that are larger would take gigabytes each. Videos of 8K and photos of today's phones are smaller.
MAX_SIDE = 16384
MAX_PIXELS = 80_000_000

_IMAGE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    Image.DecompressionBombError,
)


def read_video(path: str | Path) -> np.ndarray:
    """All frames of a video or image file, `[T, H, W, 3]` uint8; see [`iterate_video`]."""
    frames = list(iterate_video(path))
    video = np.empty((len(frames), *frames[0].shape), np.uint8)
    for index in range(len(frames) - 1, -1, -1):
        video[index] = frames.pop()  # freed at once, so that a long video is not held twice
    return video


def iterate_video(path: str | Path) -> Iterator[np.ndarray]:
    """Frames `[H, W, 3]` uint8 of a video or image file, decoded one by one, as a player shows them.

    Frames are upright (what a phone notes in the file, EXIF included, is applied) and have square pixels.
    Animated images and TIFF files of many pages are videos; other images have one frame.

    Raises:
        ValueError: when there is no such file, it is no video, or it is damaged or cut off: what can be read
            of it is never returned as the whole.
    """
    return VideoFile(path).frames()


class VideoFile:
    """A video or image file.

    Args:
        path: of the file.

    Raises:
        ValueError: when there is no such file, or it is no video.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"video={str(path)!r} is not a file")
        if self.path.stat().st_size == 0:
            raise self._error("cannot be read as a video: it is empty")
        image = self._open_image()
        self._is_image = image is not None
        if image is not None:
            with image:
                self._check_size(image.width, image.height)
                numbers = self._read(_frame_numbers, image)
                self.frame_rate, self.stated_frames = self._image_rate(image, numbers), len(numbers)
                self.height, self.width = image.height, image.width
        else:
            with self._open() as container:
                stream = self._stream(container)
                self.frame_rate = _rate(stream)
                self.stated_frames = _stated_frames(container, stream)
                self.height, self.width = stream.codec_context.height, stream.codec_context.width

    # `frame_rate`: frames per second, on average; None for a single image or where the file does not say.
    frame_rate: Fraction | None
    # `stated_frames`: how many there are as the header says, or as its duration comes to; None if neither is
    # there. `height` and `width`: of the header, before frames are turned upright.
    stated_frames: int | None
    height: int
    width: int

    def frames(self) -> Iterator[np.ndarray]:
        """All frames, as [`iterate_video`] gives them."""
        return self._same_size(self._image_frames() if self._is_image else self._all_frames())

    def timed_frames(
        self, start: float = 0.0, end: float = math.inf
    ) -> Iterator[tuple[float, Callable[[], np.ndarray]]]:
        """Frames with the time at which each is shown, in seconds from the beginning of the video.

        A frame is a function that draws it, as [`iterate_video`] gives it: one that is left out costs no more
        than its decoding. Times are those of the file, so that those of a variable rate are not even.

        Args:
            start, end: seconds; frames shown before `start`, or at `end` or later, are left out. With a
                `start`, reading begins at a key frame before it, and the file is not checked to be whole.
        """
        rate = self.frame_rate or Fraction(1)
        if self._is_image:
            for number, image in enumerate(self._image_frames()):
                if start <= number / rate < end:
                    yield float(number / rate), partial(np.asarray, image)
            return
        for number, (frame, draw) in enumerate(self._shown_frames(start)):
            if frame.pts is None and start > 0:
                raise self._error("does not say when each frame is shown: it cannot be read from a time on")
            shown = number / rate if frame.pts is None else (frame.pts - draw.start) * draw.time_base
            if shown >= end:
                return
            if shown >= start:
                yield float(shown), partial(draw, frame)

    def last_frames(self, num_frames: int) -> Iterator[np.ndarray]:
        """The last `num_frames` frames, or all if there are fewer, in order.

        A video is read from the key frame before them, so that this takes about the same time and memory
        whatever its length.
        """
        if self._is_image:
            return self._same_size(self._image_frames(num_frames))
        return self._same_size(self._last_frames(num_frames))

    def _same_size(self, frames: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        shape = None
        for number, frame in enumerate(frames):
            shape = shape or frame.shape
            if frame.shape != shape:
                raise self._error(
                    f"has frames of sizes {shape[1]} x {shape[0]} and, after {number} of them, "
                    f"{frame.shape[1]} x {frame.shape[0]}; they must be equal"
                )
            yield frame
        if shape is None:
            raise self._error("has no frames")

    def _check_size(self, width: int, height: int) -> None:
        try:
            check_frame_size(height, width)
        except ValueError as error:
            raise self._error(str(error).removeprefix("video ")) from error

    def _error(self, problem: str) -> ValueError:
        return ValueError(f"video={str(self.path)!r} {problem}")

    # --------------------------------------------------------------------------------------------------------
    # Images

    def _open_image(self) -> Image.Image | None:
        try:
            return Image.open(self.path, formats=_IMAGE_FORMATS)
        except UnidentifiedImageError:
            return None
        except _IMAGE_ERRORS as error:
            raise self._error(f"cannot be read as an image: {error}") from error

    def _image_rate(self, image: Image.Image, numbers: Sequence[int]) -> Fraction | None:
        durations = []
        try:
            for number in numbers[:1000]:
                image.seek(number)
                image.load()  # only then does Pillow know the duration in some formats
                durations.append(image.info.get("duration", 0))
        except _IMAGE_ERRORS:
            return None  # said when its frames are read
        total = sum(durations)  # milliseconds
        if len(numbers) == 1 or total <= 0:
            return None
        return Fraction(1000 * len(durations), round(total)).limit_denominator(1001)

    def _image_frames(self, num_last: int | None = None) -> Iterator[np.ndarray]:
        image = self._open_image()
        assert image is not None
        with image:
            for number in self._read(_frame_numbers, image)[-(num_last or 0) :]:
                self._read(image.seek, number)
                yield self._read(rgb_pixels, image)
        if image.format == "GIF" and not self._has_trailer():
            warnings.warn(f"{self.path} is cut off: the mark at the end of a gif is missing", stacklevel=2)

    def _read(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except _IMAGE_ERRORS as error:
            raise self._error(f"cannot be read as an image: {error}") from error

    def _has_trailer(self) -> bool:
        with open(self.path, "rb") as file:
            file.seek(max(0, self.path.stat().st_size - 1024))
            return b";" in file.read().rstrip(b"\0")[-1:]

    # --------------------------------------------------------------------------------------------------------
    # Videos

    def _open(self) -> "InputContainer":
        import av

        # `file:` keeps a name such as `a:b.mp4` from being taken for an address.
        options = {"format_whitelist": _VIDEO_FORMATS, "protocol_whitelist": "file"}
        try:
            return av.open(f"file:{self.path.absolute()}", options=options)
        except (av.FFmpegError, UnicodeError) as error:
            problem = "cannot be read as a video: it is none, or it is damaged or cut off"
            raise self._error(f"{problem}; {_TAKES}") from error

    def _stream(self, container: "InputContainer") -> "VideoStream":
        """The video itself: not the cover picture of a song."""
        from av.stream import Disposition

        streams = [
            stream
            for stream in container.streams.video
            if not stream.disposition & Disposition.attached_pic and stream.codec_context is not None
        ]
        if not streams:
            raise self._error(f"cannot be read as a video: it has no pictures; {_TAKES}")
        stream = max(streams, key=lambda stream: bool(stream.disposition & Disposition.default))
        context = stream.codec_context
        self._check_size(context.width, context.height)
        return stream

    def _all_frames(self) -> Iterator[np.ndarray]:
        """All frames of the file; anything missing or damaged is an error."""
        return (draw(frame) for frame, draw in self._shown_frames())

    def _shown_frames(self, start: float = 0.0) -> Iterator[tuple["VideoFrame", "_Drawing"]]:
        """All frames, as they are decoded; from a key frame before `start` seconds on, if it is not 0."""
        num_packets, num_frames, end = 0, 0, Fraction(0)
        with self._open() as container:
            stream = self._stream(container)
            draw = _Drawing(stream)
            if start > 0:
                self._seek(container, stream, draw.start + int(Fraction(start) / draw.time_base))
            for packet in self._packets(container, list(container.streams)):
                if packet.pts is not None and packet.time_base is not None:
                    end = max(end, (packet.pts + (packet.duration or 0)) * packet.time_base)
                if packet.stream is not stream:
                    continue
                num_packets += packet.dts is not None or packet.size > 0
                for frame in self._decoded(packet, num_frames):
                    num_frames += 1
                    yield frame, draw
            if start > 0:
                return
            self._check_last_packet(container)
            if num_packets < stream.frames:
                raise self._error(f"is cut off: {num_packets} of its {stream.frames} frames are there")
            duration = _stated_duration(container)
            if duration is not None and end < duration - Fraction(1, 10) - 2 / (_rate(stream) or 10):
                raise self._error(
                    f"is cut off: {float(end):.1f} of its {float(duration):.1f} seconds are there"
                )
            # Other codecs have packets that no frame is shown for.
            if num_frames < stream.frames and stream.codec_context.name in ("h264", "hevc"):
                warnings.warn(
                    f"{self.path}: {num_frames} of its {stream.frames} frames can be shown", stacklevel=2
                )

    def _check_last_packet(self, container: "InputContainer") -> None:
        """A transport stream (MPEG-TS) does not state its length, but consists of packets of equal size."""
        if container.format.name != "mpegts":
            return
        with open(self.path, "rb") as file:
            begin = file.read(5 * 208)
        for size in (188, 192, 204):  # as broadcast, of cameras, with error correction
            first = 4 if size == 192 else 0
            if all(begin[at] == 0x47 for at in range(first, min(len(begin), 5 * size), size)):
                if self.path.stat().st_size % size:
                    raise self._error("is cut off: its last packet is not whole")
                return

    def _packets(self, container: "InputContainer", streams: Any) -> Iterator["Packet[Any]"]:
        import av

        try:
            yield from container.demux(streams)
        except av.FFmpegError as error:
            raise self._error(f"cannot be read as a video: it is damaged or cut off ({error})") from error

    def _decoded(self, packet: "Packet[Any]", num_before: int) -> list["VideoFrame"]:
        import av

        damage = f"cannot be read as a video: it is damaged after {num_before} frames"
        try:
            frames: list[VideoFrame] = packet.decode()
        except (av.FFmpegError, IndexError) as error:
            raise self._error(f"{damage} ({error})") from error
        if any(frame.is_corrupt for frame in frames) or (packet.is_corrupt and num_before):
            raise self._error(damage)
        return frames

    def _last_frames(self, num_frames: int) -> Iterator[np.ndarray]:
        first = self._time_of_last(num_frames)
        if first is None:  # the file does not say when each frame is shown: count them
            total = sum(1 for _ in self._all_frames())
            yield from itertools.islice(self._all_frames(), max(0, total - num_frames), None)
            return
        for seek in (True, False):
            number = 0
            with self._open() as container:
                stream = self._stream(container)
                draw = _Drawing(stream)
                if seek:
                    self._seek(container, stream, first)
                for packet in self._packets(container, stream):
                    for frame in self._decoded(packet, number):
                        if (
                            frame.pts is not None
                            and frame.pts >= first
                            and (number or not seek or frame.pts == first)
                        ):
                            number += 1
                            yield draw(frame)
            if number:
                return

    @staticmethod
    def _seek(container: "InputContainer", stream: "VideoStream", time: int) -> None:
        """Go to a key frame well before a time, as some formats know only when frames are decoded."""
        time -= int(1 / (stream.time_base or 1))
        if time > (stream.start_time or 0):
            container.seek(time, stream=stream)

    def _time_of_last(self, num_frames: int) -> int | None:
        """When the first of the last frames is shown, in the stream's time base; None if nothing says so."""
        seconds = Fraction(2)
        while True:
            with self._open() as container:
                stream = self._stream(container)
                rate, base, start = _rate(stream), stream.time_base, stream.start_time or 0
                if not rate or base is None:
                    return None
                end, is_stated = start, True
                if stream.duration is not None:
                    end = start + stream.duration
                elif container.duration is not None:
                    end = start + int(Fraction(container.duration, 1_000_000) / base)
                    is_stated = _stated_duration(container) is not None
                target = end - int((seconds + 2 * num_frames / rate) / base)
                if target > start:
                    container.seek(target, stream=stream)
                packets = [
                    (packet.pts, packet.is_discard)
                    for packet in self._packets(container, stream)
                    if packet.size
                ]
                self._check_last_packet(container)
            times = sorted(time for time, _ in packets if time is not None)
            if len(times) < len(packets):
                return None
            if is_stated and (not times or times[-1] < end - int((Fraction(2, 10) + 3 / rate) / base)):
                raise self._error("is cut off: its end is missing")
            shown = sorted(time for time, is_discarded in packets if time is not None and not is_discarded)
            if len(shown) >= num_frames or target <= start:
                return shown[-num_frames:][0] if shown else None
            seconds *= 4


def _rate(stream: "VideoStream") -> Fraction | None:
    return stream.average_rate or stream.guessed_rate


def _stated_frames(container: "InputContainer", stream: "VideoStream") -> int | None:
    if stream.frames:
        return stream.frames
    rate, seconds = _rate(stream), None
    if stream.duration is not None and stream.time_base is not None:
        seconds = stream.duration * stream.time_base
    elif container.duration is not None:
        seconds = Fraction(container.duration, 1_000_000)
    return None if rate is None or seconds is None else round(seconds * rate)


def _stated_duration(container: "InputContainer") -> Fraction | None:
    """Seconds that the header states, of the formats where it is exact; FFmpeg estimates it for others."""
    exact = container.format.name.startswith(("matroska", "flv")) and container.duration is not None
    return Fraction(container.duration, 1_000_000) if exact and container.duration is not None else None


class _Drawing:
    """Turns decoded frames into `[H, W, 3]` uint8, upright and of square pixels."""

    def __init__(self, stream: "VideoStream") -> None:
        from av.video.reformatter import VideoReformatter

        self.reformatter = VideoReformatter()  # one for all frames: setting it up costs more than a frame
        self.matrix: tuple[int, int, int, int] | None = None
        self.time_base, self.start = stream.time_base or Fraction(1), stream.start_time or 0
        self.aspect = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or Fraction(1)

    def __call__(self, frame: "VideoFrame") -> np.ndarray:
        height, width = frame.height, frame.width
        if self.aspect > 1:  # never fewer pixels than there are
            width = round(width * self.aspect)
        elif self.aspect > 0:
            height = round(height / self.aspect)
        check_frame_size(height, width)
        pixels = self.reformatter.reformat(
            frame, width, height, "rgb24", interpolation="BICUBIC" if self.aspect != 1 else None
        ).to_ndarray()
        # Of the first frame, as it is the file's. A frame that is asked for its side data stays in memory, as
        # the two refer to each other, until Python collects its garbage.
        self.matrix = self.matrix or _display_matrix(frame)
        return _turned(pixels, self.matrix)


def _display_matrix(frame: "VideoFrame") -> tuple[int, int, int, int]:
    from av.sidedata.sidedata import Type

    side_data: Any = frame.side_data
    matrix = side_data.get(Type.DISPLAYMATRIX)
    if matrix is None:
        return 1, 0, 0, 1
    a, b, _, c, d = struct.unpack("=5i", bytes(matrix)[:20])
    return a, b, c, d


def _turned(pixels: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """The frame as the matrix places it: x' = a x + c y, y' = b x + d y, to the nearest quarter turn."""
    a, b, c, d = matrix
    if abs(b) > abs(a):
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    if a > 0 and d > 0:
        return np.ascontiguousarray(pixels)
    return np.ascontiguousarray(pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


def stated_size(path: str | Path, formats: Sequence[str]) -> tuple[int, int]:
    """Width and height that a video file states; no frame is decoded.

    Args:
        formats: kinds of files to open, as FFmpeg calls them.

    Raises:
        ValueError: for a file that is none of them.
    """
    import av

    try:
        with av.open(str(path), options={"format_whitelist": ",".join(formats)}) as container:
            context = container.streams.video[0].codec_context
            return context.width, context.height
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"video={str(path)!r} cannot be read as a video: {error}") from error


def check_frame_size(height: int, width: int) -> None:
    """Raise a ValueError for frames that would take gigabytes."""
    if max(height, width) > MAX_SIDE or height * width > MAX_PIXELS:
        raise ValueError(
            f"video has frames of {width} x {height} pixels; it takes up to {MAX_SIDE} a side and "
            f"{MAX_PIXELS // 10**6} million in all"
        )


def rgb_pixels(image: Image.Image) -> np.ndarray:
    """`[H, W, 3]` uint8 of an image of any mode, upright as EXIF says.

    Raises:
        ValueError: for float values outside [0, 1].
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits, which Pillow would cut off at 255
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"its pixels are {values.min()} to {values.max()}; it takes 0 to 65535")
        grey = ((values + 128) // 257).astype(np.uint8)
        return np.stack([grey] * 3, axis=-1)
    if image.mode == "F":
        values = np.asarray(image)
        if not (values.min() >= 0 and values.max() <= 1):
            raise ValueError(f"its pixels are {values.min():g} to {values.max():g}; floats are in [0, 1]")
        return np.stack([(values * 255).round().astype(np.uint8)] * 3, axis=-1)
    return np.array(image.convert("RGB"))


def image_frames(image: Image.Image) -> list[np.ndarray]:
    """All frames `[H, W, 3]` uint8 of an animated image that is open; its only one if it is none."""
    numbers = _frame_numbers(image)
    if len(numbers) == 1:
        return [rgb_pixels(image)]
    frames, position = [], image.tell()
    for number in numbers:
        image.seek(number)
        frames.append(rgb_pixels(image))
    image.seek(position)
    return frames


def _frame_numbers(image: Image.Image) -> list[int]:
    """The frames of an animation, or the pages of a TIFF file; else the only one."""
    if image.format == "MPO":  # a photo with previews or depth beside it
        return [0]
    first = 1 if image.info.get("default_image") else 0  # shown where animated PNG is not known
    return list(range(first, getattr(image, "n_frames", 1)))


# ------------------------------------------------------------------------------------------------------------
# Writing

_ENCODERS: dict[str, tuple[str, dict[str, str]]] = {
    # As good as the original to the eye. No frame waits for later ones: of large frames that took 100 MB.
    ".mp4": ("libx264", {"crf": "12", "preset": "fast", "tune": "zerolatency"}),
    ".webm": (
        "libvpx-vp9",
        {"crf": "15", "b": "0", "deadline": "good", "cpu-used": "4", "lag-in-frames": "0"},
    ),
    ".gif": ("gif", {}),
}


def check_output(path: str | Path) -> None:
    """Raise a ValueError unless a video can be written to `path`: a new name, or a file that it replaces.

    The extension says which kind: mp4, webm or gif.
    """
    import av

    path = Path(path)
    kind = path.suffix.lower()
    if kind not in _ENCODERS:
        raise ValueError(f"{path} must end with one of {', '.join(_ENCODERS)}: the kind of video to write")
    if _ENCODERS[kind][0] not in av.codecs_available:
        raise ValueError(f"{path}: this PyAV has no encoder {_ENCODERS[kind][0]}; take another extension")
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path} is not a file that could be replaced; it takes a new name or a file")
    folder = Path(os.path.realpath(path)).parent
    if not folder.is_dir():
        raise ValueError(f"the folder of {path} does not exist")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"the folder of {path} cannot be written to")


class VideoWriter:
    """Writes a video frame by frame, complete or not at all.

    Use it as a context: the file is written beside its place, and put there at the end. After an exception,
    or without a frame, nothing is there, and a file of that name is as it was.

    Args:
        path: new name, or file to replace; the extension is the kind: mp4 (H.264), webm (VP9) or gif.
        frame_rate: frames per second.

    Raises:
        ValueError: when such a file cannot be written there.
    """

    def __init__(self, path: str | Path, frame_rate: Fraction | float) -> None:
        check_output(path)
        if not 0 < frame_rate <= 1000:
            raise ValueError(f"frame_rate={frame_rate} must be more than 0 and at most 1000")
        self.path = Path(os.path.realpath(path))
        self.frame_rate = Fraction(frame_rate).limit_denominator(1001)
        self.num_frames = 0

    def __enter__(self) -> Self:
        import av

        with ExitStack() as stack:
            partial = stack.enter_context(written_whole(self.path))
            stack.callback(lambda: None if self.num_frames else partial.unlink(missing_ok=True))
            container = av.open(f"file:{partial}", "w", format=self.path.suffix.lower()[1:])
            self._container = stack.enter_context(container)
            stack.push(self._finish)
            self._opened = stack.pop_all()
        return self

    def write(self, frame: np.ndarray) -> None:
        """Add a frame `[H, W, 3]`, uint8 or float in [0, 1], of the size of the first one."""
        if frame.dtype != np.uint8:
            frame = (frame * 255).round().clip(0, 255).astype(np.uint8)
        if self.num_frames == 0:
            self._begin(*frame.shape[:2])
        picture = self._picture(frame)
        picture.pts = self.num_frames
        self._container.mux(self._stream.encode(picture))
        self.num_frames += 1

    def _begin(self, height: int, width: int) -> None:
        codec, options = _ENCODERS[self.path.suffix.lower()]
        stream: Any = self._container.add_stream(codec, rate=self.frame_rate, options=options)
        self._stream: VideoStream = stream
        self._stream.height, self._stream.width = height, width
        if codec == "gif":
            self._stream.pix_fmt = "pal8"
        else:  # colours of half the size need even sides
            self._stream.pix_fmt = "yuv420p" if height % 2 == width % 2 == 0 else "yuv444p"

    def _picture(self, frame: np.ndarray) -> "VideoFrame":
        from av import VideoFrame

        if self.path.suffix.lower() != ".gif":
            return VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        image = Image.fromarray(frame).quantize(256, Image.Quantize.MAXCOVERAGE)
        colours = np.array(image.getpalette(), np.uint8).reshape(-1, 3)
        palette = np.full((256, 4), 255, np.uint8)
        palette[: len(colours), 1:] = colours
        indices_and_palette: Any = (np.asarray(image), palette)
        return VideoFrame.from_ndarray(indices_and_palette, format="pal8")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.__exit__(kind, error, trace)

    def _finish(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self.num_frames:
            self._container.mux(self._stream.encode())


def save_video(frames: Iterable[np.ndarray], path: str | Path, frame_rate: Fraction | float) -> None:
    """Write frames `[H, W, 3]`, uint8 or float in [0, 1], as a video; see [`VideoWriter`]."""
    with VideoWriter(path, frame_rate) as video:
        for frame in frames:
            video.write(frame)
