"""Pipelines that are no model, with the call of one, and videos to try them on."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

SIDE = 32  # pixels of the videos
NUM_FRAMES = 24  # of each of them


def write_videos(
    folder: Path, number: int, split: str = "validation", num_frames: int = NUM_FRAMES, **arrays: np.ndarray
) -> Path:
    """npz episodes of a picture that moves by a pixel a frame."""
    (folder / split).mkdir(parents=True, exist_ok=True)
    for index in range(number):
        picture = np.random.default_rng(index).integers(256, size=(8, 8, 3)).astype(np.uint8)
        picture = picture.repeat(SIDE // 8, axis=0).repeat(SIDE // 8, axis=1)
        video = np.stack([np.roll(picture, t, axis=1) for t in range(num_frames)])
        values = {name: array[:num_frames] for name, array in arrays.items()}
        np.savez(folder / split / f"{index:03d}.npz", video=video, **values)
    return folder


class Guess:
    """Knows how the pictures move, and errs by noise whose size is drawn, too."""

    def __init__(self, error: float = 0.1) -> None:
        self.error = error
        self.calls: list[dict[str, Any]] = []
        self.predicted: list[Tensor] = []

    def __call__(
        self, video: Tensor, num_frames: int, generator: list[torch.Generator], output_type: str
    ) -> SimpleNamespace:
        self.calls.append({"video": video, "num_frames": num_frames, "output_type": output_type})
        last, number = video[:, -1], num_frames - video.shape[1]
        new = torch.stack([last.roll(ahead + 1, dims=-1) for ahead in range(number)], dim=1)
        for guess, own in zip(new, generator, strict=True):
            size = self.error * torch.rand((), generator=own)
            guess += size * torch.randn(guess.shape, generator=own)
        frames = torch.cat([video, new], dim=1)
        self.predicted += list(new.clamp(0, 1))
        return SimpleNamespace(frames=frames)
