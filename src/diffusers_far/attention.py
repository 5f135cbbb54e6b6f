"""Attention of FAR: normalised, rotated queries and keys, own projections of long-term tokens, a cache."""

from collections.abc import Callable

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from .kv_cache import LayerCache
from .matmul_attention import matmul_attention
from .rope import RotaryEmbedding, rotate


class FARAttnProcessor:
    """Joint attention of long-term and short-term tokens over the context in the cache and themselves."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "FARAttention",
        hidden_states: Tensor,
        image_rotary_emb: RotaryEmbedding,
        num_long_tokens: int = 0,
        attention_mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        query, key, value = attn.project(hidden_states, num_long_tokens)  # each [B, N, heads, head_dim]
        query, key = rotate(torch.cat([query, key], dim=2), image_rotary_emb).chunk(2, dim=2)
        if cache is not None:
            key, value = cache.extend(key, value)
        one_frame = attention_mask is None or attention_mask.shape[-2] == 1
        exact_on_cpu = query.device.type == "cpu" and query.dtype == torch.float32
        if self._attention_backend is None and one_frame and exact_on_cpu:
            hidden_states = matmul_attention(query, key, value, attention_mask)
        else:
            backend, parallel_config = self._attention_backend, self._parallel_config
            hidden_states = dispatch_attention_fn(
                query, key, value, attention_mask, backend=backend, parallel_config=parallel_config
            )
        return attn.project_out(hidden_states.flatten(2, 3).to(query.dtype), num_long_tokens)


class FARAttention(nn.Module, AttentionModuleMixin):
    """Attention with RMS-normalised queries and keys and own projections for long-term tokens.

    Args:
        dim: D.
        heads, dim_head: attention heads and their channels; `heads * dim_head == dim`.
        long_context: give long-term tokens projections of their own (section 3.3).
        long_context_out: whether the long-term tokens are read after this layer; False in the last one.
    """

    _default_processor_cls = FARAttnProcessor
    _available_processors = [FARAttnProcessor]
    processor: Callable[..., Tensor]
    to_qkv: nn.Linear  # these two are made by fuse_projections
    to_added_qkv: nn.Linear

    def __init__(
        self, dim: int, heads: int, dim_head: int, long_context: bool = False, long_context_out: bool = True
    ) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = dim_head
        self.use_bias = True
        self.added_proj_bias = True
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.norm_q = nn.RMSNorm(dim_head, eps=1e-6)
        self.norm_k = nn.RMSNorm(dim_head, eps=1e-6)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.long_context = long_context
        self.to_add_out = nn.Linear(dim, dim) if long_context and long_context_out else None
        if long_context:
            self.add_q_proj = nn.Linear(dim, dim)
            self.add_k_proj = nn.Linear(dim, dim)
            self.add_v_proj = nn.Linear(dim, dim)
            self.norm_added_q = nn.RMSNorm(dim_head, eps=1e-6)
            self.norm_added_k = nn.RMSNorm(dim_head, eps=1e-6)
        self.processor = self._default_processor_cls()

    def project(self, hidden_states: Tensor, num_long_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value `[B, N, heads, head_dim]` of tokens `[B, N, D]`."""
        fused = self.fused_projections
        short_linears = [self.to_qkv] if fused else [self.to_q, self.to_k, self.to_v]
        short_norms = (self.norm_q, self.norm_k)
        if num_long_tokens == 0:
            return self._project(hidden_states, short_linears, *short_norms)
        long_linears = [self.to_added_qkv] if fused else [self.add_q_proj, self.add_k_proj, self.add_v_proj]
        long_norms = (self.norm_added_q, self.norm_added_k)
        long = self._project(hidden_states[:, :num_long_tokens], long_linears, *long_norms)
        short = self._project(hidden_states[:, num_long_tokens:], short_linears, *short_norms)
        query, key, value = (torch.cat(pair, dim=1) for pair in zip(long, short, strict=True))
        return query, key, value

    def _project(
        self, tokens: Tensor, linears: list[nn.Linear], norm_q: nn.Module, norm_k: nn.Module
    ) -> tuple[Tensor, Tensor, Tensor]:
        projected = [part for linear in linears for part in linear(tokens).chunk(3 // len(linears), dim=-1)]
        query, key, value = (tensor.unflatten(-1, (-1, self.head_dim)) for tensor in projected)
        return norm_q(query), norm_k(key), value

    def project_out(self, hidden_states: Tensor, num_long_tokens: int) -> Tensor:
        """Output projection `[B, N, D]`; long-term tokens pass as they are where nothing reads them."""
        if num_long_tokens == 0:
            return self.to_out[0](hidden_states)
        long, short = hidden_states[:, :num_long_tokens], hidden_states[:, num_long_tokens:]
        if self.to_add_out is not None:
            long = self.to_add_out(long)
        return torch.cat([long, self.to_out[0](short)], dim=1)

    def forward(
        self,
        hidden_states: Tensor,
        image_rotary_emb: RotaryEmbedding,
        num_long_tokens: int = 0,
        attention_mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        return self.processor(self, hidden_states, image_rotary_emb, num_long_tokens, attention_mask, cache)
