"""What training reads: the videos of a videofolder, their latents, and the clips of a training step.

A videofolder is `DATA/<split>/*.mp4`. `metadata.jsonl` has a line per video: `file_name` and, where known,
one integer per frame as `actions` (`actions[t]` led to frame t) and as `revisits` (how many frames ago the
view of frame t was last seen; 0 for never), and a `class_label`. Without metadata, a folder for each class,
`DATA/<split>/<class>/*.mp4`, gives the labels: classes count from 0, by name.

training/encode_latents.py writes a `.safetensors` per video, `LATENTS/<split>/<name>.safetensors`: `latents`
float16 `[T, C, H, W]`, already scaled to unit deviation, `actions` and `revisits` int64 `[T]`, `class_label`
int64 `[]`.

Shapes: B batch, F frames, C channels, H x W latent grid.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from diffusers_far import read_video
from diffusers_far.whole_files import written_whole

VIDEO_ENDINGS = "avi|flv|gif|m4v|mkv|mov|mp4|mpeg|mpg|ts|webm|wmv"
AUTOENCODER_KEY = "autoencoder_sha256"  # in the metadata of a file of latents

logger = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------------------------
# Videos


@dataclass(frozen=True)
class Episode:
    """A video file and what is known of it."""

    video: Path
    actions: tuple[int, ...] | None = None  # one per frame
    revisits: tuple[int, ...] | None = None  # one per frame
    class_label: int | None = None


def list_episodes(data: str | Path, split: str) -> list[Episode]:
    """The episodes of a split, in the order of their file names.

    Videos that the metadata do not list, and files that are no videos, are left out with a warning.

    Raises:
        ValueError: for a split without videos, and metadata that do not fit the files or the format.
    """
    folder = Path(data) / split
    if not folder.is_dir():
        raise ValueError(f"data={str(data)!r} has no folder {split!r}; it takes a videofolder")
    tables = sorted(file for file in folder.rglob("metadata.*") if file.suffix in (".jsonl", ".parquet"))
    videos = _videos(folder)
    if tables:
        episodes = [_episode(row, table) for table in tables for row in _rows(table)]
        unlisted = set(videos)
        for episode in episodes:
            if episode.video not in unlisted:
                raise ValueError(f"metadata name {episode.video}, which is no video, or twice")
            unlisted.remove(episode.video)
        _warn("metadata do not list", sorted(unlisted))
    else:
        classes = _class_names(Path(data))
        labelled = len(classes) > 1 and all(video.parent.parent == folder for video in videos)
        labels = [classes.index(video.parent.name) if labelled else None for video in videos]
        episodes = [Episode(video, class_label=label) for video, label in zip(videos, labels, strict=True)]
    files = (file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))
    _warn("are no videos", sorted(set(files) - set(videos) - set(tables)))
    if not episodes:
        raise ValueError(f"{folder} has no videos; a video's name ends in one of {VIDEO_ENDINGS}")
    return sorted(episodes, key=lambda episode: episode.video)


def _videos(folder: Path) -> list[Path]:
    is_video = re.compile(rf"[^.].*\.({VIDEO_ENDINGS})", re.IGNORECASE).fullmatch
    return sorted(file for file in folder.rglob("*") if is_video(file.name) and file.is_file())


def _class_names(data: Path) -> list[str]:
    """Of all splits together, so that a class has the same number in each."""
    splits = [folder for folder in data.iterdir() if folder.is_dir()]
    videos = [(split, video) for split in splits for video in _videos(split)]
    return sorted({video.parent.name for split, video in videos if video.parent.parent == split})


def _warn(reason: str, files: Sequence[Path]) -> None:
    if files:
        names = ", ".join(file.name for file in files[:10]) + (", ..." if len(files) > 10 else "")
        logger.warning("left out, as %s (%d in %s): %s", reason, len(files), files[0].parent, names)


def _rows(table: Path) -> list[Any]:
    if table.suffix == ".parquet":
        from pyarrow import parquet  # comes with `datasets`; few have such a file

        return parquet.read_table(table).to_pylist()
    try:
        return [json.loads(line) for line in table.read_text(encoding="utf-8").splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{table} has a line that is no JSON ({error}): {error.doc[:80]}") from error


def _episode(row: Any, table: Path) -> Episode:
    """The episode of one row of the metadata, checked."""
    name = row.get("file_name") if isinstance(row, dict) else None
    if not isinstance(name, str):
        raise ValueError(f"{table} has a line without file_name: {str(row)[:80]}")
    where = f"{table}: {name}"
    per_frame = []
    for kind, least in (("actions", -1), ("revisits", 0)):
        values = row.get(kind)
        if values is not None and not isinstance(values, list):
            raise ValueError(f"{where} has {kind} {values!r}; it takes a list of one integer per frame")
        for frame, value in enumerate(values or ()):
            _check_integer(value, least, f"{where} has {kind} {value!r} at frame {frame}")
        per_frame.append(None if values is None else tuple(values))
    label = row.get("class_label", row.get("label"))
    if label is not None:
        _check_integer(label, 0, f"{where} has class_label {label!r}")
    return Episode(Path(os.path.normpath(table.parent / name)), *per_frame, label)


def _check_integer(value: Any, least: int, found: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{found}; it takes integers of at least {least}")


def load_frames(videos: Sequence[Path], cache_dir: str | Path) -> np.ndarray:
    """Frames of all videos in a row: uint8 [N, H, W, 3], mapped from a file that is decoded only once.

    The file is named after the paths, sizes and times of the videos: changed videos are decoded anew.
    """
    identity = [(str(video.resolve()), video.stat().st_size, video.stat().st_mtime_ns) for video in videos]
    cache = Path(cache_dir) / f"frames-{hashlib.sha256(repr(identity).encode()).hexdigest()[:16]}.npy"
    if not cache.exists():
        logger.info("decoding %d videos into %s", len(videos), cache)
        cache.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(cache) as partial:
            _decode_into(partial, videos)
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


# ------------------------------------------------------------------------------------------------------------
# Latents


class LatentVideos:
    """The encoded videos of one split; only the frames that are asked for are read from the mapped files.

    Args:
        folder: a split of an encoded data set.

    Raises:
        ValueError: for files that cannot be read, or do not fit one another.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.paths = sorted(self.folder.rglob("*.safetensors"))
        if not self.paths:
            raise ValueError(f"latents: {str(folder)!r} has no *.safetensors; it takes an encoded split")
        self._files = [_open(path) for path in self.paths]
        self._shapes = [tuple(file.get_slice("latents").get_shape()) for file in self._files]
        self.num_frames = [shape[0] for shape in self._shapes]
        self.frame_shape: tuple[int, int, int] = self._shapes[0][1:]  # (C, H, W)
        self.actions = self._read("actions")
        self.revisits = self._read("revisits")
        self.class_labels = self._read("class_label")
        encoders = [(file.metadata() or {}).get(AUTOENCODER_KEY) for file in self._files]
        for path, shape, encoder in zip(self.paths, self._shapes, encoders, strict=True):
            if shape[1:] != self.frame_shape:
                first = f"{self.paths[0]} of {self.frame_shape}"
                raise ValueError(f"{path} has latents of {shape[1:]}, {first}: all must be equal")
            if encoder != encoders[0]:
                raise ValueError(f"{path} and {self.paths[0]} were encoded by different autoencoders")

    def _read(self, name: str) -> list[Tensor | None]:
        found = [file.get_tensor(name) if name in file.keys() else None for file in self._files]  # noqa: SIM118
        for path, values, number in zip(self.paths, found, self.num_frames, strict=True):
            if values is not None and name != "class_label" and len(values) != number:
                raise ValueError(f"{path} has {len(values)} {name} for {number} frames")
        return found

    def __len__(self) -> int:
        return len(self.paths)

    def keep_conditions(self, num_actions: int | None, num_classes: int | None) -> None:
        """Check what conditions a model of so many actions and classes, and forget what it does not take."""
        self.actions = self._keep(self.actions, "actions", "num_actions", num_actions)
        self.class_labels = self._keep(self.class_labels, "class labels", "num_classes", num_classes)

    def _keep(
        self, found: list[Tensor | None], name: str, option: str, number: int | None
    ) -> list[Tensor | None]:
        if number is None:
            if any(values is not None for values in found):
                logger.warning("%s has %s, which this model ignores (%s=None)", self.folder, name, option)
            return [None] * len(self)
        for path, values in zip(self.paths, found, strict=True):
            if values is None:
                raise ValueError(f"{option}={number}: {path} has no {name}")
            wrong = values[(values < -1) | (values >= number)]
            if wrong.numel():
                raise ValueError(
                    f"{option}={number}: {path} has {name} such as {int(wrong.flatten()[0])}; it takes 0 to "
                    f"{number - 1}, or -1 for none"
                )
        return found

    def clip(self, video: int, start: int, num_frames: int) -> Tensor:
        """`[F, C, H, W]` float32 latents."""
        latents = self._files[video].get_slice("latents")[start : start + num_frames].float()
        if not latents.isfinite().all():
            frame = start + int((~latents.isfinite()).flatten(1).any(dim=1).nonzero()[0])
            raise ValueError(
                f"{self.paths[video]} has NaN or infinite latents at frame {frame}: encode it anew"
            )
        return latents

    def fingerprint(self) -> str:
        """A hash that changes with the videos: their names, lengths, encoder and first frames."""
        digest = hashlib.sha256()
        for path, file, shape in zip(self.paths, self._files, self._shapes, strict=True):
            metadata = sorted((file.metadata() or {}).items())
            digest.update(repr((path.relative_to(self.folder).as_posix(), shape, metadata)).encode())
            digest.update(file.get_slice("latents")[:1].numpy().tobytes())
        return digest.hexdigest()

    def seen_before(self) -> np.ndarray:
        """`[N, 3]` int64, a row for each frame whose view was seen before: video, frame, how long ago."""
        rows = []
        for video, revisits in enumerate(self.revisits):
            assert revisits is not None
            ages = revisits.numpy()
            (frames,) = ages.nonzero()
            rows.append(np.stack([np.full_like(frames, video), frames, ages[frames]], axis=1))
        return np.concatenate(rows)


def _open(path: Path) -> Any:
    try:
        file = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}; encode it anew") from error
    if "latents" not in file.keys() or len(file.get_slice("latents").get_shape()) != 4:  # noqa: SIM118
        raise ValueError(f"{path} has no latents [T, C, H, W]")
    return file


# ------------------------------------------------------------------------------------------------------------
# Clips


@dataclass(frozen=True)
class Clips:
    """A batch of clips, whose last `window` frames are to be predicted."""

    latents: Tensor  # [B, F, C, H, W]
    window: int
    actions: Tensor | None  # [B, F], -1 where dropped
    class_labels: Tensor | None  # [B], -1 where dropped
    sources: tuple[str, ...]  # where each is from

    def to(self, device: torch.device) -> "Clips":
        values = (value.to(device) if isinstance(value, Tensor) else value for value in vars(self).values())
        return Clips(*values)

    @property
    def before(self) -> Tensor:
        """`[B, F - window, C, H, W]`, given clean."""
        return self.latents[:, : -self.window]

    @property
    def target(self) -> Tensor:
        """`[B, window, C, H, W]`, to be predicted."""
        return self.latents[:, -self.window :]


@dataclass(eq=False)
class ClipBatches(Dataset[Clips]):
    """Batch `i` of an endless training set.

    It depends on (seed, i, rank) and nothing else, so that a run can stop and go on anywhere.

    Raises:
        ValueError: for `num_frames` or `revisit_probability` that the videos do not allow.
    """

    videos: LatentVideos
    batch_size: int
    num_frames: int  # of a clip; of a Long model the longest one
    short_window: int | None = None  # of a Long model, whose clips have a length between it and num_frames
    # Of these lengths. "log_uniform" has more short clips: a long one costs more, and most of what there is
    # to remember is not far.
    length_distribution: str = "uniform"
    revisit_probability: float = 0.0  # chance of a clip whose window shows a view seen before it
    condition_dropout: float = 0.1  # chance of the label of a video, or the action of a frame, to be dropped
    seed: int = 0
    rank: int = 0  # of this process; the clip length is the same on all of them

    def __post_init__(self) -> None:
        videos, least, most = self.videos, self.short_window or 1, min(self.videos.num_frames)
        if not least <= self.num_frames <= most:
            shortest = videos.paths[videos.num_frames.index(most)]
            raise ValueError(
                f"num_frames={self.num_frames} must be from {least} (the window) to {most} (the shortest "
                f"video, {shortest})"
            )
        self._seen_before = None
        if self.revisit_probability > 0:
            if self.short_window is None or None in videos.revisits:
                raise ValueError(
                    f"revisit_probability={self.revisit_probability} takes a Long model (long_patch_size) "
                    "and latents with `revisits`, when each view was seen before"
                )
            self._seen_before = videos.seen_before()

    def __getitem__(self, index: int) -> Clips:
        num_frames = self.num_frames
        if self.short_window is not None:
            num_frames = self._draw_length(np.random.default_rng((self.seed, index)), self.short_window)
        window = min(num_frames, self.short_window or num_frames)
        rng = np.random.default_rng((self.seed, index, 1 + self.rank))
        clips = [self._draw_clip(rng, num_frames, window) for _ in range(self.batch_size)]
        actions = [self.videos.actions[video] for video, _ in clips]
        labels = [self.videos.class_labels[video] for video, _ in clips]
        return Clips(
            latents=torch.stack([self.videos.clip(video, start, num_frames) for video, start in clips]),
            window=window,
            actions=self._drop(
                [
                    None if values is None else values[start : start + num_frames]
                    for values, (_, start) in zip(actions, clips, strict=True)
                ],
                rng,
            ),
            class_labels=self._drop(labels, rng),
            sources=tuple(f"{self.videos.paths[video]} from frame {start}" for video, start in clips),
        )

    def _draw_length(self, rng: np.random.Generator, least: int) -> int:
        """Frames of a Long model's clips, `least` to `num_frames`."""
        if self.length_distribution == "uniform":
            return int(rng.integers(least, self.num_frames, endpoint=True))
        return int(np.exp(rng.uniform(np.log(least), np.log(self.num_frames + 1))))

    def _draw_clip(self, rng: np.random.Generator, num_frames: int, window: int) -> tuple[int, int]:
        """A video, and where a clip of `num_frames` frames starts in it."""
        if self._seen_before is not None and rng.random() < self.revisit_probability:
            video, frame, age = self._seen_before.T
            # The window has the frame that is seen again, the clip has the frame where it was seen before.
            first_end = np.maximum(num_frames, frame + 1)
            last_end = np.minimum(np.asarray(self.videos.num_frames)[video], frame + window)
            fits = np.flatnonzero((first_end <= last_end) & (age <= num_frames - window))
            if len(fits):
                chosen = rng.choice(fits)
                end = int(rng.integers(first_end[chosen], last_end[chosen], endpoint=True))
                return int(video[chosen]), end - num_frames
        drawn = int(rng.integers(len(self.videos)))
        return drawn, int(rng.integers(self.videos.num_frames[drawn] - num_frames, endpoint=True))

    def _drop(self, conditions: list[Tensor | None], rng: np.random.Generator) -> Tensor | None:
        if conditions[0] is None:
            return None
        stacked = torch.stack(conditions)  # type: ignore[arg-type]
        dropped = torch.from_numpy(rng.random(stacked.shape) < self.condition_dropout)
        return torch.where(dropped, -1, stacked)  # -1 is the model's null condition
