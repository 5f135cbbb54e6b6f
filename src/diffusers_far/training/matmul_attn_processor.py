"""Attention for training on CPUs with bf16 matrix units (AMX), where it makes a step a quarter faster."""

import torch
from torch import Tensor

from ..attention import FARAttention
from ..kv_cache import LayerCache
from ..matmul_attention import matmul_attention
from ..rope import RotaryEmbedding
from ..tokens import Streams


class MatmulAttnProcessor:
    """The same numbers as `FARAttnProcessor`, from plain matrix products and a complex rotation.

    The backward of PyTorch's fused attention is slow on CPUs, and the rotation of diffusers takes ten passes
    over memory. The price is that the attention weights `[B * heads, N, N]` are kept, which is little for
    clips of a few hundred tokens.
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: FARAttention,
        streams: Streams,
        image_rotary_emb: RotaryEmbedding,
        attention_mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Streams:
        if attention_mask is None or attention_mask.dtype != torch.bool:
            raise ValueError("attention='matmul' is for training: it takes several frames and no FlexRoPE")
        query, key, value = attn.project(streams)  # each [B, N, heads, head_dim]
        cos, sin = image_rotary_emb
        rotation = torch.complex(cos[:, 1::2], sin[:, 1::2])[:, None]  # [N, 1, head_dim / 2]
        query, key = _rotate(query, rotation), _rotate(key, rotation)

        if cache is not None:
            key, value = cache.extend(key, value)
        bias = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill(~attention_mask, -torch.inf)
        attended = matmul_attention(query, key, value, bias).flatten(2, 3)  # [B, N, D]
        return attn.project_out(attended, streams)


def _rotate(states: Tensor, rotation: Tensor) -> Tensor:
    pairs = torch.view_as_complex(states.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2).to(states.dtype)
