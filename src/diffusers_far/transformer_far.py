"""FARTransformer3DModel: the frame-autoregressive video transformer of arXiv 2503.19325.

Dimensions: B batch, F frames, C latent channels, H x W latent grid, N tokens, D model width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import FromOriginalModelMixin, PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, FeedForward
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from .attention import FARAttention
from .checked_loading import check_names, check_options, check_weights
from .frame_layout import (
    FrameLayout,
    attention_mask,
    check_inputs,
    patchify,
    split_frames,
    unpatchify,
)
from .kv_cache import FARCache, LayerCache
from .rope import RotaryEmbedding, signed_rotary


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
    ModelMixin, ConfigMixin, PeftAdapterMixin, FromOriginalModelMixin, AttentionMixin
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

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Load a checkpoint as in diffusers, whose own leaves weights that are missing as they happen to be.

        Raises:
            ValueError: for missing, unknown or NaN weights, and options that the model does not have.
        """
        if kwargs.get("use_flashpack"):  # which checks for itself
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, output_loading_info=True, **kwargs
        )
        source = str(pretrained_model_name_or_path)
        check_names(info["missing_keys"], info["unexpected_keys"], source)
        check_weights(model, source)
        return (model, info) if wants_info else model

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The options in a configuration; diffusers' own leaves out in silence what it does not know."""
        check_options([cls], config_dict, f"the configuration of {cls.__name__}")
        return super().extract_init_dict(config_dict, **kwargs)

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
                scratch, where `cache.commit` can make them context.
            flex_rope_slope: temporal decay of FlexRoPE per frame of distance; 0 is plain RoPE.
            rope_interpolation: frame positions are divided by this ratio in RoPE.
            num_long_frames: how many leading frames are long-term. By default those before the last
                `short_window` for a Long model without a cache, else none.
            frame_positions: `[F]` place of each frame in time; by default they follow the cache.
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
            first = 0 if cache is None else cache.next_position
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
            cache.begin(layout.num_long_frames, layout.num_short_frames)

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
