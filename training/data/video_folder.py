"""Videos of a `datasets` videofolder, decoded by PyAV: one by one, or all frames at once through a cache.

A videofolder is `DATA/<split>/*.mp4` with one line per video in `DATA/<split>/metadata.jsonl`; `file_name` is
required. `actions` (one integer per frame: `actions[t]` led to frame t) and `revisits` (how many frames ago
the view of each frame was last seen; 0 for never) are read where they are present.
"""

import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Video, load_dataset

from diffusers_far import read_video

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Episode:
    """One video file and, if the metadata has them, its actions and revisits, one of each per frame."""

    video: Path
    actions: tuple[int, ...] | None
    revisits: tuple[int, ...] | None


def list_episodes(data: str | Path, split: str) -> list[Episode]:
    """The episodes of a split, in the order of their file names."""
    if not (Path(data) / split).is_dir():
        raise ValueError(f"data: got {str(data)!r}, which has no folder {split!r}; it takes a videofolder")
    # Streaming: the table is small, and nothing is left in the cache of `datasets`.
    table = load_dataset("videofolder", data_dir=str(Path(data).resolve()), split=split, streaming=True)
    table = table.cast_column("video", Video(decode=False))  # decoding in `datasets` needs torchcodec
    episodes = []
    for row in table:
        per_frame = (row.get(name) for name in ("actions", "revisits"))
        values = (None if value is None else tuple(value) for value in per_frame)
        episodes.append(Episode(Path(row["video"]["path"]), *values))
    return sorted(episodes, key=lambda episode: episode.video)


def load_frames(videos: Sequence[Path], cache_dir: str | Path) -> np.ndarray:
    """Frames of all videos in a row: uint8 [N, H, W, 3], mapped from a file that is decoded only once.

    The file is named after the paths, sizes and times of the videos: changed videos are decoded anew.
    """
    if not videos:
        raise ValueError("videos: got none; it takes at least one file")
    identity = [(str(video.resolve()), video.stat().st_size, video.stat().st_mtime_ns) for video in videos]
    cache = Path(cache_dir) / f"frames-{hashlib.sha256(repr(identity).encode()).hexdigest()[:16]}.npy"
    if not cache.exists():
        logger.info("decoding %d videos into %s", len(videos), cache)
        cache.parent.mkdir(parents=True, exist_ok=True)
        partial = cache.with_suffix(f".{os.getpid()}.partial")
        try:
            _decode_into(partial, videos)
            partial.replace(cache)
        finally:
            partial.unlink(missing_ok=True)
    return np.load(cache, mmap_mode="r")


def _decode_into(file: Path, videos: Sequence[Path]) -> None:
    """Write a `.npy` of all frames, holding one video in memory at a time."""
    size = read_video(videos[0]).shape[1:]
    num_frames = 0
    with open(file, "wb") as output:
        header = {"descr": "|u1", "fortran_order": False}
        # The header is padded, so that the true count fits in place of this one.
        np.lib.format.write_array_header_1_0(output, {**header, "shape": (2**40, *size)})
        end_of_header = output.tell()
        for video in videos:
            frames = read_video(video)
            if frames.shape[1:] != size:
                raise ValueError(
                    f"{video}: frames of {frames.shape[1:]}; {videos[0]} has {size}: all must be equal"
                )
            output.write(frames.tobytes())
            num_frames += len(frames)
        output.seek(0)
        np.lib.format.write_array_header_1_0(output, {**header, "shape": (num_frames, *size)})
        if output.tell() != end_of_header:
            raise RuntimeError(f"{file}: the header changed its length")
