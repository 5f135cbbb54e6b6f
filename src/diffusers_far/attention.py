"""Attention of FAR: normalised, rotated queries and keys, own projections of long-term tokens, a cache."""

from collections.abc import Callable

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from torch import Tensor, nn

from .hook_registry import RefusesCaching
from .kv_cache import LayerCache
from .matmul_attention import matmul_attention
from .rope import RotaryEmbedding, rotate
from .tokens import Streams


def attention_mask(
    positions: Tensor,
    context_positions: Tensor | None,
    flex_rope_slope: float,
    dtype: torch.dtype,
    one_frame: bool,
) -> Tensor:
    """Which tokens see which, with FlexRoPE's temporal decay.

    A frame sees itself and, of every earlier frame, the cached version where there is one, else the one in
    this forward. With a slope, its logits get `-slope * (query frame - key frame)` on top (FlexRoPE).

    Args:
        positions: `[N]` place in time of each token of this forward.
        context_positions: `[Nc]` place in time of each token in the cache, or None.
        flex_rope_slope: decay per frame, 0 or more.
        dtype: dtype of the bias.
        one_frame: whether all tokens are of one frame: then one row serves them all.

    Returns:
        `[1, 1, N or 1, Nc + N]`: True where a key is seen if the slope is 0, else the bias of the logits.
    """
    queries = positions[:1] if one_frame else positions
    seen = positions <= queries[:, None]
    distance = queries[:, None] - positions
    if context_positions is not None:
        cached = (positions[:, None] == context_positions).any(dim=1)
        seen &= (positions == queries[:, None]) | ~cached
        seen = torch.cat([context_positions < queries[:, None], seen], dim=1)
        distance = torch.cat([queries[:, None] - context_positions, distance], dim=1)
    if flex_rope_slope == 0:
        return seen[None, None]
    return (distance.to(dtype) * -flex_rope_slope).masked_fill(~seen, float("-inf"))[None, None]


# The backends that apply any mask as it is. The others refuse masks, see but one row of them, or take a mask
# of booleans or a bias for something else.
MASKED_BACKENDS = (
    AttentionBackendName.NATIVE,
    AttentionBackendName._NATIVE_CUDNN,
    AttentionBackendName._NATIVE_EFFICIENT,
    AttentionBackendName._NATIVE_MATH,
    AttentionBackendName.FLEX,
)


def check_backend(backend: AttentionBackendName) -> None:
    """Raise a ValueError for an attention backend that would lose the mask of which frame sees which."""
    if backend not in MASKED_BACKENDS:
        takes = ", ".join(each.value for each in MASKED_BACKENDS)
        raise ValueError(
            f"attention backend {backend.value!r} does not apply the masks of FAR, by which frames do not "
            f"see later ones; it takes {takes}"
        )


class FARAttnProcessor:
    """Joint attention of long-term and short-term tokens over the context in the cache and themselves."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "FARAttention",
        streams: Streams,
        image_rotary_emb: RotaryEmbedding,
        attention_mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Streams:
        query, key, value = attn.project(streams)  # each [B, N, heads, head_dim]
        query, key = rotate(torch.cat([query, key], dim=2), image_rotary_emb).chunk(2, dim=2)
        if cache is not None:
            key, value = cache.extend(key, value)
        attended = self.attend(query, key, value, attention_mask)
        return attn.project_out(attended.flatten(2, 3).to(query.dtype), streams)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Attention `[B, N, heads, head_dim]` over `[B, Nk, heads, head_dim]` keys, by the set backend."""
        backend, parallel_config = self._attention_backend, self._parallel_config
        active = backend or _AttentionBackendRegistry.get_active_backend()[0]
        if attention_mask is not None:
            check_backend(active)
        one_frame = attention_mask is None or attention_mask.shape[-2] == 1
        exact_on_cpu = query.device.type == "cpu" and query.dtype == torch.float32
        nothing_set = backend is None and active == AttentionBackendName.NATIVE and parallel_config is None
        if nothing_set and one_frame and exact_on_cpu:
            return matmul_attention(query, key, value, attention_mask)
        return dispatch_attention_fn(
            query, key, value, attention_mask, backend=backend, parallel_config=parallel_config
        )


class MeasuringAttnProcessor(FARAttnProcessor):
    """Attends as usual, and keeps how much the tokens of one frame look at each key.

    `weights` has a row `[Nk]` for each layer that used it, the mean over sequences, heads and queries.
    """

    def __init__(self) -> None:
        self.weights: list[Tensor] = []

    def attend(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None) -> Tensor:
        scores = torch.einsum("bqhd,bkhd->bhqk", query.float(), key.float()) * query.shape[-1] ** -0.5
        if attention_mask is not None and attention_mask.is_floating_point():
            scores = scores + attention_mask
        elif attention_mask is not None:
            scores = scores.masked_fill(~attention_mask, float("-inf"))
        self.weights.append(scores.softmax(dim=-1).mean(dim=(0, 1, 2)))
        return super().attend(query, key, value, attention_mask)


class FARAttention(RefusesCaching, nn.Module, AttentionModuleMixin):
    """Attention with RMS-normalised queries and keys and own projections for long-term tokens.

    Args:
        dim: D.
        heads, dim_head: attention heads and their channels; `heads * dim_head == dim`.
        long_context: give long-term tokens projections of their own (section 3.3).
        long_context_out: whether the long-term tokens are read after this layer; False in the last one.
    """

    _default_processor_cls = FARAttnProcessor
    _available_processors = [FARAttnProcessor]
    processor: Callable[..., Streams]
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

    def project(self, streams: Streams) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value `[B, N, heads, head_dim]` of the tokens of all streams."""
        fused = self.fused_projections
        linears = [self.to_qkv] if fused else [self.to_q, self.to_k, self.to_v]
        short = self._project(streams[-1], linears, self.norm_q, self.norm_k)
        if len(streams) == 1:
            return short
        linears = [self.to_added_qkv] if fused else [self.add_q_proj, self.add_k_proj, self.add_v_proj]
        long = self._project(streams[0], linears, self.norm_added_q, self.norm_added_k)
        query, key, value = (torch.cat(pair, dim=1) for pair in zip(long, short, strict=True))
        return query, key, value

    def _project(
        self, stream: Tensor, linears: list[nn.Linear], norm_q: nn.Module, norm_k: nn.Module
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens = stream.flatten(1, 2)
        projected = [part for linear in linears for part in linear(tokens).chunk(3 // len(linears), dim=-1)]
        query, key, value = (tensor.unflatten(-1, (-1, self.head_dim)) for tensor in projected)
        return norm_q(query), norm_k(key), value

    def project_out(self, attended: Tensor, streams: Streams) -> Streams:
        """Output projection of `[B, N, D]` as streams; only the short-term one where no other is read."""
        split = sum(stream.shape[1] * stream.shape[2] for stream in streams[:-1])
        short = self.to_out[0](attended[:, split:]).unflatten(1, streams[-1].shape[1:3])
        if len(streams) == 1 or self.to_add_out is None:
            return [short]
        return [self.to_add_out(attended[:, :split]).unflatten(1, streams[0].shape[1:3]), short]

    def forward(
        self,
        streams: Streams,
        image_rotary_emb: RotaryEmbedding,
        attention_mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Streams:
        return self.processor(self, streams, image_rotary_emb, attention_mask, cache)
