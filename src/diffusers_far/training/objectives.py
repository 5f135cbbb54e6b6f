"""What FAR learns: flow matching (section 3 of the paper), and from a trained model its flow map.

An objective draws the noise of a batch of clips and measures what the model makes of it: `loss(clips,
generator)`. All draws come from the CPU generator, so a run can stop and go on anywhere. It is the same in
all processes, so that chances which concern the whole batch fall alike.

Shapes: B batch, F frames, W frames of the window, C channels, H x W latent grid.
"""

from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..flow_matching import (
    CLEAN_TIMESTEP,
    add_noise,
    frame_loss,
    sample_clean_frames,
    sample_flow_map_steps,
    sample_sigmas,
    velocity_target,
)
from ..kv_cache import FARCache, Slot
from ..transformer_far import FARTransformer3DModel
from .clips import Clips

NUM_TEACHER_STEPS = 8  # for the longest step of a flow map; shorter ones take as many


@dataclass
class FlowMatching:
    """Velocity of noisy frames after clean ones, with stochastic clean context.

    A noisy window has no clean frame, and its frames one noise level, so that only the long-term frames can
    tell what comes.
    """

    model: nn.Module  # that learns
    clean_context_probability: float = 0.1  # chance of a frame of the window to be given clean, without loss
    own_context_probability: float = 0.0  # chance of a batch whose clean frames are the model's own
    noisy_window_probability: float = 0.0  # chance of a batch of noisy windows

    def held_out(self) -> dict[str, "FlowMatching"]:
        """What validation measures: as in training, and as in sampling (one noisy frame, the last)."""
        return {
            "validation_loss": FlowMatching(self.model, self.clean_context_probability),
            "next_frame_loss": FlowMatching(self.model, clean_context_probability=1.0),
        }

    def loss(self, clips: Clips, generator: torch.Generator) -> Tensor:
        """Squared error of the velocity, mean over noisy frames: `[]`."""
        noise, sigmas = draw_noise(clips, generator)
        shape = (clips.num_drawn, clips.window)
        clean = clips.own(sample_clean_frames(shape, self.clean_context_probability, generator=generator))
        own_context = chance(self.own_context_probability, generator)
        if chance(self.noisy_window_probability, generator):
            clean, sigmas, own_context = torch.zeros_like(clean), sigmas[:, :1].expand(sigmas.shape), False
        clean = clean.to(noise.device)
        given = estimate_window(self.model, clips, noise, sigmas) if own_context else clips.target
        prediction = velocity(self.model, clips, *noisy_window(clips, noise, sigmas, clean, given))
        return frame_loss(prediction, velocity_target(clips.target, noise), clean)


class FlowMap:
    """Mean velocity of the way that a trained model, frozen, takes a noisy frame from level t down to r.

    MeanFlow (arXiv 2505.13447, equation 3):

        u(x_t, t, r) = 1 / (t - r) * integral from r to t of v(x_s, s) ds = (x_t - x_r) / (t - r),

    so that one step x_t - (t - r) u lands where the trained model comes in many. The integral is worked out
    in NUM_TEACHER_STEPS Euler steps, so that targets do not rest on what the model has learned so far.

    The frames before a noisy frame are clean, as in sampling: a clip's clean frames are computed once, and a
    noisy copy of each frame of the window sees those before it.

    Args:
        model: that learns; made with `use_meanflow`.
        teacher: the trained model.
        own_context_probability: chance of a batch whose clean frames of the window are the teacher's own.
    """

    def __init__(
        self, model: nn.Module, teacher: FARTransformer3DModel, own_context_probability: float = 0.0
    ) -> None:
        self.model = model
        self.network: Any = getattr(model, "module", model)  # of several processes
        self.teacher = teacher.requires_grad_(False)
        self.own_context_probability = own_context_probability

    def held_out(self) -> dict[str, "FlowMap"]:
        """What validation measures: as in training, but from true frames only."""
        objective = copy(self)
        objective.own_context_probability = 0.0
        return {"validation_loss": objective}

    def loss(self, clips: Clips, generator: torch.Generator) -> Tensor:
        """Squared error of the mean velocity: `[]`."""
        noise, sigmas = draw_noise(clips, generator)
        steps = sample_flow_map_steps((clips.num_drawn, clips.window), generator=generator)
        start, end = clips.own(steps, dim=1).to(noise.device)
        own_context = chance(self.own_context_probability, generator)
        window = estimate_window(self.teacher, clips, noise, sigmas) if own_context else clips.target
        frames = add_noise(clips.target, noise, start)
        target = self.teacher_velocity(clips, window, frames, start, end)
        context = self.encode(self.model, clips, window)
        prediction = self.velocity(self.model, clips, context, frames, start, end)
        return (prediction - target).square().mean()

    @torch.no_grad()
    def teacher_velocity(
        self, clips: Clips, window: Tensor, frames: Tensor, start: Tensor, end: Tensor
    ) -> Tensor:
        """`[B, W, C, H, W]`, mean over the trained model's steps from levels `start` to `end`."""
        context = self.encode(self.teacher, clips, window)
        step = (start - end) / NUM_TEACHER_STEPS
        velocities = []
        for index in range(NUM_TEACHER_STEPS):
            velocities.append(self.velocity(self.teacher, clips, context, frames, start - index * step))
            frames = frames - step[..., None, None, None] * velocities[-1]
        return torch.stack(velocities).mean(dim=0)

    @torch.no_grad()
    def encode(self, model: nn.Module, clips: Clips, window: Tensor) -> FARCache:
        """Keys and values of the clips' frames, all clean, with `window` as the last of them."""
        frames = torch.cat([clips.before, window.to(clips.before.dtype)], dim=1)
        num_before, num_frames = clips.before.shape[1], frames.shape[1]
        cache = self.network.create_cache(len(frames), *frames.shape[-2:])
        timestep = torch.full(frames.shape[:2], CLEAN_TIMESTEP, device=frames.device)
        labels = {"class_labels": clips.class_labels, "actions": clips.actions}
        model(frames, timestep, **labels, cache=cache, num_long_frames=num_before)
        cache.commit([Slot(frame, frame < num_before, frame) for frame in range(num_frames)])
        return cache

    def velocity(
        self,
        model: nn.Module,
        clips: Clips,
        context: FARCache,
        frames: Tensor,
        start: Tensor,
        end: Tensor | None = None,
    ) -> Tensor:
        """`[B, W, C, H, W]` of noisy copies of the window's frames, from levels `start` to `end`.

        Args:
            end: by default `start`: the velocity of the instant.
        """
        window = clips.window
        positions = torch.arange(context.next_position - window, context.next_position, device=frames.device)
        return model(  # the frames are in the cache, too: noisy copies
            frames,
            start * 1000,
            class_labels=clips.class_labels,
            actions=None if clips.actions is None else clips.actions[:, -window:],
            cache=context,
            frame_positions=positions,
            timestep_r=None if end is None else end * 1000,
        ).sample.float()


def draw_noise(clips: Clips, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noise `[B, W, C, H, W]` for the window, and its share `[B, W]` in each frame."""
    window = clips.target
    noise = torch.randn(clips.num_drawn, *window.shape[1:], generator=generator)
    sigmas = sample_sigmas((clips.num_drawn, clips.window), generator)
    return clips.own(noise).to(window.device), clips.own(sigmas).to(window.device)


def chance(probability: float, generator: torch.Generator) -> bool:
    return bool(torch.rand((), generator=generator) < probability)


def noisy_window(
    clips: Clips, noise: Tensor, sigmas: Tensor, clean: Tensor, given: Tensor
) -> tuple[Tensor, Tensor]:
    """What the model gets: latents `[B, F, C, H, W]` and timesteps `[B, F]`.

    Args:
        clean: `[B, W]` bool, frames that are given as they are in `given`.
        given: `[B, W, C, H, W]`.
    """
    noisy = add_noise(clips.target, noise, sigmas)
    window = torch.where(clean[..., None, None, None], given, noisy)
    timestep = torch.where(clean, CLEAN_TIMESTEP, sigmas * 1000)
    before_timestep = timestep.new_full(clips.before.shape[:2], CLEAN_TIMESTEP)
    return torch.cat([clips.before, window], dim=1), torch.cat([before_timestep, timestep], dim=1)


def velocity(model: nn.Module, clips: Clips, hidden_states: Tensor, timestep: Tensor) -> Tensor:
    """What a model predicts for the window, `[B, W, C, H, W]`."""
    return model(hidden_states, timestep, class_labels=clips.class_labels, actions=clips.actions).sample


@torch.no_grad()
def estimate_window(model: nn.Module, clips: Clips, noise: Tensor, sigmas: Tensor) -> Tensor:
    """The window's frames `[B, W, C, H, W]` as a model tells them, each from its noisy version."""
    clean = torch.zeros_like(sigmas, dtype=torch.bool)
    hidden_states, timestep = noisy_window(clips, noise, sigmas, clean, clips.target)
    noisy = hidden_states[:, -clips.window :]
    predicted = velocity(model, clips, hidden_states, timestep)
    return noisy - sigmas[..., None, None, None] * predicted.to(noisy.dtype)
