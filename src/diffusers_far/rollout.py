"""Rollout: one running video. The pipeline's `__call__` and `stream` are thin loops over it."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .actions import ActionSpace
from .attention import MeasuringAttnProcessor
from .context_schedule import ContextFrames, ContextSchedule
from .flow_matching import CLEAN_TIMESTEP, check_scheduler, set_timesteps
from .inputs import action_tensor, check_integer, check_number
from .kv_cache import Slot
from .transformer_far import FARTransformer3DModel

DenoisingCallback = Callable[[int, Tensor, Tensor], Tensor]

SETTINGS = (
    "guidance_scale",
    "num_inference_steps",
    "flex_rope_slope",
    "rope_interpolation",
    "context_schedule",
)

# Context is encoded in pieces, so that the causal mask of a long context stays small.
_LONG_CHUNK, _SHORT_CHUNK = 64, 32


def check_settings(
    transformer: FARTransformer3DModel,
    scheduler: SchedulerMixin,
    guidance_scale: float,
    num_inference_steps: int,
    flex_rope_slope: float,
    rope_interpolation: float,
    context_schedule: ContextSchedule | None,
) -> None:
    """Raise a ValueError for settings that no rollout of this model can use."""
    config = transformer.config
    check_scheduler(scheduler, config.use_meanflow)
    check_number("guidance_scale", guidance_scale, "0 (null condition only), 1 (none), or more than 0")
    check_number(
        "flex_rope_slope", flex_rope_slope, "0 (plain RoPE), a positive decay per frame or, in a call, 'auto'"
    )
    check_number("rope_interpolation", rope_interpolation, "a positive ratio; 1 changes nothing")
    check_integer("num_inference_steps", num_inference_steps, minimum=1)
    if rope_interpolation == 0:
        raise ValueError("rope_interpolation=0 must be a positive ratio; 1 changes nothing")
    if guidance_scale != 1 and not (config.num_classes or transformer.action_space):
        raise ValueError(
            f"guidance_scale={guidance_scale}: this model has no classes or actions to guide; pass 1"
        )
    if context_schedule is not None and not isinstance(context_schedule, ContextSchedule):
        raise ValueError(f"context_schedule={context_schedule!r} must be a ContextSchedule or None")


class Rollout:
    """A video that grows by one frame per `step`.

    Made by [`FARVideoPipeline.rollout`]. Frames are numbered from 0, the given ones included. Only what the
    context schedule still needs is kept, and what `rewind` may need, so a rollout with a bounded schedule
    runs in constant memory.

    Args:
        transformer: the model.
        scheduler: flow-matching scheduler; the rollout works on a copy of its own.
        encode: turns what `append` is given into scaled latents `[B, T, C, h, w]`.
        decode: turns a frame's latents `[B, C, h, w]` into what `step` returns.
        context_latents: `[B, T, C, h, w]` scaled latents of the frames to continue; T may be 0.
        context_actions: `[B, T]` actions that led to them (negative: null), or None; of a model with groups
            of actions `[B, T, G]`, with vectors `[B, T, A]` (NaN: null).
        class_labels: `[B]` class of each video (negative: null), or None.
        guidance_scale: 1 samples with the condition, 0 with the null condition, anything else mixes the two.
        num_inference_steps: denoising steps per frame.
        flex_rope_slope: temporal decay of FlexRoPE; 0 is plain RoPE.
        rope_interpolation: ratio by which RoPE's frame positions are divided.
        context_schedule: what the context keeps; by default as many frames as the model was trained with.
        num_training_frames: how many these are; None if unknown.
        use_cache: keep keys and values of the context; without, all kept frames are computed anew in every
            step. The two agree as long as no frame is dropped: a cached frame remembers dropped ones that it
            saw. The window of a Long model is computed anew in both, so its own frames are exact.
        max_rewind_frames: how many frames `rewind` can take back.
        generator: for the noise, one or one per video.
        device: where to compute.
    """

    def __init__(
        self,
        transformer: FARTransformer3DModel,
        scheduler: SchedulerMixin,
        encode: Callable[[Any], Tensor],
        decode: Callable[[Tensor], Any],
        context_latents: Tensor,
        context_actions: Tensor | None = None,
        class_labels: Tensor | None = None,
        guidance_scale: float = 1.0,
        num_inference_steps: int = 50,
        flex_rope_slope: float = 0.0,
        rope_interpolation: float = 1.0,
        context_schedule: ContextSchedule | None = None,
        num_training_frames: int | None = None,
        use_cache: bool = True,
        max_rewind_frames: int = 64,
        generator: torch.Generator | list[torch.Generator] | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.guidance_scale: float
        self.num_inference_steps: int
        self.flex_rope_slope: float
        self.rope_interpolation: float
        self.context_schedule: ContextSchedule
        self.transformer = transformer
        self.scheduler = copy.deepcopy(scheduler)
        self.encode = encode
        self.decode = decode
        self.class_labels = class_labels
        self.num_training_frames = num_training_frames
        self.use_cache = use_cache
        self.max_rewind_frames = max_rewind_frames
        self.generator = generator
        self.device = device or transformer.device
        self._dtype = transformer.dtype  # diffusers finds it by a walk through all modules
        self._start = (context_latents, context_actions)
        self.batch_size, _, *self._latent_shape = context_latents.shape
        self.change(
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps,
            flex_rope_slope=flex_rope_slope,
            rope_interpolation=rope_interpolation,
            context_schedule=context_schedule,
        )
        self.reset()

    @property
    def context(self) -> ContextFrames:
        """The frames that the next frame will see: those of the schedule whose latents are kept."""
        context = self.context_schedule.context(self.num_frames, self.transformer.short_window)
        frames = (*context.long, *context.short)
        places = {frame: place for frame, place in zip(frames, context.positions, strict=True)}
        long, short = (tuple(frame for frame in level if frame in self._latents) for level in context[:2])
        return ContextFrames(long, short, tuple(places[frame] for frame in (*long, *short)))

    @property
    def context_latents(self) -> Tensor:
        """`[B, T, C, h, w]` of the frames that it began with."""
        return self._start[0]

    @property
    def num_rewindable_frames(self) -> int:
        """How many frames `rewind` can take back now."""
        return self.num_frames - self._oldest

    # --------------------------------------------------------------------------------------------------------
    # Verbs

    def reset(self) -> None:
        """Go back to the start: the first context, no new frames. The generator goes on where it is."""
        if self.cache is not None:
            self.cache.reset()
        self._latents: dict[int, Tensor] = {}
        self._actions: dict[int, Tensor | None] = {}
        self.num_frames = 0
        self._oldest = 0  # number of frames to which `rewind` can go back
        self._window_age = 0
        self._append(*self._start)

    def change(self, **settings: Any) -> None:
        """Go on with other settings; the context is computed anew for them.

        Args:
            settings: any of `guidance_scale`, `num_inference_steps`, `flex_rope_slope`, `rope_interpolation`
                and `context_schedule`, as when the rollout was made. A schedule that keeps more than the one
                before brings back what is kept for rewinding, not what is gone.

        Raises:
            ValueError: for a setting that the model cannot use; nothing has changed then.
        """
        new: dict[str, Any] = {name: getattr(self, name, None) for name in SETTINGS} | settings
        check_settings(self.transformer, self.scheduler, **new)
        for name, value in new.items():
            setattr(self, name, value)
        schedule = self.context_schedule or ContextSchedule()
        self.context_schedule = schedule.for_model(self.transformer.short_window, self.num_training_frames)
        # Both halves stay in the cache, so guidance that the rollout began with may change on the way.
        self.do_classifier_free_guidance = self.guidance_scale not in (0, 1)
        self.num_sequences = self.batch_size * (2 if self.do_classifier_free_guidance else 1)
        self.cache = None
        if self.use_cache:
            height, width = self._latent_shape[-2:]
            self.cache = self.transformer.create_cache(self.num_sequences, height, width, self.device)
        self._window_age = 0  # frames that left the window of a Long model since it was computed
        self.num_timesteps = len(self._set_timesteps())  # of a frame; some solvers take more than its steps

    @torch.no_grad()
    def step(self, action: Any = None) -> Any:
        """Make and decode the next frame.

        Args:
            action: what leads to it: an int, `[B]` ints, or None for the null condition. `[G]` or `[B, G]`
                integers of a model with groups of actions, `[A]` or `[B, A]` numbers of one with vectors.

        Returns:
            The frame of each video in the rollout's output type.

        Raises:
            ValueError: for an action that the model does not have.
        """
        space = self.transformer.action_space
        checked = action_tensor("action", action, space, (self.batch_size,), self.device)
        return self.decode(self.step_latents(checked)[:, 0])

    @torch.no_grad()
    def append(self, video: Any = None, actions: Any = None, video_latents: Tensor | None = None) -> None:
        """Let real frames follow, at any time; later frames see them as they see the others.

        Args:
            video: frames in any form that the pipeline takes, of the size of the rollout's.
            actions: `[B, T]` or `[T]` actions that led to them (`[..., G]` of groups, `[..., A]` of vectors);
                None is the null condition.
            video_latents: `[B, T, C, h, w]` scaled latents instead of `video`.

        Raises:
            ValueError: when both are given or none, or they do not fit the rollout.
        """
        if (video is None) == (video_latents is None):
            raise ValueError("append takes video or video_latents, one of them")
        name = "video" if video_latents is None else "video_latents"
        latents = self.encode(video) if video_latents is None else video_latents
        expected = (self.batch_size, latents.shape[1] if latents.ndim == 5 else "T", *self._latent_shape)
        if tuple(latents.shape) != expected:
            raise ValueError(f"{name} has latents of shape {tuple(latents.shape)}; it takes {expected}")
        shape = (self.batch_size, latents.shape[1])
        self._append(
            latents.to(self.device, torch.float32),
            action_tensor("actions", actions, self.transformer.action_space, shape, self.device),
        )

    def rewind(self, num_frames: int) -> None:
        """Take back the last frames. The generator goes on where it is.

        Args:
            num_frames: how many, up to `num_rewindable_frames`.

        Raises:
            ValueError: for more of them.
        """
        if not 0 <= num_frames <= self.num_rewindable_frames:
            raise ValueError(
                f"num_frames={num_frames} must be 0 to {self.num_rewindable_frames}: older frames are not "
                f"kept (max_rewind_frames={self.max_rewind_frames})"
            )
        self.num_frames -= num_frames
        for frame in [frame for frame in self._latents if frame >= self.num_frames]:
            del self._latents[frame], self._actions[frame]
        if self.cache is not None:
            self.cache.reconcile([slot for slot in self.cache.slots if slot.frame < self.num_frames])

    @torch.no_grad()
    def frame_attention(self) -> dict[int, float]:
        """How much the frame that `step` made last looks at each frame of its context.

        One more forward of that frame, clean, in which no other thread may use the model.

        Returns:
            Share of its attention by number of frame, the mean over layers, heads and tokens; what is missing
            to 1 is its attention to itself. Empty where no context is cached, as after `reset` or `change`.
        """
        newest = self.num_frames - 1
        if self.cache is None or newest not in self._latents or not self.cache.slots:
            return {}
        if any(slot.frame >= newest for slot in self.cache.slots):
            return {}
        slots, processors = list(self.cache.slots), self.transformer.attn_processors
        measuring = MeasuringAttnProcessor()
        self.transformer.set_attn_processor(measuring)
        try:
            self._forward([Slot(newest, False, newest)])
        finally:
            self.transformer.set_attn_processor(processors)
        weights, counts = torch.stack(measuring.weights).mean(dim=0), self.cache.token_counts
        shares = weights[: sum(counts)].split(counts)
        return {slot.frame: float(share.sum()) for slot, share in zip(slots, shares, strict=True)}

    def fork(self) -> "Rollout":
        """Another rollout that goes on from here. The two share the model, and nothing that changes."""
        branch = copy.copy(self)
        branch.scheduler = copy.deepcopy(self.scheduler)
        branch._latents, branch._actions = dict(self._latents), dict(self._actions)
        branch.cache = None if self.cache is None else self.cache.copy()
        if isinstance(self.generator, list):
            branch.generator = [_copy_generator(generator) for generator in self.generator]
        elif self.generator is not None:
            branch.generator = _copy_generator(self.generator)
        return branch

    def state_dict(self) -> dict[str, Tensor]:
        """All that changes as the video grows, as tensors (for `safetensors`, say).

        A rollout of the same model and settings goes on from it exactly as this one would.
        """
        frames = sorted(self._latents)
        empty = torch.zeros(self.batch_size, 0, *self._latent_shape, device=self.device)
        counts = [self.num_frames, self._oldest, self._window_age]
        state = {
            "counts": torch.tensor(counts),
            "frames": torch.tensor(frames, dtype=torch.long),
            "latents": torch.cat([empty, *(self._latents[frame] for frame in frames)], dim=1),
            "actions": self._action_table([self._actions[frame] for frame in frames]),
            "start_latents": self._start[0].clone(),
        }
        if self._start[1] is not None:
            state["start_actions"] = self._start[1].clone()
        if self.cache is not None:
            state |= {f"cache.{name}": value for name, value in self.cache.state_dict().items()}
        for index, generator in enumerate(self._generators()):
            state[f"generator.{index}"] = generator.get_state()
        # Safetensors takes no others; given frames may lie in memory as their encoder left them.
        return {name: value.contiguous() for name, value in state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from where the rollout was that `state` is of.

        Raises:
            ValueError: when that one had other videos, another size of frames, or other settings.
        """
        generators = self._generators()
        num_given = sum(name.startswith("generator.") for name in state)
        shape = (self.batch_size, *self._latent_shape)
        for name, found, takes in (
            ("latents [B, C, h, w]", (state["latents"].shape[0], *state["latents"].shape[2:]), shape),
            ("use_cache", "cache.keys" in state, self.cache is not None),
            ("generators", num_given, len(generators)),
        ):
            if found != takes:
                raise ValueError(f"state is of a rollout with {name}: {found}; this one has {takes}")
        if self.cache is not None:
            prefix = "cache."
            self.cache.load_state_dict(
                {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            )
        for index, generator in enumerate(generators):
            generator.set_state(state[f"generator.{index}"].cpu())
        start_actions = state.get("start_actions")
        self._start = (
            state["start_latents"].to(self.device),
            None if start_actions is None else start_actions.to(self.device),
        )
        self.num_frames, self._oldest, self._window_age = state["counts"].tolist()
        frames, latents = state["frames"].tolist(), state["latents"].to(self.device)
        actions = state["actions"].to(self.device)
        self._latents = {frame: latents[:, i : i + 1] for i, frame in enumerate(frames)}
        self._actions = {frame: actions[:, i] for i, frame in enumerate(frames)}

    # --------------------------------------------------------------------------------------------------------
    # Sampling

    @torch.no_grad()
    def step_latents(
        self,
        action: Tensor | None = None,
        noise: Tensor | None = None,
        callback: DenoisingCallback | None = None,
    ) -> Tensor:
        """Make the next frame.

        Args:
            action: `[B]` actions, negative for null, or None; `[B, G]` of groups, `[B, A]` of vectors.
            noise: `[B, 1, C, h, w]`; drawn from the generator by default.
            callback: called after each denoising step with its index, its timestep and the latents; returns
                latents.

        Returns:
            `[B, 1, C, h, w]` clean latents.
        """
        if noise is None:
            shape = (self.batch_size, 1, *self._latent_shape)
            noise = randn_tensor(shape, generator=self.generator, device=self.device, dtype=torch.float32)
        missing, latents = self._reconcile(), noise
        levels = self._set_timesteps()
        draws = {}  # a scheduler that draws noise in its steps draws it from the same generator
        if "generator" in inspect.signature(self.scheduler.step).parameters:
            draws = {"generator": self.generator}
        ends = torch.cat([levels[1:], levels.new_zeros(1)])
        modulation = self._modulation(ends, action)
        for index, (timestep, end) in enumerate(zip(levels, ends, strict=True)):
            kept = None if modulation is None or missing else modulation[index]
            velocity = self._velocity(missing, latents, timestep, end, action, kept).float()
            if self.cache is not None and index == 0:
                self.cache.commit(missing)
                missing = []
            latents = self.scheduler.step(velocity, timestep, latents, return_dict=False, **draws)[0]
            if callback is not None:
                latents = callback(index, timestep, latents)
        if not torch.isfinite(latents).all():
            raise FloatingPointError(
                f"frame {self.num_frames} came out with values that are NaN or infinite (guidance_scale="
                f"{self.guidance_scale}, flex_rope_slope={self.flex_rope_slope}): it is not kept"
            )
        self._append(latents, None if action is None else action[:, None])
        return latents

    def _set_timesteps(self) -> Tensor:
        num_tokens = self.transformer.tokens_per_frame(*self._latent_shape[-2:])[1]
        any_step = self.transformer.config.use_meanflow
        set_timesteps(self.scheduler, self.num_inference_steps, self.device, num_tokens, any_step)
        return self.scheduler.timesteps

    def _append(self, latents: Tensor, actions: Tensor | None) -> None:
        """Let frames `[B, T, C, h, w]` follow, and drop latents that no later frame needs."""
        for index in range(latents.shape[1]):
            self._latents[self.num_frames] = latents[:, index : index + 1]
            self._actions[self.num_frames] = None if actions is None else actions[:, index]
            self.num_frames += 1
        self._oldest = max(self._oldest, self.num_frames - self.max_rewind_frames)
        context = self.context_schedule.context(self._oldest, self.transformer.short_window)
        needed = {*context.long, *context.short, *range(self._oldest, self.num_frames)}
        for frame in self._latents.keys() - needed:  # a frame that is out of context stays out
            del self._latents[frame], self._actions[frame]

    def _reconcile(self) -> list[Slot]:
        """Bring the cache to the context of the next frame, save for frames that it is to be made with.

        Returns:
            These: the first denoising step computes them too. Without a cache, the whole context.
        """
        context, cache = self.context, self.cache
        frames, num_long = (*context.long, *context.short), len(context.long)
        slots = [
            Slot(frame, index < num_long, position)
            for index, (frame, position) in enumerate(zip(frames, context.positions, strict=True))
        ]
        if cache is None:
            return slots
        held, wanted = set(cache.slots), set(slots)
        changed = held - wanted or any(slot.is_long for slot in wanted - held)
        if self.transformer.is_long and changed:  # what the frames of the window have seen is no longer so
            self._window_age += 1
            interval = self.context_schedule.refresh_interval
            if interval is not None and self._window_age >= interval:
                cache.clear_short()
                self._window_age = 0
        missing = cache.reconcile(slots)
        long, short = ([slot for slot in missing if slot.is_long == level] for level in (True, False))
        while len(long) > _LONG_CHUNK or len(short) > _SHORT_CHUNK:
            long_chunk, long = long[:_LONG_CHUNK], long[_LONG_CHUNK:]
            short_chunk, short = (short[:_SHORT_CHUNK], short[_SHORT_CHUNK:]) if not long else ([], short)
            self._forward([*long_chunk, *short_chunk])
            cache.commit([*long_chunk, *short_chunk])
        return [*long, *short]

    def _modulation(self, ends: Tensor, action: Tensor | None) -> list[list[Tensor]] | None:
        """Of each denoising step of the next frame; None where its weights are not at hand (offloaded)."""
        devices = {weight.device for weight in self.transformer.parameters()}
        if self.cache is None or len(devices) > 1 or devices.pop().type != self.device.type:
            return None
        levels = self.scheduler.timesteps
        labels, space = self._with_null(self.class_labels), self.transformer.action_space
        actions = self._with_null(self._stack_actions([action] * len(levels)), space)
        timestep, timestep_r = (values.float().expand(self.num_sequences, -1) for values in (levels, ends))
        if not self.transformer.config.use_meanflow:
            timestep_r = None
        modulation = self.transformer.modulation(timestep, labels, actions, timestep_r)
        return [[layer[:, step : step + 1] for layer in modulation] for step in range(len(levels))]

    def _velocity(
        self,
        missing: list[Slot],
        latents: Tensor,
        timestep: Tensor,
        end: Tensor,
        action: Tensor | None,
        modulation: list[Tensor] | None,
    ) -> Tensor:
        """Velocity `[B, 1, C, h, w]` of the frame being denoised, with guidance."""
        velocity = self._forward(missing, latents, timestep, end, action, modulation)[:, -1:]
        if self.do_classifier_free_guidance:
            null, conditioned = velocity.chunk(2)
            velocity = null + self.guidance_scale * (conditioned - null)
        return velocity

    def _forward(
        self,
        context: list[Slot],
        latents: Tensor | None = None,
        timestep: Tensor | None = None,
        end: Tensor | None = None,
        action: Tensor | None = None,
        modulation: list[Tensor] | None = None,
    ) -> Tensor:
        """Run the model on clean frames of the context, followed by the noisy frame if there is one."""
        positions = [slot.position for slot in context]
        inputs = [self._latents[slot.frame] for slot in context]
        actions = [self._actions[slot.frame] for slot in context]
        timesteps = ends = [torch.full((), CLEAN_TIMESTEP, device=self.device)] * len(context)
        if latents is not None and timestep is not None and end is not None:
            positions, inputs = [*positions, self.num_frames], [*inputs, latents]
            actions = [*actions, action]
            timesteps, ends = [*timesteps, timestep.float()], [*ends, end.float()]
        hidden_states = torch.cat(inputs, dim=1).to(self._dtype)
        timestep_r = None  # where a step ends is for models of mean velocities
        if self.transformer.config.use_meanflow:
            timestep_r = torch.stack(ends).expand(self.num_sequences, -1)
        return self.transformer(
            hidden_states.repeat(self.num_sequences // self.batch_size, 1, 1, 1, 1),
            torch.stack(timesteps).expand(self.num_sequences, -1),
            class_labels=self._with_null(self.class_labels),
            actions=self._with_null(self._stack_actions(actions), self.transformer.action_space),
            cache=self.cache,
            flex_rope_slope=self.flex_rope_slope,
            rope_interpolation=self.rope_interpolation,
            num_long_frames=sum(slot.is_long for slot in context),
            frame_positions=torch.tensor(positions, device=self.device),
            modulation=modulation,
            timestep_r=timestep_r,
            return_dict=False,
        )[0]

    def _stack_actions(self, actions: list[Tensor | None]) -> Tensor | None:
        if self.transformer.action_space is None:
            return None
        return self._action_table(actions).to(self.device)

    def _action_table(self, actions: list[Tensor | None]) -> Tensor:
        """`[B, F, ...]` of the actions `[B, ...]` of F frames, null where there is none."""
        space = self.transformer.action_space or ActionSpace(1)
        if not actions:
            return space.null((self.batch_size, 0))
        device = next((action.device for action in actions if action is not None), None)
        null = space.null((self.batch_size,), device)
        return torch.stack([null if action is None else action for action in actions], dim=1)

    def _with_null(self, labels: Tensor | None, space: ActionSpace | None = None) -> Tensor | None:
        """Labels, or actions of `space`, of all sequences: the null ones first where guidance needs both."""
        if labels is None or (self.guidance_scale == 0 and not self.do_classifier_free_guidance):
            return None
        if not self.do_classifier_free_guidance:
            return labels
        null = torch.full_like(labels, -1 if space is None else space.null_value)
        return torch.cat([null, labels])

    def _generators(self) -> list[torch.Generator]:
        if self.generator is None:
            return []
        return self.generator if isinstance(self.generator, list) else [self.generator]


def _copy_generator(generator: torch.Generator) -> torch.Generator:
    copied = torch.Generator(generator.device)
    copied.set_state(generator.get_state())
    return copied
