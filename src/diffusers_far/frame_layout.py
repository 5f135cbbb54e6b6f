"""How the frames of one forward split into long-term and short-term tokens, and which of them see which.

FAR orders tokens frame by frame: first the long-term frames (few tokens each), then the short-term ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class FrameLayout:
    """Frame and token counts of one token sequence `[long-term frames | short-term frames]`.

    Args:
        num_long_frames: frames with `long_tokens` tokens each (0 for the base model).
        num_short_frames: frames with `short_tokens` tokens each.
        long_tokens: tokens of a long-term frame.
        short_tokens: tokens of a short-term frame.
    """

    num_long_frames: int
    num_short_frames: int
    long_tokens: int
    short_tokens: int

    @property
    def num_frames(self) -> int:
        return self.num_long_frames + self.num_short_frames

    @property
    def num_long_tokens(self) -> int:
        return self.num_long_frames * self.long_tokens

    @property
    def num_tokens(self) -> int:
        return self.num_long_tokens + self.num_short_frames * self.short_tokens

    def per_token(self, per_frame: Tensor) -> Tensor:
        """Repeat `[F]` values of the frames to `[N]` values of their tokens."""
        long, short = per_frame[: self.num_long_frames], per_frame[self.num_long_frames :]
        return torch.cat(
            [long.repeat_interleave(self.long_tokens), short.repeat_interleave(self.short_tokens)]
        )

    def modulate(self, function: Callable[..., Tensor], tokens: Tensor, *per_frame: Tensor) -> Tensor:
        """Apply `function(tokens [B, F, T, D], *per_frame [B, F, 1, D])` to `tokens` `[B, N, D]`.

        The values of a frame are broadcast over its tokens instead of being repeated in memory.
        """
        if self.num_frames == 1:
            return function(tokens, *per_frame)
        if self.num_long_frames == 0:
            frames = tokens.unflatten(1, (self.num_short_frames, self.short_tokens))
            return function(frames, *(value.unsqueeze(2) for value in per_frame)).flatten(1, 2)
        num_long, split = self.num_long_frames, self.num_long_tokens
        long = tokens[:, :split].unflatten(1, (num_long, self.long_tokens))
        long = function(long, *(value[:, :num_long].unsqueeze(2) for value in per_frame)).flatten(1, 2)
        if self.num_short_frames == 0:
            return long
        short = tokens[:, split:].unflatten(1, (self.num_short_frames, self.short_tokens))
        short = function(short, *(value[:, num_long:].unsqueeze(2) for value in per_frame)).flatten(1, 2)
        return torch.cat([long, short], dim=1)

    def token_coordinates(
        self,
        frame_positions: Tensor,
        height: int,
        width: int,
        patch_size: int,
        long_patch_size: int | None,
    ) -> Tensor:
        """RoPE coordinates `[N, 3]` of the tokens, both grids in units of short-term tokens.

        Args:
            frame_positions: `[F]` positions of the frames in the video; fractions interpolate.
            height, width: latent pixels of a frame.
            patch_size, long_patch_size: latent pixels per side of a short-term, a long-term token.
        """
        num_long = self.num_long_frames
        short = token_coordinates(frame_positions[num_long:], height // patch_size, width // patch_size)
        if long_patch_size is None or num_long == 0:
            return short
        grid, stride = (height // long_patch_size, width // long_patch_size), long_patch_size // patch_size
        return torch.cat([token_coordinates(frame_positions[:num_long], *grid, stride), short])


def split_frames(num_frames: int, short_window: int | None) -> tuple[int, int]:
    """Counts of (long-term, short-term) frames: the last `short_window` ones are short-term, None: all."""
    num_short = num_frames if short_window is None else min(num_frames, short_window)
    return num_frames - num_short, num_short


def patchify(frames: Tensor, patch: int) -> Tensor:
    """Features `[B, F * H/p * W/p, C * p * p]` of frames `[B, F, C, H, W]`, in the order (C, p, p)."""
    batch_size, num_frames, channels, height, width = frames.shape
    rows, columns = height // patch, width // patch
    grid = frames.reshape(batch_size, num_frames, channels, rows, patch, columns, patch)
    return grid.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(1, 3)


def unpatchify(tokens: Tensor, patch: int, height: int, width: int) -> Tensor:
    """Frames `[B, F, C, height, width]` of features `[B, F * H/p * W/p, C * p * p]`."""
    batch_size, channels = tokens.shape[0], tokens.shape[2] // patch**2
    grid = tokens.reshape(batch_size, -1, height // patch, width // patch, channels, patch, patch)
    return grid.permute(0, 1, 4, 2, 5, 3, 6).reshape(batch_size, -1, channels, height, width)


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


def attention_mask(
    layout: FrameLayout,
    frame_positions: Tensor,
    context_positions: Tensor | None,
    flex_rope_slope: float,
    dtype: torch.dtype,
) -> Tensor:
    """Frame-causal mask with FlexRoPE's temporal decay.

    A token sees the tokens of its own and of earlier frames. With a slope, its logits get
    `-slope * (query frame - key frame)` on top (FlexRoPE).

    Args:
        layout: of the frames that ask, which are also seen.
        frame_positions: `[F]` their positions in the video.
        context_positions: `[Nc]` frame of each token in the cache, or None.
        flex_rope_slope: decay per frame, 0 or more.
        dtype: dtype of the bias.

    Returns:
        `[1, 1, Nq, Nk]`: True where a key is seen if the slope is 0, else the bias to add to the logits. One
        frame alone has one row (Nq is 1) for all its tokens.
    """
    query_positions = key_positions = layout.per_token(frame_positions)
    if context_positions is not None:
        key_positions = torch.cat([context_positions, key_positions])
    if layout.num_frames == 1:
        query_positions = query_positions[:1]
    distance = query_positions[:, None] - key_positions[None, :]
    if flex_rope_slope == 0:
        return (distance >= 0)[None, None]
    bias = distance.to(dtype) * -flex_rope_slope
    return bias.masked_fill(distance < 0, float("-inf"))[None, None]


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
    multiple = config.long_patch_size or config.patch_size
    if len(shape) != 5 or shape[2] != channels or shape[3] % multiple or shape[4] % multiple:
        takes = f"[B, F, {channels}, H, W] with H and W multiples of {multiple}"
        raise ValueError(f"hidden_states has shape {shape}; it takes {takes}")
    for name, tensor, expected in (
        ("timestep", timestep, shape[:2]),
        ("class_labels", class_labels, shape[:1]),
        ("actions", actions, shape[:2]),
        ("timestep_r", timestep_r, shape[:2]),
        ("frame_positions", frame_positions, shape[1:2]),
    ):
        if tensor is not None and tuple(tensor.shape) != expected:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it takes {expected}")
    if class_labels is not None and not config.num_classes:
        raise ValueError("class_labels given to a model without classes (num_classes=None)")
    if actions is not None and not config.num_actions:
        raise ValueError("actions given to a model without actions (num_actions=None)")
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
