"""The parts of an exported model as modules with fixed shapes. The maths is that of the model itself.

Dimensions: L layers, M heads, R slots of the ring, W frames of the window, T tokens of a frame, E channels of
a head; all graphs are of one sequence.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderDC
from torch import Tensor, nn

from ..attention import FARAttnProcessor
from ..flow_matching import CLEAN_TIMESTEP
from ..matmul_attention import matmul_attention
from ..rope import RotaryEmbedding, signed_rotary
from ..tokens import unpatchify
from ..transformer_far import FARTransformer3DModel


class PlainAttnProcessor(FARAttnProcessor):
    """Attention from matrix products, which every runtime has."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None) -> Tensor:
        return matmul_attention(query, key, value, attention_mask)


class ContextLayer:
    """Stands for a layer's cache: keys and values `[1, M, N, E]` of a context, and what comes behind it."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys = keys
        self.values = values

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Context and new tokens `[1, N, M, E]` together; the new ones stay, as `new_keys`, `new_values`."""
        self.new_keys, self.new_values = key.transpose(1, 2), value.transpose(1, 2)
        keys = torch.cat([self.keys, self.new_keys], dim=2)
        values = torch.cat([self.values, self.new_values], dim=2)
        return keys.transpose(1, 2), values.transpose(1, 2)


def split_conditions(model: FARTransformer3DModel, conditions: Sequence[Tensor]) -> dict[str, Tensor | None]:
    """Inputs after the fixed ones by name: those of `condition_names`, in this order."""
    given = dict(zip(condition_names(model), conditions, strict=True))
    return {name: given.get(name) for name in ("actions", "class_labels")}


def condition_names(model: FARTransformer3DModel) -> list[str]:
    """Which conditions a model has."""
    has = {"actions": model.action_space is not None, "class_labels": bool(model.config.num_classes)}
    return [name for name, wanted in has.items() if wanted]


class FrameGraph(nn.Module):
    """What step and commit share: frames of fixed number and level, over a context of fixed size.

    Args:
        model: with `PlainAttnProcessor`.
        num_long_frames, num_short_frames: that go in.
        context: (frames, tokens of each) of every part of the context.
        height, width: of the latents.
    """

    tables: Tensor
    frame_of_token: Tensor
    frame_of_key: Tensor

    def __init__(
        self,
        model: FARTransformer3DModel,
        num_long_frames: int,
        num_short_frames: int,
        context: Sequence[tuple[int, int]],
        height: int,
        width: int,
    ) -> None:
        super().__init__()
        self.model = model
        self.num_long_frames = num_long_frames
        self.num_frames = num_long_frames + num_short_frames
        self.size = height, width
        tokens = model.tokens_per_frame(height, width)
        levels = [tokens[0]] * num_long_frames + [tokens[1]] * num_short_frames
        self.num_first_tokens = levels[0]
        frames = torch.zeros(self.num_frames)
        tables = torch.stack(model.embed_positions(frames, num_long_frames, height, width))
        # Rows and columns of the tokens never change; the frame's part is an input.
        self.register_buffer("tables", tables[..., model.config.axes_dims_rope[0] :], persistent=False)
        counts = [count for number, count in context for _ in range(number)]
        self.register_buffer("frame_of_token", _repeat(levels), persistent=False)
        self.register_buffer("frame_of_key", _repeat([*counts, *levels]), persistent=False)

    def rotary(self, frame_rotary: Tensor) -> RotaryEmbedding:
        """Of all tokens, from cosines and sines `[2, F, axis / 2]` of the frames."""
        cos, sin = torch.stack([frame_rotary, frame_rotary], dim=-1).flatten(2)[:, self.frame_of_token]
        parts = zip(signed_rotary(cos, sin), self.tables, strict=True)
        cos, sin = (torch.cat(part, dim=1) for part in parts)
        return cos, sin

    def bias(self, context_ages: Tensor, frame_ages: Tensor, slope: Tensor, dtype: torch.dtype) -> Tensor:
        """`[1, 1, N, Nc + N]` bias of the logits: who sees whom, by age, and FlexRoPE's decay."""
        keys = torch.cat([context_ages, frame_ages])
        distance = keys - frame_ages[:, None]
        own = torch.arange(len(keys)) == torch.arange(self.num_frames)[:, None] + len(context_ages)
        seen = own | ((keys >= 0) & (distance > 0))
        bias = torch.where(seen, -slope * distance, float("-inf")).to(dtype)
        if self.num_frames > 1:  # else one row serves all tokens
            bias = bias[self.frame_of_token]
        return bias[:, self.frame_of_key][None, None]

    def run(
        self,
        latents: Tensor,
        timestep: Tensor,
        timestep_r: Tensor | None,
        conditions: dict[str, Tensor | None],
        frame_rotary: Tensor,
        bias: Tensor,
        layers: Sequence[ContextLayer],
    ) -> tuple[Tensor, Tensor]:
        """Last stream and condition of frames `[F, C, h, w]`; their keys and values are left in `layers`."""
        model = self.model
        streams = model.embed_frames(latents[None].to(model.dtype), self.num_long_frames)
        labels, actions = conditions["class_labels"], conditions["actions"]
        if actions is not None:
            actions = actions[None]
        condition = model.embed_condition(timestep, labels, actions, timestep_r, self.num_long_frames)
        rotary = self.rotary(frame_rotary)
        for block, layer in zip(model.transformer_blocks, layers, strict=True):
            streams = block(streams, condition, rotary, bias, layer)
        return streams[-1], condition[:, self.num_long_frames :]


def _repeat(counts: Sequence[int]) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))


class StepGraph(FrameGraph):
    """One denoising step of one frame: its velocity.

    Args:
        ring_slots: R.
        window_frames: W; 0 for a base model.
    """

    def __init__(
        self, model: FARTransformer3DModel, ring_slots: int, window_frames: int, height: int, width: int
    ) -> None:
        long_tokens, short_tokens = model.tokens_per_frame(height, width)
        context = [(ring_slots, long_tokens or short_tokens), (window_frames, short_tokens)]
        super().__init__(model, 0, 1, context, height, width)
        self.window_frames = window_frames

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        timestep_r: Tensor,
        frame_rotary: Tensor,
        flex_rope_slope: Tensor,
        ring_ages: Tensor,
        ring_keys: Tensor,
        ring_values: Tensor,
        *others: Tensor,
    ) -> Tensor:
        """Velocity `[1, C, h, w]`.

        Args:
            latents: `[1, C, h, w]`.
            timestep, timestep_r: `[1]` noise levels in [0, 1000] at which the step begins and ends.
            frame_rotary: `[2, 1, axis / 2]` cosines and sines of the frame's place.
            flex_rope_slope: `[1]`.
            ring_ages: `[R]` integers, -1 for none.
            ring_keys, ring_values: `[L, M, R * T, E]`.
            others: for a Long model ages `[W]`, keys and values `[L, M, W * T, E]` of the window; then
                `actions` `[1, ...]` and `class_labels` `[1]` of a model that has them.
        """
        ages, keys, values, dtype = ring_ages, ring_keys, ring_values, self.model.dtype
        if self.window_frames:
            ages = torch.cat([ages, others[0]])
            keys, values = torch.cat([keys, others[1]], dim=2), torch.cat([values, others[2]], dim=2)
            others = others[3:]
        layers = [ContextLayer(keys[i][None], values[i][None]) for i in range(len(keys))]
        bias = self.bias(ages, torch.zeros(1, dtype=ages.dtype), flex_rope_slope, dtype)
        end = timestep_r[None] if self.model.config.use_meanflow else None
        conditions = split_conditions(self.model, others)
        stream, condition = self.run(latents, timestep[None], end, conditions, frame_rotary, bias, layers)
        out = self.model.proj_out(self.model.norm_out(stream, condition))
        return unpatchify(out, self.model.config.patch_size, *self.size)[0].float()


class CommitGraph(FrameGraph):
    """Clean frames into keys and values: the first into a slot of the ring, the others as the window.

    Args:
        ring_slots: R.
        window_frames: W; 0 for a base model, whose one frame is short-term.
    """

    def __init__(
        self, model: FARTransformer3DModel, ring_slots: int, window_frames: int, height: int, width: int
    ) -> None:
        long_tokens, short_tokens = model.tokens_per_frame(height, width)
        context = [(ring_slots, long_tokens or short_tokens)]
        num_long = 1 if window_frames else 0
        super().__init__(model, num_long, window_frames or 1, context, height, width)
        self.ring_slots = ring_slots
        self.window_frames = window_frames

    def forward(
        self,
        latents: Tensor,
        frame_ages: Tensor,
        slot: Tensor,
        frame_rotary: Tensor,
        flex_rope_slope: Tensor,
        ring_ages: Tensor,
        ring_keys: Tensor,
        ring_values: Tensor,
        *conditions: Tensor,
    ) -> tuple[Tensor, ...]:
        """The ring's keys and values and, of a Long model, those of the window.

        Args:
            latents: `[F, C, h, w]`, F = 1 + W; anything finite where there is no frame.
            frame_ages: `[F]` integers, -1 where there is no frame.
            slot: `[1]` integer, -1 to leave the ring as it is.
            frame_rotary: `[2, F, axis / 2]`.
            flex_rope_slope, ring_ages, ring_keys, ring_values: as in a step.
            conditions: `actions` `[F, ...]` and `class_labels` `[1]` of a model that has them.
        """
        layers = [ContextLayer(ring_keys[i][None], ring_values[i][None]) for i in range(len(ring_keys))]
        bias = self.bias(ring_ages, frame_ages, flex_rope_slope, self.model.dtype)
        clean = torch.full((1, self.num_frames), CLEAN_TIMESTEP)
        end = clean if self.model.config.use_meanflow else None
        labels = split_conditions(self.model, conditions)
        self.run(latents, clean, end, labels, frame_rotary, bias, layers)
        keys = torch.cat([layer.new_keys for layer in layers])  # [L, M, N, E]
        values = torch.cat([layer.new_values for layer in layers])
        first = self.num_first_tokens
        ring = [
            self._write(ring, new[:, :, :first], slot)
            for ring, new in ((ring_keys, keys), (ring_values, values))
        ]
        window = [keys[:, :, first:], values[:, :, first:]] if self.window_frames else []
        return (*ring, *window)

    def _write(self, ring: Tensor, new: Tensor, slot: Tensor) -> Tensor:
        # By rows, as a comparison of every slot with this one takes longer than a layer of the model.
        rows, tokens = ring.flatten(0, 2), new.shape[2]  # [L * M * R * T, E]
        first = torch.arange(0, len(rows), ring.shape[2]) + slot.clamp(min=0) * tokens  # [L * M]
        index = (first[:, None] + torch.arange(tokens)).flatten()
        written = torch.where(slot < 0, rows[index], new.flatten(0, 2))
        return rows.index_put((index,), written).view_as(ring)


class EncodeGraph(nn.Module):
    """Scaled latents `[1, C, h, w]` of a frame `[1, 3, H, W]` in [0, 1]."""

    def __init__(self, vae: AutoencoderDC) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pixels: Tensor) -> Tensor:
        latents = self.vae.encode((pixels * 2 - 1).to(self.vae.dtype)).latent
        return latents.float() * self.vae.config.scaling_factor


class DecodeGraph(nn.Module):
    """A frame `[1, 3, H, W]` in [0, 1] of scaled latents `[1, C, h, w]`."""

    def __init__(self, vae: AutoencoderDC) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        sample = self.vae.decode((latents / self.vae.config.scaling_factor).to(self.vae.dtype)).sample
        return (sample.float() / 2 + 0.5).clamp(0, 1)


def example_inputs(graph: StepGraph | CommitGraph, num_slots: int) -> dict[str, Any]:
    """Inputs of a graph by name, in order, of the right shapes and dtypes."""
    model, (height, width) = graph.model, graph.size
    config, frames = model.config, graph.num_frames
    long_tokens, short_tokens = model.tokens_per_frame(height, width)

    def cache(tokens: int) -> Tensor:
        heads = config.num_attention_heads
        return torch.zeros(config.num_layers, heads, tokens, config.attention_head_dim, dtype=model.dtype)

    latents = torch.zeros(frames, config.in_channels, height, width)
    if isinstance(graph, StepGraph):
        inputs = {"latents": latents, "timestep": torch.ones(1), "timestep_r": torch.zeros(1)}
    else:
        ages = torch.full((frames,), -1, dtype=torch.int32)
        inputs = {"latents": latents, "frame_ages": ages, "slot": torch.zeros(1, dtype=torch.int32)}
    ring = cache(num_slots * (long_tokens or short_tokens))
    inputs |= {
        "frame_rotary": torch.ones(2, frames, config.axes_dims_rope[0] // 2),
        "flex_rope_slope": torch.zeros(1),
        "ring_ages": torch.full((num_slots,), -1, dtype=torch.int32),
        "ring_keys": ring,
        "ring_values": ring.clone(),
    }
    if isinstance(graph, StepGraph) and graph.window_frames:
        window = cache(graph.window_frames * short_tokens)
        inputs["window_ages"] = torch.full((graph.window_frames,), -1, dtype=torch.int32)
        inputs |= {"window_keys": window, "window_values": window.clone()}
    if (space := model.action_space) is not None:
        dtype = torch.float32 if space.is_vector else torch.int32
        inputs["actions"] = torch.zeros(frames, *space.shape, dtype=dtype)
    if config.num_classes:
        inputs["class_labels"] = torch.zeros(1, dtype=torch.int32)
    return inputs
