"""Clips of encoded videos, and everything random about a training step: FAR's batches.

`training/encode_latents.py` writes a folder per split with one `.safetensors` per video: `latents` float16
`[T, C, H, W]`, already scaled to unit deviation, and, where the set has them, `actions` int64 `[T]` (action t
led to frame t). A class-conditional set has `class_label` int64 `[]`. A set that knows where its camera was
may have `revisits` int64 `[T]`: how many frames ago the view of each frame was last seen; 0 for never.

Shapes: B batch, F frames, C channels, H x W latent grid.
"""

from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import Dataset

from diffusers_far.flow_matching import (
    CLEAN_TIMESTEP,
    add_noise,
    sample_clean_frames,
    sample_intervals,
    sample_sigmas,
)


class LatentVideos:
    """The videos of one split; only the frames that are asked for are read from the mapped files.

    Args:
        folder: a split of an encoded data set.
    """

    def __init__(self, folder: str | Path) -> None:
        self.paths = sorted(Path(folder).glob("*.safetensors"))
        if not self.paths:
            raise ValueError(f"folder={str(folder)!r} has no *.safetensors: expected an encoded split")
        self._files = [safe_open(path, framework="pt") for path in self.paths]
        shapes = [file.get_slice("latents").get_shape() for file in self._files]
        self.num_frames = [shape[0] for shape in shapes]
        self.frame_shape: tuple[int, int, int] = tuple(shapes[0][1:])  # (C, H, W)
        self.has_actions = "actions" in self._files[0].keys()  # noqa: SIM118 (it is not a dict)
        self.has_labels = "class_label" in self._files[0].keys()  # noqa: SIM118
        self.has_revisits = "revisits" in self._files[0].keys()  # noqa: SIM118

    def __len__(self) -> int:
        return len(self.paths)

    def clip(self, video: int, start: int, num_frames: int) -> Tensor:
        """`[F, C, H, W]` float32 latents."""
        return self._files[video].get_slice("latents")[start : start + num_frames].float()

    def actions(self, video: int, start: int, num_frames: int) -> Tensor:
        """`[F]` int64, the action that led to each frame."""
        return self._files[video].get_slice("actions")[start : start + num_frames]

    def class_label(self, video: int) -> Tensor:
        """`[]` int64."""
        return self._files[video].get_tensor("class_label")

    def revisits(self) -> np.ndarray:
        """`[N, 3]` int64, a row for each frame whose view was seen before: video, frame, how long ago."""
        rows = []
        for video, file in enumerate(self._files):
            ages = file.get_tensor("revisits").numpy()
            (frames,) = ages.nonzero()
            rows.append(np.stack([np.full_like(frames, video), frames, ages[frames]], axis=1))
        return np.concatenate(rows)


@dataclass(frozen=True)
class ClipBatch:
    """Clips and the draw of one training step, for `window` last frames that may carry a loss."""

    latents: Tensor  # [B, F, C, H, W]
    noise: Tensor  # [B, window, C, H, W]
    sigmas: Tensor  # [B, window] share of noise in [0, 1]
    clean: Tensor  # [B, window] bool, frames given as they are, without loss
    intervals: Tensor  # [2, B, window] share of noise where steps of a flow map start and end
    actions: Tensor | None  # [B, F], -1 where dropped
    class_labels: Tensor | None  # [B], -1 where dropped
    own_context: bool = False  # whether the clean frames of the window are to be the model's own
    estimates: Tensor | None = None  # [B, window, C, H, W], the model's own frames

    def to(self, device: torch.device) -> "ClipBatch":
        values = (getattr(self, field.name) for field in fields(self))
        return ClipBatch(*(value.to(device) if isinstance(value, Tensor) else value for value in values))

    @property
    def window_latents(self) -> Tensor:
        return self.latents[:, -self.noise.shape[1] :]

    def model_input(self) -> tuple[Tensor, Tensor]:
        """Latents `[B, F, C, H, W]`, noisy where there is a loss, and timesteps `[B, F]`."""
        before = self.latents[:, : -self.noise.shape[1]]
        sigmas = torch.where(self.clean, 0.0, self.sigmas)
        noisy = add_noise(self.window_latents, self.noise, sigmas)
        if self.estimates is not None:
            noisy = torch.where(self.clean[..., None, None, None], self.estimates, noisy)
        timestep = torch.where(self.clean, CLEAN_TIMESTEP, self.sigmas * 1000)
        before_timestep = timestep.new_full(before.shape[:2], CLEAN_TIMESTEP)
        return torch.cat([before, noisy], dim=1), torch.cat([before_timestep, timestep], dim=1)

    def all_noisy(self) -> "ClipBatch":
        """The same clips without a clean frame in the window."""
        return replace(self, clean=torch.zeros_like(self.clean))

    def with_estimates(self, noisy: Tensor, velocity: Tensor) -> "ClipBatch":
        """The same clips, with clean frames as the model estimates them from their noisy versions.

        Args:
            noisy: `[B, window, C, H, W]` window of `all_noisy`.
            velocity: `[B, window, C, H, W]` what the model predicts for it.
        """
        return replace(self, estimates=noisy - self.sigmas[..., None, None, None] * velocity.to(noisy.dtype))


class ClipBatches(Dataset[ClipBatch]):
    """Batch `i` of an endless training set.

    It depends on (seed, i, rank) and nothing else, so that a run can stop and go on anywhere.

    Args:
        videos: the split.
        batch_size: B.
        num_frames: frames of a clip; for a Long model the longest one.
        short_window: window of a Long model, whose clips have a random length between it and `num_frames`,
            one per batch; None for a base model, whose clips all have `num_frames` frames.
        length_distribution: of these lengths, "uniform" as published, or "log_uniform", which has more short
            clips: a long one costs more, and most of what there is to remember is not far.
        clean_context_probability: chance of a frame of the window to be given clean.
        condition_dropout: chance of the label of a video, or the action of a frame, to be dropped.
        own_context_probability: chance of a batch to ask for the model's own frames as clean ones.
        noisy_window_probability: chance of a batch without clean frames in its windows, the frames of each at
            one noise level, so that only the long-term frames can tell what comes.
        revisit_probability: chance of a clip whose window shows a view that the clip has before its window.
        seed: of all draws.
        rank: of this process; the clip length is the same on all of them.
    """

    def __init__(
        self,
        videos: LatentVideos,
        batch_size: int,
        num_frames: int,
        short_window: int | None = None,
        clean_context_probability: float = 0.1,
        condition_dropout: float = 0.1,
        own_context_probability: float = 0.0,
        seed: int = 0,
        rank: int = 0,
        length_distribution: str = "uniform",
        noisy_window_probability: float = 0.0,
        revisit_probability: float = 0.0,
    ) -> None:
        least, most = short_window or 1, min(videos.num_frames)
        if not least <= num_frames <= most:
            raise ValueError(
                f"num_frames={num_frames} must be from {least} (the window) to {most} (the shortest video)"
            )
        if revisit_probability > 0 and (short_window is None or not videos.has_revisits):
            raise ValueError(
                f"revisit_probability={revisit_probability} takes a Long model (long_patch_size) and latents "
                "that say when their views were seen before (`revisits`)"
            )
        self.videos = videos
        self.batch_size = batch_size
        self.num_frames = num_frames
        self.short_window = short_window
        self.clean_context_probability = clean_context_probability
        self.condition_dropout = condition_dropout
        self.own_context_probability = own_context_probability
        self.seed = seed
        self.rank = rank
        self.length_distribution = length_distribution
        self.noisy_window_probability = noisy_window_probability
        self.revisit_probability = revisit_probability
        self._revisits = videos.revisits() if revisit_probability > 0 else None

    def __getitem__(self, index: int) -> ClipBatch:
        num_frames = self.num_frames
        if self.short_window is not None:
            num_frames = self._draw_length(np.random.default_rng((self.seed, index)), self.short_window)
        window = min(num_frames, self.short_window or num_frames)
        rng = np.random.default_rng((self.seed, index, 1 + self.rank))
        clips = [(*self._draw_clip(rng, num_frames, window), num_frames) for _ in range(self.batch_size)]
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        shape = (self.batch_size, window)
        actions = class_labels = None
        if self.videos.has_actions:
            actions = self._drop([self.videos.actions(*clip) for clip in clips], generator)
        if self.videos.has_labels:
            class_labels = self._drop([self.videos.class_label(clip[0]) for clip in clips], generator)
        noise = torch.randn(*shape, *self.videos.frame_shape, generator=generator)
        sigmas = sample_sigmas(shape, generator)
        clean = sample_clean_frames(shape, self.clean_context_probability, generator=generator)
        own_context = bool(rng.random() < self.own_context_probability)
        if rng.random() < self.noisy_window_probability:
            clean, sigmas, own_context = torch.zeros_like(clean), sigmas[:, :1].expand(shape), False
        return ClipBatch(
            latents=torch.stack([self.videos.clip(*clip) for clip in clips]),
            noise=noise,
            sigmas=sigmas,
            clean=clean,
            intervals=sample_intervals(shape, generator=generator),
            actions=actions,
            class_labels=class_labels,
            own_context=own_context,
        )

    def _draw_length(self, rng: np.random.Generator, least: int) -> int:
        """Frames of a Long model's clips, `least` to `num_frames`."""
        if self.length_distribution == "uniform":
            return int(rng.integers(least, self.num_frames, endpoint=True))
        return int(np.exp(rng.uniform(np.log(least), np.log(self.num_frames + 1))))

    def _draw_clip(self, rng: np.random.Generator, num_frames: int, window: int) -> tuple[int, int]:
        """A video, and where a clip of `num_frames` frames starts in it."""
        if self._revisits is not None and rng.random() < self.revisit_probability:
            video, frame, age = self._revisits.T
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

    def _drop(self, conditions: list[Tensor], generator: torch.Generator) -> Tensor:
        stacked = torch.stack(conditions)
        dropped = torch.rand(stacked.shape, generator=generator) < self.condition_dropout
        return torch.where(dropped, -1, stacked)  # -1 is the model's null condition
