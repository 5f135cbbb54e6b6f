"""Keys and values of the context: what makes a new frame cost the same however the context was made.

Two levels, as in section 3.4 of the paper: long-term frames (few tokens each, encoded once) and short-term
frames. One buffer per layer holds `[context | scratch]`, the context frame by frame. A forward writes its own
keys and values into the scratch behind the context and attends to everything up to there, so nothing is
concatenated; `append` then makes scratch part of the context. Keys are stored after RoPE, hence the order of
frames is free.
"""

from collections.abc import Iterable
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor


class Slot(NamedTuple):
    """A frame of the context: its position in the video, and its level."""

    frame: int
    is_long: bool


class LayerCache:
    """Keys and values `[B, capacity, heads, head_dim]` of one layer; the first `num_tokens` are context."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys = keys
        self.values = values
        self.num_tokens = 0

    def move(self, tokens: slice, start: int) -> None:
        """Copy the given tokens to the place from `start` on, which may overlap theirs."""
        end = start + tokens.stop - tokens.start
        for buffer in (self.keys, self.values):
            buffer[:, start:end] = buffer[:, tokens].clone()

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write `[B, N, heads, head_dim]` behind the context; return context and new tokens as one view."""
        end = self.num_tokens + key.shape[1]
        self.keys[:, self.num_tokens : end] = key
        self.values[:, self.num_tokens : end] = value
        return self.keys[:, :end], self.values[:, :end]


class FARCache:
    """Two-level cache of a FAR rollout.

    The model only reads the context (and uses the scratch behind it); the verbs below are the caller's.
    Frames are named by their position in the video.

    Args:
        num_layers: layers of the model.
        batch_size: sequences, guidance included (twice the videos for two-sided guidance).
        num_heads: attention heads.
        head_dim: channels of a head.
        short_tokens: tokens of a short-term frame.
        long_tokens: tokens of a long-term frame; 0 for a base model, which has none.
        dtype, device: of the buffers.
        block_tokens: buffers grow by multiples of so many tokens.
    """

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        num_heads: int,
        head_dim: int,
        short_tokens: int,
        long_tokens: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        block_tokens: int = 512,
    ) -> None:
        # Head by head in memory, as attention reads it, under a view with the axes of diffusers.
        empty = torch.empty(batch_size, num_heads, 0, head_dim, dtype=dtype, device=device).transpose(1, 2)
        self.layers = [LayerCache(empty, empty) for _ in range(num_layers)]
        self.short_tokens = short_tokens
        self.long_tokens = long_tokens
        self.block_tokens = block_tokens
        self.slots: list[Slot] = []  # in the order of the buffers
        self.num_tokens = 0
        self.reserve(1)
        self._sync()

    @property
    def num_frames(self) -> int:
        """Frames of context."""
        return len(self.slots)

    @property
    def long_frames(self) -> list[int]:
        """Long-term frames of the context."""
        return [slot.frame for slot in self.slots if slot.is_long]

    @property
    def short_frames(self) -> list[int]:
        """Short-term frames of the context."""
        return [slot.frame for slot in self.slots if not slot.is_long]

    @property
    def num_bytes(self) -> int:
        """Memory of all buffers, scratch included."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers)

    def key_positions(self, device: torch.device) -> Tensor:
        """`[num_tokens]` frame of each context token."""
        return self._key_positions.to(device)

    def reserve(self, num_tokens: int) -> None:
        """Make room for `num_tokens` tokens of scratch behind the context."""
        needed = self.num_tokens + num_tokens
        if needed <= self.layers[0].keys.shape[1]:
            return
        capacity = -(-needed // self.block_tokens) * self.block_tokens
        for layer in self.layers:  # one after another: only one layer is ever held twice
            layer.keys = self._grown(layer.keys, capacity)
            layer.values = self._grown(layer.values, capacity)

    def _grown(self, buffer: Tensor, capacity: int) -> Tensor:
        batch_size, _, num_heads, head_dim = buffer.shape
        grown = buffer.new_zeros(batch_size, num_heads, capacity, head_dim).transpose(1, 2)
        grown[:, : self.num_tokens] = buffer[:, : self.num_tokens]
        return grown

    def append(self, long_frames: Iterable[int] = (), short_frames: Iterable[int] = ()) -> None:
        """Make the last forward's frames, in its order, part of the context."""
        self.slots += [Slot(frame, is_long=True) for frame in long_frames]
        self.slots += [Slot(frame, is_long=False) for frame in short_frames]
        self._sync()

    def drop_long(self, frame: int) -> None:
        """Forget one long-term frame. Frames that saw it stay as they are."""
        self._drop(Slot(frame, is_long=True))
        self._sync()

    def drop_short(self, frame: int) -> None:
        """Forget one short-term frame. Frames that saw it stay as they are."""
        self._drop(Slot(frame, is_long=False))
        self._sync()

    def clear_short(self) -> None:
        """Forget the short-term level."""
        for frame in reversed(self.short_frames):
            self._drop(Slot(frame, is_long=False))
        self._sync()

    def _drop(self, slot: Slot) -> None:
        frames = self.long_frames if slot.is_long else self.short_frames
        if slot.frame not in frames:
            raise ValueError(f"frame={slot.frame} is not in the cache, which holds {frames}")
        hole, last = self.slots.index(slot), self.slots.index(Slot(frames[-1], slot.is_long))
        ends = list(accumulate(self._sizes()))
        size = self.long_tokens if slot.is_long else self.short_tokens
        # The last frame of this level moves into the hole, and what lies behind that frame moves up.
        for layer in self.layers:
            if hole < last:
                layer.move(slice(ends[last] - size, ends[last]), ends[hole] - size)
            if ends[last] < ends[-1]:
                layer.move(slice(ends[last], ends[-1]), ends[last] - size)
        self.slots[hole] = self.slots[last]
        del self.slots[last]

    def _sizes(self) -> list[int]:
        return [self.long_tokens if slot.is_long else self.short_tokens for slot in self.slots]

    def reset(self) -> None:
        """Forget all frames and keep the buffers."""
        self.slots = []
        self._sync()

    def _sync(self) -> None:
        # Numbers and a tensor: a compiled forward that read the lists would be compiled anew every frame.
        frames, sizes = [slot.frame for slot in self.slots], self._sizes()
        self.num_tokens = sum(sizes)  # of context
        self.next_frame = max(frames, default=-1) + 1  # after the latest one
        positions, repeats = torch.tensor([frames, sizes], dtype=torch.long)
        positions = positions.repeat_interleave(repeats, output_size=self.num_tokens)
        self._key_positions = positions.to(self.layers[0].keys.device)
        # A compiled forward takes any number of tokens from the start, instead of one number and then any.
        torch._dynamo.maybe_mark_dynamic(self._key_positions, 0)
        for layer in self.layers:
            layer.num_tokens = self.num_tokens
            torch._dynamo.maybe_mark_dynamic(layer.keys, 1)
            torch._dynamo.maybe_mark_dynamic(layer.values, 1)
