"""FAR's training objective: flow matching per frame, with stochastic clean context (section 3.2).

Shapes: B batch, F frames, C channels, H x W latent grid. `sigma` is the share of noise in [0, 1]; timesteps
are `1000 * sigma`, and `CLEAN_TIMESTEP` marks a frame that is given as it is.
"""

import math

import torch
from torch import Tensor

CLEAN_TIMESTEP = -1.0


def add_noise(latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """`sigma * noise + (1 - sigma) * latents` for latents and noise `[B, F, C, H, W]`, sigma `[B, F]`."""
    sigma = sigma[..., None, None, None].to(latents.dtype)
    return sigma * noise + (1 - sigma) * latents


def velocity_target(latents: Tensor, noise: Tensor) -> Tensor:
    """What the model predicts: `noise - latents`, `[B, F, C, H, W]`."""
    return noise - latents


def sample_sigmas(
    shape: tuple[int, int],
    generator: torch.Generator | None = None,
    num_train_timesteps: int = 1000,
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
) -> Tensor:
    """Logit-normal noise levels, one per frame, on the scheduler's grid of `num_train_timesteps` levels.

    Args:
        shape: (B, F).
        generator: CPU generator of the draw.

    Returns:
        `[B, F]` sigmas in {1 / num_train_timesteps, ..., 1}, on the CPU.
    """
    uniform = torch.sigmoid(torch.randn(shape, generator=generator) * logit_std + logit_mean)
    index = (uniform * num_train_timesteps).long().clamp(max=num_train_timesteps - 1)
    return 1 - index.float() / num_train_timesteps


def sample_intervals(
    shape: tuple[int, ...], max_steps: int = 16, generator: torch.Generator | None = None
) -> Tensor:
    """Steps to train a flow map on: where each starts and ends.

    They are those of samplers that take 1 to `max_steps` equal steps from pure noise to a clean frame. A
    sampler of n steps has a chance in proportion to 1 / n, and each of its steps the same.

    Args:
        shape: of the draw, (B, F).
        max_steps: of a sampler.
        generator: CPU generator of the draw.

    Returns:
        `[2, B, F]` sigmas in [0, 1], the first above the second.
    """
    chances = 1 / torch.arange(1.0, max_steps + 1)
    draws = torch.multinomial(chances, math.prod(shape), replacement=True, generator=generator)
    num_steps = 1 + draws.view(shape)
    index = (torch.rand(shape, generator=generator) * num_steps).floor().clamp(max=num_steps - 1)
    return 1 - torch.stack([index, index + 1]) / num_steps


def sample_clean_frames(
    shape: tuple[int, int],
    probability: float,
    num_long_frames: int = 0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Which frames are given clean and left out of the loss: stochastic clean context.

    Args:
        shape: (B, F).
        probability: chance of each frame of the window, 0.1 as published.
        num_long_frames: leading frames before the window; always clean.
        generator: CPU generator of the draw.

    Returns:
        `[B, F]` bool, on the CPU. A video whose window came out all clean keeps its last frame noisy, so that
        every video has a loss.
    """
    clean = torch.rand(shape, generator=generator) < probability
    clean[:, :num_long_frames] = True
    clean[:, -1] &= ~clean.all(dim=1)
    return clean


def frame_loss(prediction: Tensor, target: Tensor, clean: Tensor) -> Tensor:
    """Squared error of the velocity: mean over a frame, over a video's noisy frames, then over the batch.

    Args:
        prediction, target: `[B, F, C, H, W]` of the window's frames.
        clean: `[B, F]` bool, frames without loss.
    """
    error = (prediction.float() - target.float()).square().mean(dim=(2, 3, 4))
    noisy = (~clean).to(error.dtype)
    return ((error * noisy).sum(dim=1) / noisy.sum(dim=1).clamp(min=1)).mean()
