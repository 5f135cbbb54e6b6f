"""Built by pipelines/build.py of diffusers-far from its package; change it there."""

import torch
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from diffusers.utils import BaseOutput
from itertools import accumulate
from torch import Tensor, nn
from typing import Any, NamedTuple


# kv_cache.py: Keys and values of the context: what makes a new frame cost the same however the context was made.

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


# matmul_attention.py: Attention from plain matrix products: on CPUs, where few tokens ask, faster than PyTorch's fused one.

def matmul_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """`softmax(query @ key / sqrt(head_dim) + bias) @ value`.

    Args:
        query: `[B, Nq, heads, head_dim]`.
        key, value: `[B, Nk, heads, head_dim]`; without a copy where they lie in memory head by head.
        bias: `[1, 1, Nq or 1, Nk]` float, or None.

    Returns:
        `[B, Nq, heads, head_dim]`. The attention weights `[B * heads, Nq, Nk]` are held on the way.
    """
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    batch_heads, scale = query.shape[:2], query.shape[-1] ** -0.5
    query, key, value = (x.flatten(0, 1) for x in (query, key, value))
    if bias is None:
        scores = torch.bmm(query * scale, key.transpose(1, 2))
    else:
        scores = torch.baddbmm(bias[0], query, key.transpose(1, 2), alpha=scale)
    attended = torch.bmm(scores.softmax(dim=-1).to(value.dtype), value)
    return attended.unflatten(0, batch_heads).transpose(1, 2)


# rope.py: Rotary position embedding of queries and keys, in few passes over memory.

RotaryEmbedding = tuple[Tensor, Tensor]


def signed_rotary(cos: Tensor, sin: Tensor) -> RotaryEmbedding:
    """Cosines and sines `[N, head_dim]` as `rotate` takes them: every first sine of a pair negative."""
    return cos, torch.stack([-sin[:, ::2], sin[:, 1::2]], dim=-1).flatten(1)


def rotate(states: Tensor, rotary: RotaryEmbedding) -> Tensor:
    """Rotate `[B, N, heads, head_dim]`, computed in float32."""
    cos, sin = (table[:, None] for table in rotary)
    pairs = states.float().unflatten(-1, (-1, 2))
    return torch.addcmul(pairs.flatten(-2) * cos, pairs.roll(1, -1).flatten(-2), sin).to(states.dtype)


# attention.py: Attention of FAR: normalised, rotated queries and keys, own projections of long-term tokens, a cache.

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


# frame_layout.py: How the frames of one forward split into long-term and short-term tokens, and which of them see which.

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


# transformer_far.py: FARTransformer3DModel: the frame-autoregressive video transformer of arXiv 2503.19325.

@dataclass
class FARTransformer3DModelOutput(BaseOutput):
    """Output of [`FARTransformer3DModel`].

    Args:
        sample: `[B, F, C, H, W]` velocity (noise minus latents) of the short-term frames.
    """

    sample: Tensor


def _scale_shift(hidden_states: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.addcmul(shift, hidden_states, 1 + scale)


class FARAdaLayerNorm(nn.Module):
    """LayerNorm with shift, scale and gate of each frame, which `linear` makes of the frame's condition."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, 3 * dim)
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)

    def forward(self, tokens: Tensor, modulation: Tensor, layout: FrameLayout) -> tuple[Tensor, Tensor]:
        shift, scale, gate = modulation.chunk(3, dim=-1)  # each [B, F, D]
        return layout.modulate(_scale_shift, self.norm(tokens), scale, shift), gate


class FARAdaLayerNormOut(nn.Module):
    """Last norm: scale and shift, in this order, and no gate."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, 2 * dim)
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)

    def forward(self, tokens: Tensor, modulation: Tensor, layout: FrameLayout) -> Tensor:
        scale, shift = modulation.chunk(2, dim=-1)
        return layout.modulate(_scale_shift, self.norm(tokens), scale, shift)


AdaLayerNorms = FARAdaLayerNorm | FARAdaLayerNormOut


class FARTransformerBlock(nn.Module):
    """AdaLN attention and AdaLN MLP, both gated per frame."""

    def __init__(
        self, dim: int, heads: int, dim_head: int, long_context: bool, long_context_out: bool
    ) -> None:
        super().__init__()
        self.norm1 = FARAdaLayerNorm(dim)
        self.attn = FARAttention(dim, heads, dim_head, long_context, long_context_out)
        self.norm2 = FARAdaLayerNorm(dim)
        self.ff = FeedForward(dim=dim, dim_out=dim, activation_fn="gelu-approximate")

    def forward(
        self,
        hidden_states: Tensor,
        condition: Tensor,
        layout: FrameLayout,
        image_rotary_emb: RotaryEmbedding,
        attention_mask: Tensor | None = None,
        cache: LayerCache | None = None,
        modulation: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        modulation1, modulation2 = modulation or (self.norm1.linear(condition), self.norm2.linear(condition))
        normed, gate = self.norm1(hidden_states, modulation1, layout)
        attended = self.attn(normed, image_rotary_emb, layout.num_long_tokens, attention_mask, cache)
        hidden_states = hidden_states + layout.modulate(torch.mul, attended, gate)
        normed, gate = self.norm2(hidden_states, modulation2, layout)
        return hidden_states + layout.modulate(torch.mul, self.ff(normed), gate)


class FARTransformer3DModel(
    ModelMixin, ConfigMixin, PeftAdapterMixin, AttentionMixin
):
    """Frame-autoregressive video transformer, base and Long (arXiv 2503.19325).

    Every frame has its own noise level and sees itself and the frames before it. The Long model gives the
    frames before the last `short_window` fewer, coarser tokens (long short-term context, section 3.3).

    Args:
        patch_size: latent pixels per side of a short-term token.
        long_patch_size: latent pixels per side of a long-term token; None makes the base model, 4 is
            published.
        in_channels: C of the latents.
        out_channels: channels of the velocity; None means `in_channels`.
        num_layers, num_attention_heads, attention_head_dim: size; D is heads times head channels.
        axes_dims_rope: channels of a head given to frame, row and column; they sum to `attention_head_dim`.
        num_classes: classes of a class-conditional model (one label per video).
        num_actions: actions of an action-conditional model (one action per frame, the one that led to it).
        short_window: short-term frames of a Long model, the frame being denoised included.
        use_meanflow: predict the mean velocity from `timestep` down to `timestep_r` (arXiv 2505.13447), so
            that few denoising steps do for many.
    """

    _supports_gradient_checkpointing = True
    _supports_group_offloading = True
    _no_split_modules = ["FARTransformerBlock"]
    _repeated_blocks = ["FARTransformerBlock"]
    _skip_layerwise_casting_patterns = ["x_embedder", "context_embedder", "timestep_embedder", "norm"]
    _skip_keys = ["cache"]

    @register_to_config
    def __init__(
        self,
        patch_size: int = 1,
        long_patch_size: int | None = None,
        in_channels: int = 32,
        out_channels: int | None = None,
        num_layers: int = 12,
        num_attention_heads: int = 12,
        attention_head_dim: int = 64,
        axes_dims_rope: tuple[int, int, int] = (16, 24, 24),
        num_classes: int | None = None,
        num_actions: int | None = None,
        short_window: int = 16,
        use_meanflow: bool = False,
    ) -> None:
        super().__init__()
        if sum(axes_dims_rope) != attention_head_dim or any(axis % 2 for axis in axes_dims_rope):
            raise ValueError(f"{axes_dims_rope=} must be even numbers that sum to {attention_head_dim=}")
        counts = [patch_size, long_patch_size, num_layers, num_classes, num_actions, short_window]
        names = ["patch_size", "long_patch_size", "num_layers", "num_classes", "num_actions", "short_window"]
        for name, count in zip(names, counts, strict=True):
            if count is not None and count < 1:
                raise ValueError(f"{name}={count} must be at least 1")
        if long_patch_size is not None and long_patch_size % patch_size:
            raise ValueError(f"{long_patch_size=} must be a multiple of {patch_size=}")
        dim = num_attention_heads * attention_head_dim
        is_long = long_patch_size is not None
        self.out_channels = out_channels or in_channels
        self.x_embedder = nn.Linear(in_channels * patch_size**2, dim)
        self.context_embedder = nn.Linear(in_channels * long_patch_size**2, dim) if long_patch_size else None
        self.time_proj = Timesteps(num_channels=256, flip_sin_to_cos=True, downscale_freq_shift=1)
        self.timestep_embedder = TimestepEmbedding(in_channels=256, time_embed_dim=dim)
        self.interval_embedder = (
            TimestepEmbedding(in_channels=256, time_embed_dim=dim) if use_meanflow else None
        )
        self.class_embedder = nn.Embedding(num_classes + 1, dim) if num_classes else None
        self.action_embedder = nn.Embedding(num_actions + 1, dim) if num_actions else None
        self.pos_embed = FluxPosEmbed(theta=10000, axes_dim=list(axes_dims_rope))
        self.transformer_blocks = nn.ModuleList(
            FARTransformerBlock(dim, num_attention_heads, attention_head_dim, is_long, index < num_layers - 1)
            for index in range(num_layers)
        )
        self.norm_out = FARAdaLayerNormOut(dim)
        self.proj_out = nn.Linear(dim, self.out_channels * patch_size**2)
        self.gradient_checkpointing = False
        self._init_weights()

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.normal_(self.timestep_embedder.linear_1.weight, std=0.02)
        nn.init.normal_(self.timestep_embedder.linear_2.weight, std=0.02)
        # Every block starts as the identity and the model predicts zero; an interval means nothing yet.
        zero = [self.proj_out, *(m.linear for m in self.modules() if isinstance(m, AdaLayerNorms))]
        if self.interval_embedder is not None:
            zero.append(self.interval_embedder.linear_2)
        for linear in zero:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    @property
    def is_long(self) -> bool:
        """Whether old frames become long-term tokens."""
        return self.config.long_patch_size is not None

    @property
    def short_window(self) -> int | None:
        """Short-term frames of a Long model, the denoised one included; None for a base model."""
        return self.config.short_window if self.is_long else None

    def tokens_per_frame(self, height: int, width: int) -> tuple[int, int]:
        """Tokens of a (long-term, short-term) frame of `height` x `width` latent pixels."""
        short = (height // self.config.patch_size) * (width // self.config.patch_size)
        if not self.is_long:
            return 0, short
        return (height // self.config.long_patch_size) * (width // self.config.long_patch_size), short

    def create_cache(
        self, batch_size: int, height: int, width: int, device: torch.device | str | None = None
    ) -> FARCache:
        """An empty cache for `batch_size` sequences of frames of `height` x `width` latent pixels."""
        config, (long_tokens, short_tokens) = self.config, self.tokens_per_frame(height, width)
        shape = (config.num_layers, batch_size, config.num_attention_heads, config.attention_head_dim)
        return FARCache(*shape, short_tokens, long_tokens, self.dtype, device or self.device)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor | None = None,
        actions: Tensor | None = None,
        cache: FARCache | None = None,
        flex_rope_slope: float = 0.0,
        rope_interpolation: float = 1.0,
        num_long_frames: int | None = None,
        frame_positions: Tensor | None = None,
        modulation: Sequence[Tensor] | None = None,
        timestep_r: Tensor | None = None,
        return_dict: bool = True,
    ) -> FARTransformer3DModelOutput | tuple[Tensor]:
        """Velocity of the short-term frames.

        Args:
            hidden_states: `[B, F, C, H, W]` latents, oldest frame first.
            timestep: `[B, F]` noise levels in [0, 1000], -1 for a clean frame.
            class_labels: `[B]` classes; negative or `num_classes` is the null condition, as is None.
            actions: `[B, F]` actions, the one that led to each frame; null as for `class_labels`.
            cache: context that all frames see; read only, but the frames' own keys and values are left in its
                scratch, where `cache.append` can make them context.
            flex_rope_slope: temporal decay of FlexRoPE per frame of distance; 0 is plain RoPE.
            rope_interpolation: frame positions are divided by this ratio in RoPE.
            num_long_frames: how many leading frames are long-term. By default those before the last
                `short_window` for a Long model without a cache, else none.
            frame_positions: `[F]` position of each frame in the video; by default they follow the cache.
            modulation: from [`modulation`](FARTransformer3DModel.modulation), in place of levels and labels.
            timestep_r: `[B, F]` levels at which the step that is taken ends, for a model with
                `use_meanflow`; by default `timestep`, which gives the velocity of this instant.
            return_dict: return a [`FARTransformer3DModelOutput`] instead of a tuple.

        Returns:
            `sample` `[B, F - num_long_frames, out_channels, H, W]`.
        """
        conditions = (timestep, class_labels, actions, timestep_r)
        check_inputs(self.config, hidden_states, *conditions, frame_positions, num_long_frames, modulation)
        num_frames, (height, width) = hidden_states.shape[1], hidden_states.shape[-2:]
        if num_long_frames is None:
            num_long_frames = 0 if cache is not None else split_frames(num_frames, self.short_window)[0]
        layout = FrameLayout(
            num_long_frames, num_frames - num_long_frames, *self.tokens_per_frame(height, width)
        )
        if frame_positions is None:
            first = 0 if cache is None else cache.next_frame
            frame_positions = torch.arange(first, first + num_frames, device=hidden_states.device)

        tokens = self.embed_frames(hidden_states, layout)
        condition = tokens[:, :0]
        if modulation is None:
            condition = self.embed_condition(*conditions, num_long_frames)
        patches = (self.config.patch_size, self.config.long_patch_size)
        positions = frame_positions / rope_interpolation
        coordinates = layout.token_coordinates(positions, height, width, *patches)
        rotary = signed_rotary(*self.pos_embed(coordinates))
        mask = None  # one frame sees the whole context and itself
        if num_frames > 1 or flex_rope_slope > 0:
            context_positions = None if cache is None else cache.key_positions(hidden_states.device)
            mask = attention_mask(layout, frame_positions, context_positions, flex_rope_slope, tokens.dtype)
        if cache is not None:
            cache.reserve(layout.num_tokens)

        for index, block in enumerate(self.transformer_blocks):
            layer_cache = None if cache is None else cache.layers[index]
            kept = None if modulation is None else (modulation[2 * index], modulation[2 * index + 1])
            inputs = (tokens, condition, layout, rotary, mask, layer_cache, kept)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                tokens = self._gradient_checkpointing_func(block, *inputs)
            else:
                tokens = block(*inputs)

        short = FrameLayout(0, layout.num_short_frames, layout.long_tokens, layout.short_tokens)
        last = self.norm_out.linear(condition[:, num_long_frames:]) if modulation is None else modulation[-1]
        tokens = self.proj_out(self.norm_out(tokens[:, layout.num_long_tokens :], last, short))
        sample = unpatchify(tokens, self.config.patch_size, height, width)
        return FARTransformer3DModelOutput(sample=sample) if return_dict else (sample,)

    def embed_frames(self, hidden_states: Tensor, layout: FrameLayout) -> Tensor:
        """Tokens `[B, N, D]` of frames `[B, F, C, H, W]`, long-term frames first."""
        num_long = layout.num_long_frames
        if num_long == 0:
            return self.x_embedder(patchify(hidden_states, self.config.patch_size))
        assert self.context_embedder is not None  # check_inputs saw to it
        long = patchify(hidden_states[:, :num_long], self.config.long_patch_size)
        short = patchify(hidden_states[:, num_long:], self.config.patch_size)
        return torch.cat([self.context_embedder(long), self.x_embedder(short)], dim=1)

    def modulation(
        self,
        timestep: Tensor,
        class_labels: Tensor | None = None,
        actions: Tensor | None = None,
        timestep_r: Tensor | None = None,
    ) -> list[Tensor]:
        """What `forward` computes from levels `[B, F]` and labels alone: `[B, F, .]` of each AdaLN in turn.

        A third of all weights serve one vector per frame. With the levels of a frame's denoising steps as
        those of F frames, they are read once for all steps.
        """
        condition = self.embed_condition(timestep, class_labels, actions, timestep_r)
        norms = [module for module in self.modules() if isinstance(module, AdaLayerNorms)]
        return [norm.linear(condition) for norm in norms]

    def embed_condition(
        self,
        timestep: Tensor,
        class_labels: Tensor | None,
        actions: Tensor | None,
        timestep_r: Tensor | None = None,
        num_long_frames: int = 0,
    ) -> Tensor:
        """What modulates each frame, `[B, F, D]`: timestep, class and action, after the shared SiLU."""
        interval = None if timestep_r is None else timestep - timestep_r
        # A long-term frame carries twice its timestep: -2 where a clean short-term one has -1 (section 3.3).
        timestep = torch.cat([timestep[:, :num_long_frames] * 2, timestep[:, num_long_frames:]], dim=1)
        embedded = self.timestep_embedder(self._project_time(timestep))
        if self.interval_embedder is not None and interval is not None:
            # Less that of no interval: at r = t the model is what it was before it knew intervals.
            none = self.interval_embedder(self._project_time(torch.zeros_like(interval[:1, :1])))
            embedded = embedded + (self.interval_embedder(self._project_time(interval)) - none)
        if self.class_embedder is not None:
            embedded = embedded + self._embed_labels(self.class_embedder, class_labels, embedded[:, :1])
        if self.action_embedder is not None:
            embedded = embedded + self._embed_labels(self.action_embedder, actions, embedded)
        return nn.functional.silu(embedded)

    def _project_time(self, timestep: Tensor) -> Tensor:
        return self.time_proj(timestep.flatten()).to(self.dtype).unflatten(0, timestep.shape)

    @staticmethod
    def _embed_labels(embedder: nn.Embedding, labels: Tensor | None, like: Tensor) -> Tensor:
        # The last row of the table is the null condition.
        null = embedder.num_embeddings - 1
        if labels is None:
            labels = torch.full(like.shape[:2], null, device=like.device)
        labels = labels.reshape(like.shape[:2])
        return embedder(torch.where(labels < 0, null, labels))
