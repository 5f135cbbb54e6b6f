"""Keys and values of the context: what makes a new frame cost the same however the context was made.

Two levels, as in section 3.4 of the paper: long-term frames (few tokens each, encoded once) and short-term
frames. One buffer per layer holds `[context | scratch]`, the context frame by frame. A forward writes its own
keys and values into the scratch behind the context and attends to everything up to there, so nothing is
concatenated; `commit` then makes scratch part of the context. Keys are stored after RoPE, hence the order of
frames is free.
"""

import copy
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor


class Slot(NamedTuple):
    """A frame of the context: its index in the video, its level, and the place in time that RoPE gives it."""

    frame: int
    is_long: bool
    position: int


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
        """Write `[B, N, heads, head_dim]` behind the context; return context and new tokens together."""
        start, end = self.num_tokens, self.num_tokens + key.shape[1]
        self.keys[:, start:end] = key.detach()
        self.values[:, start:end] = value.detach()
        if torch.is_grad_enabled() and key.requires_grad:  # a gradient cannot pass through the buffers
            context = self.keys[:, :start].clone(), self.values[:, :start].clone()
            return torch.cat([context[0], key], dim=1), torch.cat([context[1], value], dim=1)
        return self.keys[:, :end], self.values[:, :end]


class FARCache:
    """Two-level cache of a FAR rollout.

    The model only reads the context (and uses the scratch behind it); the verbs below are the caller's.
    Before a frame is made, `reconcile` drops what is no longer context and tells what is missing; a forward
    computes that, and `commit` keeps it.

    Args:
        num_layers: layers of the model.
        batch_size: sequences, guidance included (twice the videos for two-sided guidance).
        num_heads: attention heads.
        head_dim: channels of a head.
        short_tokens: tokens of a short-term frame.
        long_tokens: tokens of a long-term frame; 0 for a base model, which has none.
        dtype, device: of the buffers.
        block_tokens: buffers grow by multiples of so many tokens, and are never full.
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
        self._scratch: tuple[int, int] | None = None  # long-term and short-term frames of the last forward
        self.num_tokens = 0
        self._reserve(1)
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
        """`[num_tokens]` place in time of each context token."""
        return self._key_positions.to(device)

    def begin(self, num_long_frames: int, num_short_frames: int) -> None:
        """Make room for the frames of a forward behind the context; the model calls it."""
        self._scratch = (num_long_frames, num_short_frames)
        self._reserve(num_long_frames * self.long_tokens + num_short_frames * self.short_tokens)

    def _reserve(self, num_tokens: int) -> None:
        needed = self.num_tokens + num_tokens
        if needed < self.layers[0].keys.shape[1]:
            return
        # Never full: a compiled forward would be compiled anew where context and frame are all of the buffer.
        capacity = (needed // self.block_tokens + 1) * self.block_tokens
        with torch.inference_mode(False):  # so that a rollout begun under inference mode can go on outside
            for layer in self.layers:  # one after another: only one layer is ever held twice
                layer.keys = self._grown(layer.keys, capacity)
                layer.values = self._grown(layer.values, capacity)

    def _grown(self, buffer: Tensor, capacity: int) -> Tensor:
        batch_size, _, num_heads, head_dim = buffer.shape
        grown = buffer.new_zeros(batch_size, num_heads, capacity, head_dim).transpose(1, 2)
        grown[:, : self.num_tokens] = buffer[:, : self.num_tokens]
        return grown

    def reconcile(self, context: Sequence[Slot]) -> list[Slot]:
        """Forget what is not in `context`; return what is missing of it, in its order.

        Frames that saw a forgotten one stay as they are.
        """
        wanted = set(context)
        for slot in [slot for slot in self.slots if slot not in wanted]:
            self._drop(slot)
        self._sync()
        held = set(self.slots)
        return [slot for slot in context if slot not in held]

    def commit(self, slots: Iterable[Slot]) -> None:
        """Make the first frames of the last forward part of the context.

        Args:
            slots: these frames, in the order of the forward: long-term ones first.

        Raises:
            ValueError: when the last forward did not hold them, or they are context already.
        """
        slots = list(slots)
        num_long = sum(slot.is_long for slot in slots)
        num_short, scratch = len(slots) - num_long, self._scratch or (0, 0)
        in_order = all(slot.is_long for slot in slots[:num_long])
        fits = num_long == scratch[0] and num_short <= scratch[1] if num_short else num_long <= scratch[0]
        if not in_order or not fits:
            raise ValueError(
                f"slots={slots} are not the first frames of the last forward, which held {scratch[0]} "
                f"long-term and {scratch[1]} short-term frames that are not context yet"
            )
        if held := {slot.frame for slot in slots} & {slot.frame for slot in self.slots}:
            raise ValueError(f"slots={slots}: frames {sorted(held)} are in the cache already")
        self.slots += slots
        self._scratch = None
        self._sync()

    def clear_short(self) -> None:
        """Forget the short-term level."""
        for slot in [slot for slot in reversed(self.slots) if not slot.is_long]:
            self._drop(slot)
        self._sync()

    def copy(self) -> "FARCache":
        """A cache of the same context that shares nothing with this one."""
        copied = copy.copy(self)
        copied.slots, copied._scratch = list(self.slots), None
        with torch.inference_mode(False):
            copied.layers = [LayerCache(layer.keys.clone(), layer.values.clone()) for layer in self.layers]
        copied._sync()
        return copied

    def state_dict(self) -> dict[str, Tensor]:
        """The context: `slots` `[F, 3]`, `keys` and `values` `[layers, B, tokens, heads, head_dim]`."""
        keys, values = (
            torch.stack([getattr(layer, part)[:, : self.num_tokens] for layer in self.layers])
            for part in ("keys", "values")
        )
        slots = torch.tensor(self.slots, dtype=torch.long).view(-1, 3)
        return {"slots": slots, "keys": keys, "values": values}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Hold the context of `state_dict`.

        Raises:
            ValueError: for that of another model, or of another number of sequences.
        """
        keys, buffer = state["keys"], self.layers[0].keys
        found = (keys.shape[0], keys.shape[1], *keys.shape[3:])
        takes = (len(self.layers), buffer.shape[0], *buffer.shape[2:])
        slots = [Slot(frame, bool(is_long), position) for frame, is_long, position in state["slots"].tolist()]
        self.reset()
        self.begin(sum(slot.is_long for slot in slots), sum(not slot.is_long for slot in slots))
        num_tokens = sum(self.long_tokens if slot.is_long else self.short_tokens for slot in slots)
        if found != takes or keys.shape[2] != num_tokens:
            raise ValueError(
                f"state has keys {list(keys.shape)} of {len(slots)} frames; this cache takes {list(takes)} "
                f"(layers, sequences, heads, channels) with {num_tokens} tokens"
            )
        for layer, key, value in zip(self.layers, keys, state["values"], strict=True):
            layer.extend(key.to(buffer.device), value.to(buffer.device))
        self.slots = slots
        self._scratch = None
        self._sync()

    def _drop(self, slot: Slot) -> None:
        hole = self.slots.index(slot)
        last = max(index for index, other in enumerate(self.slots) if other.is_long == slot.is_long)
        ends = list(accumulate(self.token_counts))
        size = self.long_tokens if slot.is_long else self.short_tokens
        # The last frame of this level moves into the hole, and what lies behind that frame moves up.
        for layer in self.layers:
            if hole < last:
                layer.move(slice(ends[last] - size, ends[last]), ends[hole] - size)
            if ends[last] < ends[-1]:
                layer.move(slice(ends[last], ends[-1]), ends[last] - size)
        self.slots[hole] = self.slots[last]
        del self.slots[last]

    @property
    def token_counts(self) -> list[int]:
        """Tokens of each of `slots`."""
        return [self.long_tokens if slot.is_long else self.short_tokens for slot in self.slots]

    def reset(self) -> None:
        """Forget all frames and keep the buffers."""
        self.slots, self._scratch = [], None
        self._sync()

    def _sync(self) -> None:
        # Numbers and a tensor: a compiled forward that read the lists would be compiled anew every frame.
        places, sizes = [slot.position for slot in self.slots], self.token_counts
        self.num_tokens = sum(sizes)  # of context
        self.next_position = max(places, default=-1) + 1  # after the latest one
        positions, repeats = torch.tensor([places, sizes], dtype=torch.long)
        positions = positions.repeat_interleave(repeats, output_size=self.num_tokens)
        self._key_positions = positions.to(self.layers[0].keys.device)
        torch._dynamo.maybe_mark_dynamic(self._key_positions, 0)
        for layer in self.layers:
            layer.num_tokens = self.num_tokens
        self.allow_any_number_of_tokens()

    def allow_any_number_of_tokens(self) -> None:
        """Let a compiled forward take buffers of any size at once, instead of this one and then any other."""
        for layer in self.layers:
            torch._dynamo.maybe_mark_dynamic(layer.keys, 1)
            torch._dynamo.maybe_mark_dynamic(layer.values, 1)
