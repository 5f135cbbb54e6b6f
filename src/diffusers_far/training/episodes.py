"""Episodes: videos to train on, wherever their frames are, and what is known of them.

Nothing is read of an episode before it is asked for, and its frames come one by one. training/sources.py
makes the episodes of a folder.

Shapes: T frames, N frames of all videos, H x W pixels.
"""

import hashlib
import logging
import math
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image, ImageOps

from ..inputs import fit_frame
from ..video_files import VideoFile, rgb_pixels
from ..whole_files import written_whole
from .options import FrameOptions

Picture = Callable[[], np.ndarray]  # draws a frame, `[H, W, 3]` uint8
TimedFrames = Iterator[tuple[float | None, Picture]]  # with seconds from the beginning, where they are known

logger = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------------------------
# Videos, wherever their frames are


@dataclass(frozen=True)
class Stated:
    """What a header says; None where it does not. The size may be that of frames that lie on their side."""

    num_frames: int | None
    frame_rate: float | None
    height: int
    width: int


class Video(Protocol):
    """Frames of one episode."""

    @property
    def path(self) -> Path:
        """The file or folder that it is in."""

    def timed_frames(self) -> TimedFrames:
        """All frames, one by one; a ValueError if some are missing or damaged."""

    def stated(self) -> Stated: ...

    def digest(self) -> Any:
        """A sha256, to go on with, of all that the frames depend on."""


@dataclass(frozen=True)
class RecordedVideo:
    """A video file, or what it shows from `start` to `end` seconds."""

    path: Path
    start: float = 0.0
    end: float = math.inf

    def timed_frames(self) -> TimedFrames:
        return VideoFile(self.path).timed_frames(self.start, self.end)

    def stated(self) -> Stated:
        file = VideoFile(self.path)
        rate, num_frames = file.frame_rate, file.stated_frames
        if self.end < math.inf and rate is not None:
            num_frames = round((self.end - self.start) * rate)
        return Stated(num_frames, None if rate is None else float(rate), file.height, file.width)

    def digest(self) -> Any:
        if (self.start, self.end) == (0.0, math.inf):
            return _hash_file(self.path)
        digest = _hash_shared_file(self.path, self.path.stat().st_mtime_ns).copy()
        digest.update(repr((self.start, self.end)).encode())
        return digest


def _hash_file(path: Path) -> Any:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256")


@lru_cache(maxsize=4)
def _hash_shared_file(path: Path, _: int) -> Any:
    """Of a file with many episodes, read once as long as its time of change is the same."""
    return _hash_file(path)


@dataclass(frozen=True)
class EmbeddedVideo:
    """The bytes of a video file that lies inside of another one."""

    path: Path
    data: bytes = field(repr=False)
    suffix: str

    @contextmanager
    def _file(self) -> Iterator[VideoFile]:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"video{self.suffix}"
            file.write_bytes(self.data)
            yield VideoFile(file)

    def timed_frames(self) -> TimedFrames:
        with self._file() as file:
            yield from file.timed_frames()

    def stated(self) -> Stated:
        with self._file() as file:
            return RecordedVideo(file.path).stated()

    def digest(self) -> Any:
        return hashlib.sha256(self.data)


@dataclass(frozen=True)
class ArrayVideo:
    """`video` uint8 `[T, H, W, 3]` of an `.npz`, read frame by frame."""

    path: Path

    @contextmanager
    def _open(self) -> Iterator[tuple[Any, tuple[int, ...]]]:
        with zipfile.ZipFile(self.path) as archive, archive.open("video.npy") as file:
            version = np.lib.format.read_magic(file)
            read_header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }
            if version not in read_header:
                raise ValueError(f"{self.path}: video is a .npy of version {version}; it takes 1.0 and 2.0")
            shape, in_columns, dtype = read_header[version](file)
            if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or in_columns or not all(shape):
                found = f"{dtype} {list(shape)}" + (" in Fortran order" if in_columns else "")
                raise ValueError(f"{self.path}: video is {found}; it takes uint8 [T, H, W, 3]")
            yield file, shape

    def timed_frames(self) -> TimedFrames:
        try:
            with self._open() as (file, (num_frames, *shape)):
                for number in range(num_frames):
                    data = file.read(math.prod(shape))
                    if len(data) < math.prod(shape):
                        raise ValueError(f"{self.path} is cut off after {number} of {num_frames} frames")
                    yield None, partial(_as_frame, data, tuple(shape))
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
            raise ValueError(f"{self.path} is damaged: {error}") from error

    def stated(self) -> Stated:
        with self._open() as (_, shape):
            return Stated(shape[0], None, shape[1], shape[2])

    def digest(self) -> Any:
        return _hash_file(self.path)


def _as_frame(data: bytes, shape: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer(data, np.uint8).reshape(shape)


@dataclass(frozen=True)
class ImageSequence:
    """A folder of numbered images."""

    path: Path
    images: tuple[Path, ...]

    def timed_frames(self) -> TimedFrames:
        for image in self.images:
            yield None, partial(_read_image, image)

    def stated(self) -> Stated:
        height, width, _ = _read_image(self.images[0]).shape
        return Stated(len(self.images), None, height, width)

    def digest(self) -> Any:
        digest = hashlib.sha256()
        for image in self.images:
            digest.update(image.read_bytes())
        return digest


def _read_image(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return rgb_pixels(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


# ------------------------------------------------------------------------------------------------------------
# Episodes


class Actions(NamedTuple):
    """What led to the frames of a video."""

    values: tuple[Any, ...]  # one per frame: an int, ints of several groups, or the floats of a vector
    names: tuple[str, ...] = ()  # of the groups, or of the numbers of a vector, where they are known


def no_actions() -> None:
    """What `read_actions` is where nothing is known."""


@dataclass(frozen=True)
class Episode:
    """A video and what is known of it."""

    name: str  # its path in the source, without the ending; no other one of the split has it
    video: Video
    class_label: int | None = None
    revisits: tuple[int, ...] | None = None  # one per frame: how many frames ago its view was last seen
    read_actions: Callable[[], Actions | None] = field(default=no_actions, repr=False)

    @property
    def actions(self) -> tuple[Any, ...] | None:
        """One for each frame of the video: `actions[t]` led to frame t."""
        actions = self.read_actions()
        return None if actions is None else actions.values

    @property
    def action_names(self) -> tuple[str, ...]:
        """Names of groups of actions, or of the numbers of vectors; empty where nothing says so."""
        actions = self.read_actions()
        return () if actions is None else actions.names

    @property
    def frame_rate(self) -> float | None:
        """Frames per second, on average; None where nothing says so."""
        return self.video.stated().frame_rate

    def frames(self, options: FrameOptions | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """Frames `[H, W, 3]` uint8, each with its number in the video, one by one.

        With `fps`, the frame that is shown at each time; a number is left out, or there twice. Then every
        `stride`-th of them. The last one may be followed by others that are left out, which are counted, too.

        Raises:
            ValueError: for a video that is damaged, has no times for `fps`, or frames of several sizes
                without a `resolution`; when there are not as many actions or revisits as frames.
        """
        options = options or FrameOptions()
        size, shape, num_frames = options.frame_size, None, 0

        def counted() -> TimedFrames:
            nonlocal num_frames
            for num_frames, timed in enumerate(self.video.timed_frames(), start=1):  # noqa: B007
                yield timed

        chosen = enumerate(counted())
        picked: Iterator[tuple[int, Picture]]
        if options.fps is None:
            picked = ((number, draw) for number, (_, draw) in chosen)
        else:
            picked = self._at_rate(chosen, options.fps)
        drawn: tuple[int, np.ndarray] | None = None
        for number, draw in islice(picked, 0, None, options.stride):
            if drawn is None or drawn[0] != number:
                frame = draw()
                if size is not None:
                    frame = fit(frame, *size, options.fit)
                drawn = number, frame
            shape = shape or drawn[1].shape
            if drawn[1].shape != shape:
                raise ValueError(
                    f"{self.where} has frames of {shape[0]} x {shape[1]} and of {drawn[1].shape[0]} x "
                    f"{drawn[1].shape[1]} pixels; give a resolution"
                )
            yield drawn
        for name, values in (("actions", self.actions), ("revisits", self.revisits)):
            if values is not None and len(values) != num_frames:
                raise ValueError(f"{self.where}: {num_frames} frames, but {len(values)} {name}")

    def _at_rate(self, frames: Iterable[tuple[int, Any]], fps: float) -> Iterator[tuple[int, Picture]]:
        """The frame that is shown at 0, 1 / fps, 2 / fps ... seconds after the first one."""
        tolerance = 2e-3  # seconds: containers round times to milliseconds
        shown: tuple[int, Picture] | None = None
        begin, num_taken = 0.0, 0
        for number, (time, draw) in frames:
            if time is None:
                raise ValueError(
                    f"fps={fps:g}: {self.where} does not say when its frames are shown; give a stride instead"
                )
            if shown is None:
                begin = time
            while shown is not None and num_taken / fps + tolerance < time - begin:
                yield shown
                num_taken += 1
            shown, last = (number, draw), time
        if shown is not None and num_taken / fps <= last - begin + tolerance:
            yield shown

    @property
    def where(self) -> str:
        """For messages: its file, and its name where the file has others."""
        path = self.video.path
        return str(path) if path.stem == PurePosixPath(self.name).name else f"{path}: {self.name}"


def fit(frame: np.ndarray, height: int, width: int, how: str) -> np.ndarray:
    """A frame `[H, W, 3]` uint8 at `height` x `width`: its middle ("crop"), all of it with black borders
    ("pad"), or out of proportion ("stretch").
    """
    if frame.shape[:2] == (height, width):
        return frame
    if how == "crop":
        return fit_frame(frame, height, width)
    image, resampling = Image.fromarray(frame), Image.Resampling.LANCZOS
    if how == "pad":
        return np.asarray(ImageOps.pad(image, (width, height), resampling))
    return np.asarray(image.resize((width, height), resampling))


class Shard(Protocol):
    """A file with many episodes, which are read in a row."""

    kind: str  # in words
    path: Path
    names: list[str]
    class_names: tuple[str, ...]

    def __iter__(self) -> Iterator[Episode]: ...


@dataclass(frozen=True)
class Episodes:
    """Episodes of a split, to be gone through as often as wanted; those of shards are read as they come."""

    listed: tuple[Episode, ...] = ()
    shards: tuple[Shard, ...] = ()
    names: tuple[str, ...] = ()

    @classmethod
    def of(cls, listed: Iterable[Episode], shards: Sequence[Shard]) -> "Episodes":
        listed = tuple(sorted(listed, key=lambda episode: episode.name))
        names = [episode.name for episode in listed] + [name for shard in shards for name in shard.names]
        return cls(listed, tuple(shards), tuple(names))

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[Episode]:
        kept = set(self.names)
        yield from (episode for episode in self.listed if episode.name in kept)
        for shard in self.shards:
            yield from (episode for episode in shard if episode.name in kept)

    def only(self, names: Iterable[str]) -> "Episodes":
        """Those of these names."""
        kept = set(names)
        listed = tuple(episode for episode in self.listed if episode.name in kept)
        shards = tuple(shard for shard in self.shards if not kept.isdisjoint(shard.names))
        return Episodes(listed, shards, tuple(name for name in self.names if name in kept))

    def some(self, number: int) -> Iterator[Episode]:
        """Up to `number` of them, spread over all that can be picked."""
        if self.shards:
            return islice(iter(self), number)
        return iter(self.listed[:: max(1, len(self.listed) // number)][:number])

    def fingerprint(self) -> str:
        """A hash of the names, and of the paths, sizes and times of the files."""
        files: set[Path] = {shard.path for shard in self.shards}
        for episode in self.listed:
            video = episode.video
            files |= set(video.images) if isinstance(video, ImageSequence) else {video.path}
        state = [(str(file.resolve()), file.stat()) for file in sorted(files)]
        identity = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in state]
        return hashlib.sha256(repr((self.names, identity)).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------------------
# Frames of all episodes in one file


def load_frames(episodes: Episodes, cache_dir: str | Path, options: FrameOptions) -> np.ndarray:
    """Frames of all episodes in a row: uint8 `[N, H, W, 3]`, mapped from a file that is decoded only once.

    The file is named after the paths, sizes and times of the files, and the options: changed videos are
    decoded anew.
    """
    identity = hashlib.sha256(f"{episodes.fingerprint()} {options.identity}".encode()).hexdigest()
    cache = Path(cache_dir) / f"frames-{identity[:16]}.npy"
    if not cache.exists():
        logger.info("decoding %d videos into %s", len(episodes), cache)
        cache.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(cache) as partial_file:
            _decode_into(partial_file, episodes, options)
    return np.load(cache, mmap_mode="r")


def _decode_into(file: Path, episodes: Episodes, options: FrameOptions) -> None:
    """Write a `.npy` of all frames, one at a time."""
    size: tuple[int, ...] | None = None
    num_frames, first = 0, ""
    header = {"descr": "|u1", "fortran_order": False}
    with open(file, "wb") as output:
        for episode in episodes:
            for _, frame in episode.frames(options):
                if size is None:
                    size, first = frame.shape, episode.where
                    # The header is padded, so that the true count fits in place of this one.
                    np.lib.format.write_array_header_1_0(output, {**header, "shape": (2**40, *size)})
                    end_of_header = output.tell()
                if frame.shape != size:
                    raise ValueError(
                        f"{episode.where}: frames of {frame.shape}; {first} has {size}: all must be equal, "
                        "or give a resolution"
                    )
                output.write(frame.tobytes())
                num_frames += 1
        if size is None:
            raise ValueError("the videos have no frames")
        output.seek(0)
        np.lib.format.write_array_header_1_0(output, {**header, "shape": (num_frames, *size)})
        if output.tell() != end_of_header:
            raise RuntimeError(f"{file}: the header changed its length")
