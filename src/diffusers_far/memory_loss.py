"""Which long-term frames a model uses: the loss of a noisy window after right and wrong ones.

The velocity loss of a window whose frames are all noisy at level 0.8, so that little but the long-term
frames before it can tell what it shows. One forward each takes seconds where predictions take minutes: fit
for the log of a training run. Of a model that remembers, `right` is the least, `shuffled` less than `other`.
"""

from typing import Any

import torch
from torch import Tensor

from .flow_matching import CLEAN_TIMESTEP, add_noise, velocity_target
from .transformer_far import FARTransformer3DModel

SIGMA = 0.8  # share of noise in the window
RECENT = 16  # long-term frames that `recent` keeps


def change_long_frames(
    latents: Tensor, actions: Tensor | None, num_long: int, how: str, generator: torch.Generator
) -> tuple[Tensor, Tensor | None]:
    """Videos whose first `num_long` frames, with the actions that led to them, are others; the rest stays.

    Args:
        latents, actions: `[B, F, C, h, w]` and `[B, F]` or None.
        num_long: frames to change, at most F.
        how: "shuffled" permutes them in time, each video in its own way; "other" takes those of the video
            before in the batch (for the first: of the last), which must be of another episode.
        generator: CPU generator of the permutations.

    Raises:
        ValueError: for another `how`, or "other" in a batch of one.
    """
    batch_size = latents.shape[0]
    if how == "shuffled":
        order = torch.stack([torch.randperm(num_long, generator=generator) for _ in range(batch_size)])
        source = (torch.arange(batch_size)[:, None], order)
    elif how == "other":
        if batch_size < 2:
            raise ValueError(
                f"latents: a batch of {batch_size}; other long-term frames take 2 or more videos"
            )
        source = (torch.arange(batch_size).roll(1)[:, None], torch.arange(num_long)[None])
    else:
        raise ValueError(f"how={how!r} takes 'shuffled' or 'other'")
    changed = torch.cat([latents[source], latents[:, num_long:]], dim=1)
    return changed, None if actions is None else torch.cat([actions[source], actions[:, num_long:]], dim=1)


@torch.no_grad()
def window_loss(
    model: FARTransformer3DModel,
    latents: Tensor,
    actions: Tensor | None,
    noise: Tensor,
    sigma: float = SIGMA,
    **arguments: Any,
) -> Tensor:
    """Velocity loss `[B]` of the last frames of videos, equally noisy, after the frames before them.

    Args:
        latents, actions: `[B, F, C, h, w]` and `[B, F]` or None.
        noise: `[B, W, C, h, w]` for the last W frames, at most a window.
        sigma: share of it in them.
        arguments: more of the model's forward.
    """
    window = noise.shape[1]
    clean = latents[:, -window:].float()
    noisy = add_noise(clean, noise, torch.full(clean.shape[:2], sigma, device=clean.device))
    hidden_states = torch.cat([latents[:, :-window], noisy], dim=1)
    timestep = torch.full(hidden_states.shape[:2], CLEAN_TIMESTEP)
    timestep[:, -window:] = 1000 * sigma
    velocity = model(
        hidden_states.to(model.device, model.dtype),
        timestep.to(model.device),
        actions=None if actions is None else actions.to(model.device),
        **arguments,
    ).sample
    error = velocity[:, -window:].float() - velocity_target(clean, noise).to(model.device)
    return error.square().flatten(1).mean(dim=1)


def memory_loss(
    model: FARTransformer3DModel,
    latents: Tensor,
    actions: Tensor | None,
    num_frames: int,
    generator: torch.Generator,
) -> dict[str, float]:
    """Velocity loss of the window of a Long model after some long-term frames.

    Args:
        model: a Long model.
        latents: `[B, F, C, h, w]` scaled latents; each video and the one before it in the batch (the first
            and the last, too) are of different episodes. The first `num_frames` frames are used.
        actions: `[B, F]` that led to the frames, or None.
        num_frames: long-term frames and window together.
        generator: CPU generator of the noise and of the shuffling; the noise is the same for all.

    Returns:
        Mean squared error of the velocity in the window after `right` long-term frames, only the 16 most
        `recent` of them, the right ones `shuffled` in time, those of an `other` episode, and `none`.

    Raises:
        ValueError: for a base model, fewer than 2 videos, or `num_frames` that F does not hold or that leaves
            no long-term frame.
    """
    window = model.short_window
    if window is None:
        raise ValueError("model: a base model (long_patch_size=None) has no long-term frames")
    if not window < num_frames <= latents.shape[1]:
        raise ValueError(
            f"num_frames={num_frames} takes {window + 1} (a window of {window} and a long-term frame) to "
            f"{latents.shape[1]}, the frames of latents"
        )
    num_long = num_frames - window
    latents = latents[:, :num_frames].float()
    actions = None if actions is None else actions[:, :num_frames]
    noise = torch.randn(latents[:, num_long:].shape, generator=generator).to(latents.device)
    videos = {"right": (latents, actions)}
    for name, dropped in (("recent", max(0, num_long - RECENT)), ("none", num_long)):
        videos[name] = (latents[:, dropped:], None if actions is None else actions[:, dropped:])
    for name in ("shuffled", "other"):
        videos[name] = change_long_frames(latents, actions, num_long, name, generator)
    losses = {}
    for name in ("right", "recent", "shuffled", "other", "none"):
        losses[name] = window_loss(model, *videos[name], noise).mean().item()
    return losses
