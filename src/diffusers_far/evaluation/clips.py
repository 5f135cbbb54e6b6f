"""The real videos that predictions are compared with: which clips, and their frames.

Videos come from any source of training (docs/data.md), or as latents that `training/encode_latents.py` wrote.
Of latents the truth is what the autoencoder makes of them.

Shapes: T frames of a clip, H x W pixels, C x h x w latents.
"""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..training.clips import LatentVideos, stack_actions
from ..training.episodes import Episode, Episodes
from ..training.options import FrameOptions
from ..training.sources import num_kept, open_source
from .protocols import EvaluateOptions

Known = tuple[str, int, int | None]  # of a video: name, number of frames, class label

logger = logging.getLogger("evaluate")


@dataclass(frozen=True)
class Clip:
    """Which frames of which video."""

    video: str  # its name in the split
    start: int  # first frame, of those that are used of the video
    class_label: int | None = None

    @property
    def key(self) -> str:
        """Name of its files."""
        return f"{self.video}-{self.start:05d}"


@dataclass(frozen=True)
class RealClip:
    """A clip as it was read."""

    clip: Clip
    frames: Tensor | None  # [T, 3, H, W] in [0, 1]; None of latents
    latents: Tensor | None  # [T, C, h, w], scaled; None of frames
    actions: Tensor | None  # [T, ...]: action t led to frame t


class RealVideos(Protocol):
    """Where clips come from."""

    clips: list[Clip]  # those of a video one after another
    num_short: int  # videos that are left out, as they are too short

    @property
    def are_latents(self) -> bool: ...

    @property
    def autoencoder(self) -> str | None:
        """Hash of the one that made the latents, where they have it."""

    @property
    def identity(self) -> str:
        """A hash that changes with the videos."""

    @property
    def actions(self) -> Iterator[tuple[str, Tensor]]:
        """Those of the videos of `clips`, and where they are, for a check."""

    def read(self, clips: Sequence[Clip], options: FrameOptions) -> Iterator[RealClip]:
        """Some of the clips, in order of their videos."""


def choose_clips(videos: Sequence[Known], options: EvaluateOptions) -> tuple[list[Clip], int]:
    """The clips of the protocol.

    Args:
        videos: name, number of frames and class label of each.

    Returns:
        The clips, and how many videos are too short for one.

    Raises:
        ValueError: when there are too few videos, or no long ones.
    """
    length, split = options.length, options.split
    long_enough = [video for video in videos if video[1] >= length]
    if not long_enough:
        longest = max((number for _, number, _ in videos), default=0)
        raise ValueError(
            f"num_frames={length}: the longest of {len(videos)} videos in {split} has {longest} frames"
        )
    left = long_enough[:: options.every]
    number = options.num_videos or len(left)
    if number > len(left):
        raise ValueError(
            f"num_videos={number}: {split} has {len(left)} videos of {length} frames or more"
            + (f", taken every {options.every}" if options.every > 1 else "")
        )
    if options.prescribed.balanced and all(label is not None for _, _, label in left):
        chosen = _balanced(left, number)
    else:
        chosen = [left[i * len(left) // number] for i in range(number)]
    clips = []
    for name, num_frames, label in chosen:
        starts = {0}
        if options.clips_per_video > 1:
            starts = set(np.linspace(0, num_frames - length, options.clips_per_video).astype(int).tolist())
        clips += [Clip(name, start, label) for start in sorted(starts)]
    return clips, len(videos) - len(long_enough)


def _balanced(videos: Sequence[Known], number: int) -> list[Known]:
    """So many videos, of each class as many as of the others where it has them, in order of a hash."""
    by_class: dict[int | None, list[Known]] = {}
    for video in sorted(videos, key=lambda video: hashlib.sha256(video[0].encode()).digest()):
        by_class.setdefault(video[2], []).append(video)
    turns = [(turn, video[2] or 0, video[0]) for own in by_class.values() for turn, video in enumerate(own)]
    chosen = {name for _, _, name in sorted(turns)[:number]}
    return [video for video in videos if video[0] in chosen]


class RecordedVideos:
    """Clips of videos as they are."""

    are_latents = False
    autoencoder = None

    def __init__(self, episodes: Episodes, options: EvaluateOptions) -> None:
        frames = options.frame_options()
        self.episodes, self.length = episodes, options.length
        known = []
        for episode in episodes:
            stated = episode.video.stated()
            if stated.num_frames is None:
                stated = replace(stated, num_frames=sum(1 for _ in episode.video.timed_frames()))
            known.append((episode.name, num_kept(stated, frames), episode.class_label))
        self.clips, self.num_short = choose_clips(known, options)

    @property
    def identity(self) -> str:
        return self.episodes.fingerprint()

    @property
    def actions(self) -> Iterator[tuple[str, Tensor]]:
        for episode in self.episodes.only({clip.video for clip in self.clips}):
            if (values := episode.actions) is not None:
                yield episode.where, stack_actions(values)

    def read(self, clips: Sequence[Clip], options: FrameOptions) -> Iterator[RealClip]:
        by_video: dict[str, list[Clip]] = {}
        for clip in clips:
            by_video.setdefault(clip.video, []).append(clip)
        for episode in self.episodes.only(by_video):
            yield from self._read_episode(episode, by_video[episode.name], options)

    def _read_episode(
        self, episode: Episode, clips: Sequence[Clip], options: FrameOptions
    ) -> Iterator[RealClip]:
        found = episode.actions
        actions = None if found is None else stack_actions(found)
        unfinished: dict[Clip, list[tuple[int, np.ndarray]]] = {clip: [] for clip in clips}
        index = -1
        for index, (number, frame) in enumerate(episode.frames(options)):
            for clip, taken in list(unfinished.items()):
                if index >= clip.start:
                    taken.append((number, frame))
                if len(taken) == self.length:
                    del unfinished[clip]
                    yield self._real_clip(episode, clip, taken, actions)
            if not unfinished:
                return
        raise ValueError(f"{episode.where} has {index + 1} frames only, less than its header says")

    def _real_clip(
        self, episode: Episode, clip: Clip, taken: list[tuple[int, np.ndarray]], actions: Tensor | None
    ) -> RealClip:
        numbers = [number for number, _ in taken]
        if actions is not None and len(actions) <= numbers[-1]:
            raise ValueError(f"{episode.where} has {len(actions)} actions, fewer than frames")
        frames = torch.from_numpy(np.stack([frame for _, frame in taken])).movedim(-1, 1).float() / 255
        return RealClip(clip, frames, None, None if actions is None else actions[numbers])


class EncodedVideos:
    """Clips of latents."""

    are_latents = True

    def __init__(self, folder: Path, options: EvaluateOptions) -> None:
        if identity := options.frame_options().identity:
            raise ValueError(f"data: {folder} has latents, whose frames stay as they are; got {identity}")
        self.videos, self.length = LatentVideos(folder), options.length
        self.names = [path.relative_to(folder).with_suffix("").as_posix() for path in self.videos.paths]
        if options.ignore_actions:
            self.videos.actions = [None] * len(self.videos)
        labels = [None if label is None else int(label) for label in self.videos.class_labels]
        known = list(zip(self.names, self.videos.num_frames, labels, strict=True))
        self.clips, self.num_short = choose_clips(known, options)

    @property
    def identity(self) -> str:
        return self.videos.fingerprint()

    @property
    def autoencoder(self) -> str | None:
        return self.videos.autoencoder

    @property
    def actions(self) -> Iterator[tuple[str, Tensor]]:
        for path, values in zip(self.videos.paths, self.videos.actions, strict=True):
            if values is not None:
                yield str(path), values

    def read(self, clips: Sequence[Clip], options: FrameOptions) -> Iterator[RealClip]:
        for clip in clips:
            video = self.names.index(clip.video)
            values, part = self.videos.actions[video], slice(clip.start, clip.start + self.length)
            latents = self.videos.clip(video, clip.start, self.length)
            yield RealClip(clip, None, latents, None if values is None else values[part])


def open_clips(data: str | Path, options: EvaluateOptions) -> RealVideos:
    """Find out what `data` is, and choose its clips.

    Raises:
        ValueError: for data that is not there, or has too few or too short videos.
    """
    assert options.split is not None
    latents = Path(data) / options.split
    videos: RealVideos
    if latents.is_dir() and next(latents.rglob("*.safetensors"), None) is not None:
        videos = EncodedVideos(latents, options)
    else:
        source = open_source(data, options.ignore_actions, options.camera)
        if options.split != "validation":
            source = replace(source, holds_out=False)  # all that there is
        videos = RecordedVideos(source.split(options.split), options)
    if videos.num_short:
        logger.warning("%d videos of less than %d frames are left out", videos.num_short, options.length)
    if "fvd" in options.measure_names and len(videos.clips) < 2:
        raise ValueError("num_videos=1: fvd takes two or more; or choose other measures")
    return videos
