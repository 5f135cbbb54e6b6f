"""Frames as tokens: the two streams, their places, and the checks of a forward.

FAR orders frames in time: first the long-term ones (few tokens each), then the short-term ones. Each kind is
a stream `[B, F, T, D]` of its own, with T tokens for each of its F frames; attention joins them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .actions import ActionSpace

Streams = list[Tensor]  # the short-term stream alone, or the long-term one before it


def split_frames(num_frames: int, short_window: int | None) -> tuple[int, int]:
    """Counts of (long-term, short-term) frames: the last `short_window` ones are short-term, None: all."""
    num_short = num_frames if short_window is None else min(num_frames, short_window)
    return num_frames - num_short, num_short


def per_stream(per_frame: Tensor, streams: Streams) -> list[Tensor]:
    """Values `[B, F, ...]` of all frames as `[B, F, 1, ...]` of each stream, to broadcast over tokens."""
    if len(streams) == 1:
        return [per_frame.unsqueeze(2)]
    return list(per_frame.unsqueeze(2).split([stream.shape[1] for stream in streams], dim=1))


def per_token(per_frame: Tensor, streams: Streams) -> Tensor:
    """`[N]` values of all tokens from `[F]` values of their frames."""
    counts = [stream.shape[1] for stream in streams]
    parts = zip(per_frame.split(counts), streams, strict=True)
    return torch.cat([values.repeat_interleave(stream.shape[2]) for values, stream in parts])


def patchify(frames: Tensor, patch: int) -> Tensor:
    """Features `[B, F, H/p * W/p, C * p * p]` of frames `[B, F, C, H, W]`, in the order (C, p, p)."""
    batch_size, num_frames, channels, height, width = frames.shape
    rows, columns = height // patch, width // patch
    grid = frames.reshape(batch_size, num_frames, channels, rows, patch, columns, patch)
    return grid.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(2, 3)


def unpatchify(tokens: Tensor, patch: int, height: int, width: int) -> Tensor:
    """Frames `[B, F, C, height, width]` of features `[B, F, H/p * W/p, C * p * p]`."""
    batch_size, num_frames, channels = *tokens.shape[:2], tokens.shape[3] // patch**2
    grid = tokens.reshape(batch_size, num_frames, height // patch, width // patch, channels, patch, patch)
    return grid.permute(0, 1, 4, 2, 5, 3, 6).reshape(batch_size, num_frames, channels, height, width)


def token_coordinates(frame_positions: Tensor, height: int, width: int, stride: int = 1) -> Tensor:
    """RoPE coordinates (frame, row, column) of the tokens of some frames.

    Args:
        frame_positions: `[F]` positions of the frames in the video; fractions interpolate.
        height, width: token grid of a frame.
        stride: distance between neighbouring tokens in units of the short-term grid, so that a coarse
            long-term grid shares the coordinates of the fine one (section 3.3 of the paper).

    Returns:
        `[F * height * width, 3]` float coordinates.
    """
    device = frame_positions.device
    rows = torch.arange(height, device=device, dtype=torch.float32) * stride
    columns = torch.arange(width, device=device, dtype=torch.float32) * stride
    return torch.cartesian_prod(frame_positions.float(), rows, columns)


def check_inputs(
    config: Any,
    hidden_states: Tensor,
    timestep: Tensor,
    class_labels: Tensor | None,
    actions: Tensor | None,
    timestep_r: Tensor | None,
    frame_positions: Tensor | None,
    num_long_frames: int | None,
    modulation: Sequence[Tensor] | None,
) -> None:
    """Raise a ValueError for a forward whose shapes do not fit each other or the model's `config`."""
    shape, channels = tuple(hidden_states.shape), config.in_channels
    multiple, space = config.long_patch_size or config.patch_size, ActionSpace.of(config)
    if len(shape) != 5 or shape[2] != channels or shape[3] % multiple or shape[4] % multiple:
        takes = f"[B, F, {channels}, H, W] with H and W multiples of {multiple}"
        raise ValueError(f"hidden_states has shape {shape}; it takes {takes}")
    for name, tensor, expected in (
        ("timestep", timestep, shape[:2]),
        ("class_labels", class_labels, shape[:1]),
        ("actions", actions, shape[:2] + (() if space is None else space.shape)),
        ("timestep_r", timestep_r, shape[:2]),
        ("frame_positions", frame_positions, shape[1:2]),
    ):
        if tensor is not None and tuple(tensor.shape) != expected:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it takes {expected}")
    if class_labels is not None and not config.num_classes:
        raise ValueError("class_labels given to a model without classes (num_classes=None)")
    if actions is not None and space is None:
        raise ValueError("actions given to a model without actions (num_actions=None, action_dim=None)")
    if actions is not None and space is not None and actions.is_floating_point() != space.is_vector:
        takes = "floats" if space.is_vector else "integers"
        raise ValueError(f"actions has dtype {actions.dtype}; a model of {space} actions takes {takes}")
    if timestep_r is not None and not config.use_meanflow:
        raise ValueError("timestep_r given to a model of velocities at an instant (use_meanflow=False)")
    if modulation is not None and (num_long_frames or tuple(modulation[-1].shape[:2]) != shape[:2]):
        found = f"{tuple(modulation[-1].shape[:2])} with num_long_frames={num_long_frames}"
        raise ValueError(f"modulation is of frames {found}; it takes {shape[:2]}, none of them long-term")
    if num_long_frames and config.long_patch_size is None:
        raise ValueError(
            f"num_long_frames={num_long_frames}: a base model (long_patch_size=None) has only short ones"
        )
    if num_long_frames is not None and not 0 <= num_long_frames <= shape[1]:
        raise ValueError(f"num_long_frames={num_long_frames} must be 0 to {shape[1]}, the frames given")
