"""FARTransformer3DModel: the frame-autoregressive video transformer of arXiv 2503.19325.

Dimensions: B batch, F frames, C latent channels, H x W latent grid, N tokens, D model width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import FromOriginalModelMixin, PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, FeedForward
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from .actions import ActionSpace, check_actions
from .attention import FARAttention, attention_mask, check_backend
from .checked_loading import check_complete, check_names, check_options, check_weights
from .hook_registry import RefusesCaching, refuse_caching
from .kv_cache import FARCache, LayerCache
from .rope import RotaryEmbedding, signed_rotary
from .tokens import (
    Streams,
    check_inputs,
    patchify,
    per_stream,
    per_token,
    split_frames,
    token_coordinates,
    unpatchify,
)


@dataclass
class FARTransformer3DModelOutput(BaseOutput):
    """Output of [`FARTransformer3DModel`].

    Args:
        sample: `[B, F, C, H, W]` velocity (noise minus latents) of the short-term frames.
    """

    sample: Tensor


class FARAdaLayerNorm(nn.Module):
    """LayerNorm with shift, scale and gate of each frame, which `linear` makes of the frame's condition."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, 3 * dim)
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)

    def forward(self, streams: Streams, modulation: Tensor) -> tuple[Streams, list[Tensor]]:
        """Modulated streams, and the gates `[B, F, 1, D]` of each, from `modulation` `[B, F, 3 D]`."""
        normed, gates = [], []
        for stream, values in zip(streams, per_stream(modulation, streams), strict=True):
            shift, scale, gate = values.chunk(3, dim=-1)
            normed.append(torch.addcmul(shift, self.norm(stream), 1 + scale))
            gates.append(gate)
        return normed, gates


class FARAdaLayerNormOut(nn.Module):
    """Last norm: scale and shift, in this order, and no gate."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, 2 * dim)
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)

    def forward(self, stream: Tensor, modulation: Tensor) -> Tensor:
        """`modulation` is `[B, F, 2 D]`, or the condition `[B, F, D]` that it is made of."""
        if modulation.shape[-1] == self.linear.in_features:
            modulation = self.linear(modulation)  # here: sharded weights are whole in their module's forward
        scale, shift = modulation.unsqueeze(2).chunk(2, dim=-1)
        return torch.addcmul(shift, self.norm(stream), 1 + scale)


# Options that checkpoints of earlier versions lack; their defaults are what these models were made with.
LATER_OPTIONS = ("use_meanflow", "action_dim", "action_mean", "action_std")

AdaLayerNorms = FARAdaLayerNorm | FARAdaLayerNormOut


class FARTransformerBlock(RefusesCaching, nn.Module):
    """AdaLN attention and AdaLN MLP, both gated per frame."""

    def __init__(
        self, dim: int, heads: int, dim_head: int, long_context: bool, long_context_out: bool = True
    ) -> None:
        super().__init__()
        self.norm1 = FARAdaLayerNorm(dim)
        self.attn = FARAttention(dim, heads, dim_head, long_context, long_context_out)
        self.norm2 = FARAdaLayerNorm(dim)
        self.ff = FeedForward(dim=dim, dim_out=dim, activation_fn="gelu-approximate")

    def forward(
        self,
        streams: Streams,
        condition: Tensor | tuple[Tensor, Tensor],
        image_rotary_emb: RotaryEmbedding,
        attention_mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Streams:
        """`condition` is the embedding `[B, F, D]`, or what both norms make of it, `[B, F, 3 D]` each."""
        if isinstance(condition, Tensor):
            condition = self.norm1.linear(condition), self.norm2.linear(condition)
        normed, gates = self.norm1(streams, condition[0])
        attended, modulation = self.attn(normed, image_rotary_emb, attention_mask, cache), condition[1]
        if len(attended) < len(streams):  # the long-term stream ends here
            modulation = modulation[:, streams[0].shape[1] :]
            streams, gates = streams[1:], gates[1:]
        streams = [x + y * gate for x, y, gate in zip(streams, attended, gates, strict=True)]
        normed, gates = self.norm2(streams, modulation)
        return [x + self.ff(y) * gate for x, y, gate in zip(streams, normed, gates, strict=True)]


class FARTransformerLastBlock(FARTransformerBlock):
    """The last block of a Long model, which ends the long-term stream: nothing reads it any more.

    It is not among the blocks that `compile_repeated_blocks` compiles: it would need a graph of its own.
    """

    def __init__(self, dim: int, heads: int, dim_head: int, long_context: bool) -> None:
        super().__init__(dim, heads, dim_head, long_context, long_context_out=False)


def _allow_any_number_of_frames(
    streams: Streams,
    condition: Tensor | Sequence[Tensor],
    rotary: RotaryEmbedding,
    mask: Tensor | None,
    cache: FARCache | None,
) -> None:
    """Let a block that is compiled for these inputs take others of more or fewer frames."""
    per_frame = [condition] if isinstance(condition, Tensor) else condition
    marks = [(tensor, 1) for tensor in (*streams, *per_frame)] + [(tensor, 0) for tensor in rotary]
    if mask is not None:
        marks += [(mask, 2), (mask, 3)]
    for tensor, dim in marks:
        torch._dynamo.maybe_mark_dynamic(tensor, dim)
    if cache is not None:  # whose buffers may have grown for this forward
        cache.allow_any_number_of_tokens()


class FARTransformer3DModel(
    RefusesCaching, ModelMixin, ConfigMixin, PeftAdapterMixin, FromOriginalModelMixin, AttentionMixin
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
        num_actions: actions of an action-conditional model (one action per frame, the one that led to it); or
            the sizes of groups that each have an action per frame, such as a keyboard and a mouse.
        short_window: short-term frames of a Long model, the frame being denoised included.
        use_meanflow: predict the mean velocity from `timestep` down to `timestep_r` (arXiv 2505.13447), so
            that few denoising steps do for many.
        action_dim: numbers of a continuous action (one vector per frame), in place of `num_actions`.
        action_mean, action_std: of these numbers in the training data; the model normalises by them what it
            is given. None: it takes them as they are.
    """

    _supports_gradient_checkpointing = True
    _supports_group_offloading = True
    _no_split_modules = ["FARTransformerBlock", "FARTransformerLastBlock"]
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
        num_actions: int | Sequence[int] | None = None,
        short_window: int = 16,
        use_meanflow: bool = False,
        action_dim: int | None = None,
        action_mean: Sequence[float] | None = None,
        action_std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if sum(axes_dims_rope) != attention_head_dim or any(axis % 2 for axis in axes_dims_rope):
            raise ValueError(f"{axes_dims_rope=} must be even numbers that sum to {attention_head_dim=}")
        counts = [patch_size, long_patch_size, num_layers, num_classes, short_window]
        names = ["patch_size", "long_patch_size", "num_layers", "num_classes", "short_window"]
        for name, count in zip(names, counts, strict=True):
            if count is not None and count < 1:
                raise ValueError(f"{name}={count} must be at least 1")
        if long_patch_size is not None and long_patch_size % patch_size:
            raise ValueError(f"{long_patch_size=} must be a multiple of {patch_size=}")
        check_actions(num_actions, action_dim, action_mean, action_std)
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
        self.action_embedder: nn.Module | None = None
        if action_dim:
            self.action_embedder = TimestepEmbedding(in_channels=action_dim + 1, time_embed_dim=dim)
        elif (actions := self.action_space) is not None:
            self.action_embedder = nn.Embedding(sum(actions.sizes) + len(actions.sizes), dim)
        self.pos_embed = FluxPosEmbed(theta=10000, axes_dim=list(axes_dims_rope))
        last_block = FARTransformerLastBlock if is_long else FARTransformerBlock
        self.transformer_blocks = nn.ModuleList(
            block(dim, num_attention_heads, attention_head_dim, is_long)
            for block in [FARTransformerBlock] * (num_layers - 1) + [last_block]
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
            ValueError: for missing, unknown or NaN weights, a configuration that lacks an option, and options
                that the model does not have.
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
        source = f"the configuration of {cls.__name__}"
        check_options([cls], config_dict, source)
        if "_class_name" in config_dict:  # it was saved, with all options that there were then
            optional = set(LATER_OPTIONS)
            if config_dict.get("action_dim"):  # then its mean and deviation were saved, too
                optional -= {"action_mean", "action_std"}
            check_complete(cls, {*config_dict, *kwargs}, optional, source)
        return super().extract_init_dict(config_dict, **kwargs)

    def set_attention_backend(self, backend: str) -> None:
        """Compute attention with one of diffusers' backends, in every forward.

        Raises:
            ValueError: for one that is unknown, or that does not apply masks.
        """
        if backend.lower() in (name.value for name in AttentionBackendName):
            check_backend(AttentionBackendName(backend.lower()))
        super().set_attention_backend(backend)

    def enable_cache(self, config: Any) -> NoReturn:
        """Refuse diffusers' caching of denoising steps, which is wrong for FAR; [`FARCache`] is its own.

        Raises:
            ValueError: always; it names the technique.
        """
        refuse_caching(type(config).__name__)

    @property
    def is_long(self) -> bool:
        """Whether old frames become long-term tokens."""
        return self.config.long_patch_size is not None

    @property
    def short_window(self) -> int | None:
        """Short-term frames of a Long model, the denoised one included; None for a base model."""
        return self.config.short_window if self.is_long else None

    @property
    def action_space(self) -> ActionSpace | None:
        """What its actions are; None for a model without them."""
        return ActionSpace.of(self.config)

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
        *,
        class_labels: Tensor | None = None,
        actions: Tensor | None = None,
        timestep_r: Tensor | None = None,
        modulation: Sequence[Tensor] | None = None,
        num_long_frames: int | None = None,
        frame_positions: Tensor | None = None,
        flex_rope_slope: float = 0.0,
        rope_interpolation: float = 1.0,
        cache: FARCache | None = None,
        return_dict: bool = True,
    ) -> FARTransformer3DModelOutput | tuple[Tensor]:
        """Velocity of the short-term frames.

        Args:
            hidden_states: `[B, F, C, H, W]` latents, oldest frame first.
            timestep: `[B, F]` noise levels in [0, 1000], -1 for a clean frame.
            class_labels: `[B]` classes; negative or `num_classes` is the null condition, as is None.
            actions: `[B, F]` actions, the one that led to each frame; null as for `class_labels`. `[B, F, G]`
                of a model with G groups, `[B, F, A]` floats of one with `action_dim`, where NaN is null.
            timestep_r: `[B, F]` levels at which the step that is taken ends, for a model with
                `use_meanflow`; by default `timestep`, which gives the velocity of this instant.
            modulation: from [`modulation`](FARTransformer3DModel.modulation), in place of levels and labels.
            num_long_frames: how many leading frames are long-term. By default those before the last
                `short_window` for a Long model without a cache, else none.
            frame_positions: `[F]` place of each frame in time; by default they follow the cache.
            flex_rope_slope: temporal decay of FlexRoPE per frame of distance; 0 is plain RoPE.
            rope_interpolation: frame positions are divided by this ratio in RoPE.
            cache: context that all frames see; read only, but the frames' own keys and values are left in its
                scratch, where `cache.commit` can make them context. A frame that is in the cache, too, is a
                copy: it sees itself, and the cached version of the frames before it.
            return_dict: return a [`FARTransformer3DModelOutput`] instead of a tuple.

        Returns:
            `sample` `[B, F - num_long_frames, out_channels, H, W]`.
        """
        labels = (class_labels, actions, timestep_r)
        check_inputs(
            self.config, hidden_states, timestep, *labels, frame_positions, num_long_frames, modulation
        )
        num_frames, (height, width) = hidden_states.shape[1], hidden_states.shape[-2:]
        if num_long_frames is None:
            num_long_frames = 0 if cache is not None else split_frames(num_frames, self.short_window)[0]
        if frame_positions is None:
            first = 0 if cache is None else cache.next_position
            frame_positions = torch.arange(first, first + num_frames, device=hidden_states.device)

        streams = self.embed_frames(hidden_states, num_long_frames)  # [B, F, T, D] each
        condition = modulation or self.embed_condition(timestep, *labels, num_long_frames)  # [B, F, D]
        rotary = self.embed_positions(frame_positions / rope_interpolation, num_long_frames, height, width)
        mask = None  # one frame sees the whole context and itself
        if num_frames > 1 or flex_rope_slope > 0:
            context = None if cache is None else cache.key_positions(hidden_states.device)
            positions, dtype = per_token(frame_positions, streams), streams[-1].dtype
            mask = attention_mask(positions, context, flex_rope_slope, dtype, num_frames == 1)
        if cache is not None:
            cache.begin(num_long_frames, num_frames - num_long_frames)

        if self.transformer_blocks[0]._compiled_call_impl is not None:
            # What the embedding makes is a view, what blocks make is not: a graph for each, without a copy.
            streams = [stream.clone() for stream in streams]
            _allow_any_number_of_frames(streams, condition, rotary, mask, cache)
        for index, block in enumerate(self.transformer_blocks):
            of_block = condition
            if not isinstance(condition, Tensor):
                of_block = (condition[2 * index], condition[2 * index + 1])
            inputs = (streams, of_block, rotary, mask, None if cache is None else cache.layers[index])
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                streams = self._gradient_checkpointing_func(block, *inputs)
            else:
                streams = block(*inputs)

        last = condition[:, num_long_frames:] if isinstance(condition, Tensor) else condition[-1]
        sample = unpatchify(
            self.proj_out(self.norm_out(streams[-1], last)), self.config.patch_size, height, width
        )
        return FARTransformer3DModelOutput(sample=sample) if return_dict else (sample,)

    def embed_frames(self, hidden_states: Tensor, num_long_frames: int) -> Streams:
        """Tokens `[B, F, T, D]` of frames `[B, F, C, H, W]`, the long-term ones in a stream of their own."""
        short = self.x_embedder(patchify(hidden_states[:, num_long_frames:], self.config.patch_size))
        if num_long_frames == 0:
            return [short]
        assert self.context_embedder is not None  # check_inputs saw to it
        long = patchify(hidden_states[:, :num_long_frames], self.config.long_patch_size)
        return [self.context_embedder(long), short]

    def embed_positions(
        self, frame_positions: Tensor, num_long_frames: int, height: int, width: int
    ) -> RotaryEmbedding:
        """Rotation of all tokens, both grids in units of short-term tokens (section 3.3).

        Args:
            frame_positions: `[F]` places in time; fractions interpolate.
        """
        patch, long_patch = self.config.patch_size, self.config.long_patch_size
        short = token_coordinates(frame_positions[num_long_frames:], height // patch, width // patch)
        if num_long_frames == 0:
            return signed_rotary(*self.pos_embed(short))
        grid, stride = (height // long_patch, width // long_patch), long_patch // patch
        long = token_coordinates(frame_positions[:num_long_frames], *grid, stride)
        return signed_rotary(*self.pos_embed(torch.cat([long, short])))

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
            embedded = embedded + self._embed_actions(actions, embedded)
        return nn.functional.silu(embedded)

    @property
    def _condition_dtype(self) -> torch.dtype:
        # That of the model, which diffusers finds by a walk through all modules: half a millisecond.
        return self.timestep_embedder.linear_1.bias.dtype

    def _project_time(self, timestep: Tensor) -> Tensor:
        return self.time_proj(timestep.flatten()).to(self._condition_dtype).unflatten(0, timestep.shape)

    @staticmethod
    def _embed_labels(embedder: nn.Embedding, labels: Tensor | None, like: Tensor) -> Tensor:
        # The last row of the table is the null condition.
        null = embedder.num_embeddings - 1
        if labels is None:
            labels = torch.full(like.shape[:2], null, device=like.device)
        labels = labels.reshape(like.shape[:2])
        return embedder(torch.where(labels < 0, null, labels))

    def _embed_actions(self, actions: Tensor | None, like: Tensor) -> Tensor:
        space = self.action_space
        assert space is not None and self.action_embedder is not None
        if actions is None:
            actions = space.null(like.shape[:2], like.device)
        if space.is_vector:
            return self.action_embedder(space.features(actions).to(self._condition_dtype))
        embedded = self.action_embedder(space.rows(actions))
        return embedded.sum(dim=2) if space.is_grouped else embedded
