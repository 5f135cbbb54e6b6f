"""Attention for training on CPUs with bf16 matrix units (AMX), where it makes a step a quarter faster."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from diffusers_far.attention import FARAttention
from diffusers_far.kv_cache import LayerCache
from diffusers_far.matmul_attention import matmul_attention
from diffusers_far.rope import RotaryEmbedding


class MatmulAttnProcessor:
    """The same numbers as `FARAttnProcessor`, from plain matrix products and a complex rotation.

    The backward of PyTorch's fused attention is slow on CPUs, and the rotation of diffusers takes ten passes
    over memory. The price is that the attention weights `[B * heads, N, N]` are kept, which is little for
    clips of a few hundred tokens.
    """

    _attention_backend = None
    _parallel_config = None
    _num_copies: int | None = None

    @contextmanager
    def copies(self, num_frames: int) -> Iterator[None]:
        """The frames that ask are noisy copies of the cache's last `num_frames`.

        Each sees the frames before the one that it is a copy of, and itself; not the other copies.
        """
        self._num_copies = num_frames
        try:
            yield
        finally:
            self._num_copies = None

    def __call__(
        self,
        attn: FARAttention,
        hidden_states: Tensor,
        image_rotary_emb: RotaryEmbedding,
        num_long_tokens: int = 0,
        attention_mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        if attention_mask is None or attention_mask.dtype != torch.bool:
            raise ValueError("attention='matmul' is for training: it takes several frames and no FlexRoPE")
        query, key, value = attn.project(hidden_states, num_long_tokens)  # each [B, N, heads, head_dim]
        cos, sin = image_rotary_emb
        rotation = torch.complex(cos[:, 1::2], sin[:, 1::2])[:, None]  # [N, 1, head_dim / 2]
        query, key = _rotate(query, rotation), _rotate(key, rotation)

        if cache is not None and self._num_copies is None:
            key, value = cache.extend(key, value)
        if cache is not None and self._num_copies is not None:
            # Joined, as a gradient cannot pass through the buffers of the cache.
            old_key, old_value = (buffer[:, : cache.num_tokens] for buffer in (cache.keys, cache.values))
            key, value = torch.cat([old_key, key], dim=1), torch.cat([old_value, value], dim=1)
            attention_mask = copies_mask(self._num_copies, query.shape[1], key.shape[1], query.device)
        bias = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill(~attention_mask, -torch.inf)
        attended = matmul_attention(query, key, value, bias).flatten(2, 3)  # [B, N, D]
        return attn.project_out(attended, num_long_tokens)


def copies_mask(num_frames: int, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """`[1, 1, num_queries, num_keys]`, True where a key is seen: old frames, their last ones, the copies."""
    frames = torch.arange(num_frames, device=device).repeat_interleave(num_queries // num_frames)
    old = torch.ones(num_queries, num_keys - 2 * num_queries, dtype=torch.bool, device=device)
    last, copies = frames[:, None] > frames, frames[:, None] == frames
    return torch.cat([old, last, copies], dim=1)[None, None]


def _rotate(states: Tensor, rotation: Tensor) -> Tensor:
    pairs = torch.view_as_complex(states.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2).to(states.dtype)
