"""Rollout: one running video. The pipeline's `__call__` and `stream` are thin loops over it."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .context_schedule import ContextFrames, ContextSchedule
from .flow_matching import CLEAN_TIMESTEP
from .pipeline_inputs import label_tensor
from .transformer_far import FARTransformer3DModel

DenoisingCallback = Callable[[int, Tensor, Tensor], Tensor]

# Context is encoded in pieces, so that the causal mask of a long context stays small.
_LONG_CHUNK, _SHORT_CHUNK = 64, 32


class Rollout:
    """A video that grows by one frame per `step`.

    Made by [`FARVideoPipeline.rollout`]. Only what the context schedule still needs is kept, so a rollout
    with a bounded schedule runs in constant memory.

    Args:
        transformer: the model.
        scheduler: flow-matching scheduler; the rollout works on a copy of its own.
        decode: turns a frame's latents `[B, C, h, w]` into what `step` returns.
        context_latents: `[B, T, C, h, w]` scaled latents of the frames to continue; T may be 0.
        context_actions: `[B, T]` actions that led to them (negative: null), or None.
        class_labels: `[B]` class of each video (negative: null), or None.
        guidance_scale: 1 samples with the condition, 0 with the null condition, anything else mixes the two.
        num_inference_steps: denoising steps per frame.
        flex_rope_slope: temporal decay of FlexRoPE; 0 is plain RoPE.
        rope_interpolation: ratio by which RoPE's frame positions are divided.
        context_schedule: what the context keeps; by default everything.
        use_cache: keep keys and values of the context; without, all kept frames are computed anew in every
            step. The two agree as long as no frame is dropped: a cached frame remembers dropped ones that it
            saw.
        generator: for the noise, one or one per video.
        device: where to compute.
    """

    def __init__(
        self,
        transformer: FARTransformer3DModel,
        scheduler: SchedulerMixin,
        decode: Callable[[Tensor], Any],
        context_latents: Tensor,
        context_actions: Tensor | None = None,
        class_labels: Tensor | None = None,
        guidance_scale: float = 1.0,
        num_inference_steps: int = 50,
        flex_rope_slope: float = 0.0,
        rope_interpolation: float = 1.0,
        context_schedule: ContextSchedule | None = None,
        use_cache: bool = True,
        generator: torch.Generator | list[torch.Generator] | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.transformer = transformer
        self.scheduler = copy.deepcopy(scheduler)
        self.decode = decode
        self.class_labels = class_labels
        self.guidance_scale = guidance_scale
        self.num_inference_steps = num_inference_steps
        self.flex_rope_slope = flex_rope_slope
        self.rope_interpolation = rope_interpolation
        self.context_schedule = context_schedule or ContextSchedule()
        self.generator = generator
        self.device = device or transformer.device
        self._start = (context_latents, context_actions)
        self.batch_size, _, *self._latent_shape = context_latents.shape
        self.num_sequences = self.batch_size * (2 if self.do_classifier_free_guidance else 1)
        self.cache = None
        if use_cache:
            height, width = context_latents.shape[-2:]
            self.cache = transformer.create_cache(self.num_sequences, height, width, self.device)
        self.reset()

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether each step computes both the null and the given condition."""
        return self.guidance_scale not in (0, 1)

    @property
    def context(self) -> ContextFrames:
        """Positions of the frames that the next frame will see."""
        return self.context_schedule.context(self.num_frames, self.transformer.short_window)

    def reset(self) -> None:
        """Go back to the start: the first context, no new frames. The generator goes on where it is."""
        latents, actions = self._start
        if self.cache is not None:
            self.cache.reset()
        self._latents: dict[int, Tensor] = {}
        self._actions: dict[int, Tensor | None] = {}
        self.num_frames = 0
        self._window_age = 0  # frames that left the window of a Long model since it was computed
        for index in range(latents.shape[1]):
            self._append(latents[:, index : index + 1], None if actions is None else actions[:, index])

    @torch.no_grad()
    def step(self, action: int | Sequence[int] | Tensor | None = None) -> Any:
        """Make and decode the next frame.

        Args:
            action: what leads to it: an int, `[B]` ints, or None for the null condition.

        Returns:
            The frame of each video in the rollout's output type.

        Raises:
            ValueError: for an action that the model does not have.
        """
        num_actions = self.transformer.config.num_actions
        checked = label_tensor("action", action, num_actions, (self.batch_size,), self.device)
        return self.decode(self.step_latents(checked)[:, 0])

    @torch.no_grad()
    def step_latents(
        self,
        action: Tensor | None = None,
        noise: Tensor | None = None,
        callback: DenoisingCallback | None = None,
    ) -> Tensor:
        """Make the next frame.

        Args:
            action: `[B]` actions, negative for null, or None.
            noise: `[B, 1, C, h, w]`; drawn from the generator by default.
            callback: called after each denoising step with its index, its timestep and the latents; returns
                latents.

        Returns:
            `[B, 1, C, h, w]` clean latents.
        """
        if noise is None:
            shape = (self.batch_size, 1, *self._latent_shape)
            noise = randn_tensor(shape, generator=self.generator, device=self.device, dtype=torch.float32)
        context = self._encode_context()
        latents = noise
        if self.transformer.config.use_meanflow:
            # Equal steps to zero. As published, the last one goes from 1/1000 to zero: a forward for nothing.
            sigmas = [1 - index / self.num_inference_steps for index in range(self.num_inference_steps)]
            self.scheduler.set_timesteps(sigmas=sigmas, device=self.device)
        else:
            self.scheduler.set_timesteps(self.num_inference_steps, device=self.device)
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(0)  # saves a look-up that waits for the device
        levels = self.scheduler.timesteps
        ends = torch.cat([levels[1:], levels.new_zeros(1)])
        modulation = self._modulation(ends, action)
        for index, (timestep, end) in enumerate(zip(levels, ends, strict=True)):
            kept = None if modulation is None or index == 0 else modulation[index]
            velocity = self._velocity(context, latents, timestep, end, action, kept).float()
            if self.cache is not None and index == 0:
                self.cache.append(context.long, context.short)
                context = ContextFrames((), ())
            latents = self.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
            if callback is not None:
                latents = callback(index, timestep, latents)
        self._append(latents, action)
        self._forget()
        return latents

    def _append(self, latents: Tensor, action: Tensor | None) -> None:
        self._latents[self.num_frames] = latents
        self._actions[self.num_frames] = action
        self.num_frames += 1

    def _encode_context(self) -> ContextFrames:
        """Bring the cache to the context of the next frame, save for frames that it is to be made with.

        Returns:
            These: the first denoising step computes them too. Without a cache, the whole context.
        """
        context, cache = self.context, self.cache
        if cache is None:
            return context
        interval = self.context_schedule.refresh_interval
        if set(cache.long_frames) != set(context.long):
            self._window_age += 1
            if interval is not None and self._window_age >= interval:
                cache.clear_short()
                self._window_age = 0
        for frame in set(cache.short_frames) - set(context.short):
            cache.drop_short(frame)
        for frame in set(cache.long_frames) - set(context.long):
            cache.drop_long(frame)
        cached_long, cached_short = set(cache.long_frames), set(cache.short_frames)
        long = [frame for frame in context.long if frame not in cached_long]
        short = [frame for frame in context.short if frame not in cached_short]
        while len(long) > _LONG_CHUNK or len(short) > _SHORT_CHUNK:
            long_chunk, long = long[:_LONG_CHUNK], long[_LONG_CHUNK:]
            short_chunk, short = (short[:_SHORT_CHUNK], short[_SHORT_CHUNK:]) if not long else ([], short)
            self._forward(ContextFrames(tuple(long_chunk), tuple(short_chunk)))
            cache.append(long_chunk, short_chunk)
        return ContextFrames(tuple(long), tuple(short))

    def _forget(self) -> None:
        """Drop latents that no later frame needs: those out of context, and those cached for good."""
        context, cache = self.context, self.cache
        needed = {*context.long, *context.short}
        if cache is not None:  # a Long model encodes its window anew whenever the long-term level changes
            needed -= {*(cache.long_frames if self.transformer.is_long else cache.short_frames)}
        for frame in self._latents.keys() - needed:
            del self._latents[frame], self._actions[frame]

    def _modulation(self, ends: Tensor, action: Tensor | None) -> list[list[Tensor]] | None:
        """Of each denoising step of the next frame; None where its weights are not at hand (offloaded)."""
        devices = {weight.device for weight in self.transformer.parameters()}
        if self.cache is None or len(devices) > 1 or devices.pop().type != self.device.type:
            return None
        levels = self.scheduler.timesteps
        labels = self._with_null(self.class_labels)
        actions = self._with_null(self._stack_actions([action] * len(levels)))
        timestep, timestep_r = (values.float().expand(self.num_sequences, -1) for values in (levels, ends))
        if not self.transformer.config.use_meanflow:
            timestep_r = None
        modulation = self.transformer.modulation(timestep, labels, actions, timestep_r)
        return [[layer[:, step : step + 1] for layer in modulation] for step in range(len(levels))]

    def _velocity(
        self,
        context: ContextFrames,
        latents: Tensor,
        timestep: Tensor,
        end: Tensor,
        action: Tensor | None,
        modulation: list[Tensor] | None,
    ) -> Tensor:
        """Velocity `[B, 1, C, h, w]` of the frame being denoised, with guidance."""
        velocity = self._forward(context, latents, timestep, end, action, modulation)[:, -1:]
        if self.do_classifier_free_guidance:
            null, conditioned = velocity.chunk(2)
            velocity = null + self.guidance_scale * (conditioned - null)
        return velocity

    def _forward(
        self,
        context: ContextFrames,
        latents: Tensor | None = None,
        timestep: Tensor | None = None,
        end: Tensor | None = None,
        action: Tensor | None = None,
        modulation: list[Tensor] | None = None,
    ) -> Tensor:
        """Run the model on clean frames of the context, followed by the noisy frame if there is one."""
        frames = [*context.long, *context.short]
        inputs = [self._latents[frame] for frame in frames]
        actions = [self._actions[frame] for frame in frames]
        timesteps = ends = [torch.full((), CLEAN_TIMESTEP, device=self.device)] * len(frames)
        if latents is not None and timestep is not None and end is not None:
            frames, inputs, actions = [*frames, self.num_frames], [*inputs, latents], [*actions, action]
            timesteps, ends = [*timesteps, timestep.float()], [*ends, end.float()]
        hidden_states = torch.cat(inputs, dim=1).to(self.transformer.dtype)
        timestep_r = None  # where a step ends is for models of mean velocities
        if self.transformer.config.use_meanflow:
            timestep_r = torch.stack(ends).expand(self.num_sequences, -1)
        return self.transformer(
            hidden_states.repeat(self.num_sequences // self.batch_size, 1, 1, 1, 1),
            torch.stack(timesteps).expand(self.num_sequences, -1),
            class_labels=self._with_null(self.class_labels),
            actions=self._with_null(self._stack_actions(actions)),
            cache=self.cache,
            flex_rope_slope=self.flex_rope_slope,
            rope_interpolation=self.rope_interpolation,
            num_long_frames=len(context.long),
            frame_positions=torch.tensor(frames, device=self.device),
            modulation=modulation,
            timestep_r=timestep_r,
            return_dict=False,
        )[0]

    def _stack_actions(self, actions: list[Tensor | None]) -> Tensor | None:
        if self.transformer.config.num_actions is None:
            return None
        null = torch.full((self.batch_size,), -1, device=self.device)
        return torch.stack([null if action is None else action for action in actions], dim=1)

    def _with_null(self, labels: Tensor | None) -> Tensor | None:
        """Labels of all sequences: the null condition first where guidance needs both."""
        if labels is None or self.guidance_scale == 0:
            return None
        return (
            torch.cat([torch.full_like(labels, -1), labels]) if self.do_classifier_free_guidance else labels
        )
