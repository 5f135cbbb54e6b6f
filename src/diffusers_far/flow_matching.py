"""FAR's training objective: flow matching per frame, with stochastic clean context (section 3.2).

Shapes: B batch, F frames, C channels, H x W latent grid. `sigma` is the share of noise in [0, 1]; timesteps
are `1000 * sigma`, and `CLEAN_TIMESTEP` marks a frame that is given as it is.
"""

import math

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin
from torch import Tensor

CLEAN_TIMESTEP = -1.0
NUM_TRAIN_TIMESTEPS = 1000


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


def sample_flow_map_steps(
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


def check_scheduler(scheduler: SchedulerMixin, any_step: bool) -> None:
    """Raise a ValueError for a scheduler of diffusers that cannot sample this model.

    Args:
        scheduler: takes velocities of flow matching: one of `FlowMatch...`, or a solver that is told to.
        any_step: whether the model predicts mean velocities; only Euler's steps know what to do with them.
    """
    config, name = scheduler.config, type(scheduler).__name__
    told = config.get("use_flow_sigmas") and config.get("prediction_type") == "flow_prediction"
    if not name.startswith("FlowMatch") and not told:
        raise ValueError(
            f"scheduler={name} is not set to flow matching, and this model predicts its velocities; it takes "
            "FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, FlowMatchLCMScheduler, or a "
            "solver such as UniPCMultistepScheduler with use_flow_sigmas=True and "
            "prediction_type='flow_prediction'"
        )
    for option, takes in (("num_train_timesteps", NUM_TRAIN_TIMESTEPS), ("invert_sigmas", False)):
        if config.get(option, takes) != takes:
            raise ValueError(f"scheduler={name} has {option}={config[option]}; this model takes {takes}")
    euler = isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
    if any_step and (not euler or config.get("stochastic_sampling")):
        how = "stochastic_sampling=True" if euler else "its own way of stepping"
        raise ValueError(
            f"scheduler={name} with {how}: an any-step model (use_meanflow) predicts where a step ends, "
            "which only FlowMatchEulerDiscreteScheduler without stochastic sampling uses"
        )


def set_timesteps(
    scheduler: SchedulerMixin,
    num_inference_steps: int,
    device: torch.device,
    num_tokens: int,
    any_step: bool,
) -> None:
    """Set the noise levels of a frame's denoising steps.

    Args:
        num_tokens: of a frame; a scheduler with dynamic shifting shifts its levels by it.
        any_step: take equal steps to zero. As published, the last step goes from 1/1000 to zero, which a
            model of mean velocities would spend a forward on for nothing.
    """
    arguments: dict[str, object] = {"device": device}
    if any_step:
        arguments["sigmas"] = [1 - index / num_inference_steps for index in range(num_inference_steps)]
    else:
        arguments["num_inference_steps"] = num_inference_steps
    if scheduler.config.get("use_dynamic_shifting"):
        get = scheduler.config.get
        tokens, shifts = (
            (get("base_image_seq_len", 256), get("max_image_seq_len", 4096)),
            (get("base_shift", 0.5), get("max_shift", 1.15)),
        )
        share = (num_tokens - tokens[0]) / (tokens[1] - tokens[0])
        arguments["mu"] = shifts[0] + share * (shifts[1] - shifts[0])
    scheduler.set_timesteps(**arguments)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # saves a look-up that waits for the device
