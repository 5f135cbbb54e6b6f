"""What training FAR reads: the latents of videos, and the clips of a training step.

training/encode_latents.py writes a `.safetensors` per video, `LATENTS/<split>/<name>.safetensors`: `latents`
float16 `[T, C, H, W]`, already scaled to unit deviation, `actions` and `revisits` int64 `[T]`, `class_label`
int64 `[]`. Actions of groups are int64 `[T, G]`, vectors float32 `[T, A]`; their names are in the metadata.

Shapes: B batch, F frames, C channels, H x W latent grid.
"""

import hashlib
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from ..actions import ActionSpace

AUTOENCODER_KEY = "autoencoder_sha256"  # in the metadata of a file of latents
ACTION_NAMES_KEY = "action_names"  # there, too: a JSON list of names of groups, or of numbers of vectors

logger = logging.getLogger(__name__)


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
        encoders: list[str | None] = [(file.metadata() or {}).get(AUTOENCODER_KEY) for file in self._files]
        names = [(file.metadata() or {}).get(ACTION_NAMES_KEY, "[]") for file in self._files]
        self.action_names: tuple[str, ...] = tuple(json.loads(names[0]))
        for path, shape, encoder, own_names in zip(self.paths, self._shapes, encoders, names, strict=True):
            if own_names != names[0]:
                raise ValueError(
                    f"{path} has actions called {own_names}, {self.paths[0]} {names[0]}: all must be equal"
                )
            if shape[1:] != self.frame_shape:
                first = f"{self.paths[0]} of {self.frame_shape}"
                raise ValueError(f"{path} has latents of {shape[1:]}, {first}: all must be equal")
            if encoder != encoders[0]:
                raise ValueError(f"{path} and {self.paths[0]} were encoded by different autoencoders")
        self.autoencoder = encoders[0]  # its hash, where the files have it

    def _read(self, name: str) -> list[Tensor | None]:
        found = [file.get_tensor(name) if name in file.keys() else None for file in self._files]  # noqa: SIM118
        for path, values, number in zip(self.paths, found, self.num_frames, strict=True):
            if values is not None and name != "class_label" and len(values) != number:
                raise ValueError(f"{path} has {len(values)} {name} for {number} frames")
        return found

    def __len__(self) -> int:
        return len(self.paths)

    def keep_conditions(
        self, num_actions: Any, num_classes: int | None, action_dim: int | None = None
    ) -> None:
        """Check what conditions a model of such options, and forget what it does not take."""
        option = f"{num_actions=}" if action_dim is None else f"{action_dim=}"
        space = ActionSpace.of({"num_actions": num_actions, "action_dim": action_dim})
        self.actions = self._keep(self.actions, "actions", option, space)
        classes = None if num_classes is None else ActionSpace(num_classes)
        self.class_labels = self._keep(self.class_labels, "class labels", f"{num_classes=}", classes)

    def _keep(
        self, found: list[Tensor | None], name: str, option: str, space: ActionSpace | None
    ) -> list[Tensor | None]:
        if space is None:
            if any(values is not None for values in found):
                logger.warning("%s has %s, which this model ignores (%s)", self.folder, name, option)
            return [None] * len(self)
        for path, values in zip(self.paths, found, strict=True):
            if values is None:
                raise ValueError(f"{option}: {path} has no {name}")
            where = f"{option}: {path} has {name}"
            if tuple(values.shape[1:]) != space.shape or values.is_floating_point() != space.is_vector:
                raise ValueError(f"{where} of {values.dtype} {list(values.shape)}; it takes {space}")
            if space.is_vector:
                if values.isinf().any():
                    raise ValueError(f"{where} that are infinite")
                continue
            for size, column in zip(
                space.sizes, values.reshape(-1, len(space.sizes)).unbind(-1), strict=True
            ):
                wrong = column[(column < -1) | (column >= size)]
                if wrong.numel():
                    takes = f"0 to {size - 1}, or -1 for none"
                    raise ValueError(f"{where} such as {int(wrong[0])}; it takes {takes}")
        return found

    def action_statistics(self) -> dict[str, list[float]]:
        """`action_mean` and `action_std` of a model of vectors; nothing where actions are no vectors."""
        vectors = [values for values in self.actions if values is not None and values.is_floating_point()]
        if len(vectors) < len(self):
            return {}
        rows = torch.cat(vectors).double()
        rows = rows[~rows.isnan().any(dim=1)]
        if not len(rows):
            return {}
        std = rows.std(dim=0, correction=0)
        # A number that never changes says nothing, whatever it is divided by.
        return {"action_mean": rows.mean(dim=0).tolist(), "action_std": std.where(std > 0, 1.0).tolist()}

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


def stack_actions(values: Sequence[Any]) -> Tensor:
    """Actions of the frames of an episode: int64 `[T]` or `[T, G]`, or float32 `[T, A]`."""
    is_vector = len(values) > 0 and isinstance(values[0], tuple) and isinstance(values[0][0], float)
    return torch.tensor(values, dtype=torch.float32 if is_vector else torch.int64)


def action_options(actions: Sequence[Tensor]) -> dict[str, Any]:
    """`num_actions` or `action_dim` of a model for actions of some episodes."""
    kinds = {(values.is_floating_point(), *values.shape[1:]) for values in actions}
    if len(kinds) > 1:
        found = sorted({f"{values.dtype} {['T', *values.shape[1:]]}" for values in actions})
        raise ValueError(f"actions of several kinds: {', '.join(found)}; it takes one for all videos")
    rows = torch.cat(list(actions))
    if rows.is_floating_point():
        return {"action_dim": rows.shape[1]}
    sizes = (rows.reshape(len(rows), -1).amax(dim=0) + 1).clamp(min=1).tolist()
    return {"num_actions": sizes if rows.ndim == 2 else sizes[0]}


# ------------------------------------------------------------------------------------------------------------
# Clips


@dataclass(frozen=True)
class Clips:
    """A batch of clips, whose last `window` frames are to be predicted."""

    latents: Tensor  # [B, F, C, H, W]
    window: int
    actions: Tensor | None  # [B, F], -1 where dropped; of groups [B, F, G], of vectors [B, F, A] (NaN)
    class_labels: Tensor | None  # [B], -1 where dropped
    sources: tuple[str, ...]  # where each is from
    rank: int = 0  # of the process that has these clips of a step; all `num_ranks` have as many
    num_ranks: int = 1

    def to(self, device: torch.device) -> "Clips":
        actions = None if self.actions is None else self.actions.to(device)
        labels = None if self.class_labels is None else self.class_labels.to(device)
        return replace(self, latents=self.latents.to(device), actions=actions, class_labels=labels)

    @property
    def num_drawn(self) -> int:
        """Clips of all processes. Random numbers are drawn for all of them, then `own` takes some."""
        return self.num_ranks * len(self.latents)

    def own(self, draws: Tensor, dim: int = 0) -> Tensor:
        """Of what was drawn for the clips of all processes, what is for these."""
        return draws.chunk(self.num_ranks, dim)[self.rank]

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

    It depends on (seed, i) and nothing else, so that a run can stop and go on anywhere. Several processes
    share it out: each draws all clips, and reads its own. So one process with a larger batch learns the same.

    A clip is drawn from the videos that are long enough for it; those that are too short for any clip are
    named in a warning.

    Raises:
        ValueError: for `num_frames` or `revisit_probability` that the videos do not allow.
    """

    videos: LatentVideos
    batch_size: int  # of a process
    num_frames: int  # of a clip; of a Long model the longest one
    short_window: int | None = None  # of a Long model, whose clips have a length between it and num_frames
    # Of these lengths. "log_uniform" has more short clips: a long one costs more, and most of what there is
    # to remember is not far.
    length_distribution: str = "uniform"
    revisit_probability: float = 0.0  # chance of a clip whose window shows a view seen before it
    condition_dropout: float = 0.1  # chance of the label of a video, or the action of a frame, to be dropped
    seed: int = 0
    rank: int = 0  # of this process, of `num_ranks`
    num_ranks: int = 1

    def __post_init__(self) -> None:
        videos, least, most = self.videos, self.short_window or 1, max(self.videos.num_frames)
        if not least <= self.num_frames <= most:
            longest = videos.paths[videos.num_frames.index(most)]
            raise ValueError(
                f"num_frames={self.num_frames} must be from {least} (the window) to {most} (the longest "
                f"video, {longest})"
            )
        self._lengths = np.asarray(videos.num_frames)
        self._warn_of_short_videos(self.short_window or self.num_frames)
        self._seen_before = None
        if self.revisit_probability > 0:
            if self.short_window is None or None in videos.revisits:
                raise ValueError(
                    f"revisit_probability={self.revisit_probability} takes a Long model (long_patch_size) "
                    "and latents with `revisits`, when each view was seen before"
                )
            self._seen_before = videos.seen_before()

    def _warn_of_short_videos(self, least: int) -> None:
        (short,) = np.nonzero(self._lengths < least)
        if len(short):
            names = ", ".join(self.videos.paths[video].stem for video in short[:10])
            logger.warning(
                "%d of %d videos in %s are not used, as they are shorter than a clip of %d frames: %s",
                *(len(short), len(self.videos), self.videos.folder, least),
                names + (", ..." if len(short) > 10 else ""),
            )

    def __getitem__(self, index: int) -> Clips:
        num_frames = self.num_frames
        if self.short_window is not None:
            num_frames = self._draw_length(np.random.default_rng((self.seed, index)), self.short_window)
        window = min(num_frames, self.short_window or num_frames)
        rng = np.random.default_rng((self.seed, index, 1))
        starts = self._draw_clips(rng, num_frames, window)
        clips = starts[self.rank * self.batch_size :][: self.batch_size]
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
            rank=self.rank,
            num_ranks=self.num_ranks,
        )

    def _draw_length(self, rng: np.random.Generator, least: int) -> int:
        """Frames of a Long model's clips, `least` to `num_frames`."""
        if self.length_distribution == "uniform":
            return int(rng.integers(least, self.num_frames, endpoint=True))
        return int(np.exp(rng.uniform(np.log(least), np.log(self.num_frames + 1))))

    def _draw_clips(self, rng: np.random.Generator, num_frames: int, window: int) -> list[tuple[int, int]]:
        """Of each clip of all processes a video, and where a clip of `num_frames` frames starts in it."""
        (long_enough,) = np.nonzero(self._lengths >= num_frames)
        fits = np.empty(0, np.int64)
        if self._seen_before is not None:
            video, frame, age = self._seen_before.T
            # The window has the frame that is seen again, the clip has the frame where it was seen before.
            first_end = np.maximum(num_frames, frame + 1)
            last_end = np.minimum(self._lengths[video], frame + window)
            fits = np.flatnonzero((first_end <= last_end) & (age <= num_frames - window))
        clips = []
        for _ in range(self.num_ranks * self.batch_size):
            if self._seen_before is not None and rng.random() < self.revisit_probability and len(fits):
                chosen = rng.choice(fits)
                end = int(rng.integers(first_end[chosen], last_end[chosen], endpoint=True))
                clips.append((int(video[chosen]), end - num_frames))
            else:
                drawn = int(long_enough[rng.integers(len(long_enough))])
                clips.append((drawn, int(rng.integers(self._lengths[drawn] - num_frames, endpoint=True))))
        return clips

    def _drop(self, conditions: list[Tensor | None], rng: np.random.Generator) -> Tensor | None:
        if conditions[0] is None:
            return None
        stacked = torch.stack(conditions)  # type: ignore[arg-type]
        draws = rng.random((self.num_ranks, *stacked.shape[:2]))[self.rank]
        dropped = torch.from_numpy(draws < self.condition_dropout)
        dropped = dropped.reshape(*dropped.shape, *(1,) * (stacked.ndim - dropped.ndim))
        null = math.nan if stacked.is_floating_point() else -1  # the model's null condition
        return torch.where(dropped, null, stacked)
