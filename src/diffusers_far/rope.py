"""Rotary position embedding of queries and keys, in few passes over memory.

A rotation turns the channel pair (a, b) into `(a cos - b sin, b cos + a sin)`: the pair times its cosines,
plus the swapped pair times its sines, the first of which has its sign turned.
"""

import torch
from torch import Tensor

RotaryEmbedding = tuple[Tensor, Tensor]


def signed_rotary(cos: Tensor, sin: Tensor) -> RotaryEmbedding:
    """Cosines and sines `[N, head_dim]` as `rotate` takes them: every first sine of a pair negative."""
    return cos, torch.stack([-sin[:, ::2], sin[:, 1::2]], dim=-1).flatten(1)


def rotate(states: Tensor, rotary: RotaryEmbedding) -> Tensor:
    """Rotate `[B, N, heads, head_dim]`, computed in float32."""
    cos, sin = (table[:, None] for table in rotary)
    pairs = states.float().unflatten(-1, (-1, 2))
    return torch.addcmul(pairs.flatten(-2) * cos, pairs.roll(1, -1).flatten(-2), sin).to(states.dtype)
