"""Keys and values of the context: what makes a new frame cost the same however the context was made.

Two levels, as in section 3.4 of the paper: long-term frames (few tokens each, encoded once) and short-term
frames. One buffer per layer holds `[long-term frames | short-term frames | scratch]`. A forward writes its
own keys and values into the scratch behind the context and attends to everything up to there, so nothing is
concatenated; `append` then makes scratch part of the context. Keys are stored after RoPE, hence the order of
frames inside a level is free.
"""

from collections.abc import Iterable

import torch
from torch import Tensor


class LayerCache:
    """Keys and values `[B, capacity, heads, head_dim]` of one layer; the first `num_tokens` are context."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys = keys
        self.values = values
        self.num_tokens = 0

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
        self.long_frames: list[int] = []
        self.short_frames: list[int] = []
        self.num_tokens = 0
        self.reserve(1)
        self._sync()

    @property
    def num_frames(self) -> int:
        """Frames of context."""
        return len(self.long_frames) + len(self.short_frames)

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
        """Make the last forward's frames, in its order, part of the context.

        Raises:
            ValueError: when long-term frames are appended behind short-term ones; `clear_short` first.
        """
        long_frames = list(long_frames)
        if long_frames and self.short_frames:
            raise ValueError(
                f"long_frames={long_frames} cannot follow the short-term frames {self.short_frames}: call "
                "clear_short() first"
            )
        self.long_frames += long_frames
        self.short_frames += short_frames
        self._sync()

    def drop_long(self, frame: int) -> None:
        """Forget one long-term frame. The short-term frames, which saw it, must have been cleared."""
        if self.short_frames:
            raise ValueError(f"frame={frame}: call clear_short() before a long-term frame is dropped")
        self._drop(self.long_frames, self.long_tokens, frame)

    def drop_short(self, frame: int) -> None:
        """Forget one short-term frame (sliding window of a base model)."""
        self._drop(self.short_frames, self.short_tokens, frame)

    def _drop(self, frames: list[int], tokens: int, frame: int) -> None:
        if frame not in frames:
            raise ValueError(f"frame={frame} is not in the cache, which holds {frames}")
        slot = frames.index(frame)
        end = self.num_tokens
        # The last frame moves into the hole: order does not matter, and no other frame is touched.
        if slot < len(frames) - 1:
            start = end - len(frames) * tokens + slot * tokens
            for layer in self.layers:
                layer.keys[:, start : start + tokens] = layer.keys[:, end - tokens : end]
                layer.values[:, start : start + tokens] = layer.values[:, end - tokens : end]
        frames[slot] = frames[-1]
        frames.pop()
        self._sync()

    def clear_short(self) -> None:
        """Forget the short-term level: the window is encoded anew after the long-term level has changed."""
        self.short_frames = []
        self._sync()

    def reset(self) -> None:
        """Forget all frames and keep the buffers."""
        self.long_frames = []
        self.clear_short()

    def _sync(self) -> None:
        # Numbers and a tensor: a compiled forward that read the lists would be compiled anew every frame.
        num_long, num_short = len(self.long_frames), len(self.short_frames)
        self.num_tokens = num_long * self.long_tokens + num_short * self.short_tokens  # of context
        self.next_frame = max(self.long_frames + self.short_frames, default=-1) + 1  # after the latest one
        device = self.layers[0].keys.device
        long = torch.tensor(self.long_frames, device=device, dtype=torch.long)
        short = torch.tensor(self.short_frames, device=device, dtype=torch.long)
        self._key_positions = torch.cat(
            [long.repeat_interleave(self.long_tokens), short.repeat_interleave(self.short_tokens)]
        )
        # A compiled forward takes any number of tokens from the start, instead of one number and then any.
        torch._dynamo.maybe_mark_dynamic(self._key_positions, 0)
        for layer in self.layers:
            layer.num_tokens = self.num_tokens
            torch._dynamo.maybe_mark_dynamic(layer.keys, 1)
            torch._dynamo.maybe_mark_dynamic(layer.values, 1)
