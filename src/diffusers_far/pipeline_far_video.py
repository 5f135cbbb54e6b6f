"""FARVideoPipeline: continue or generate videos frame by frame."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderDC, DiffusionPipeline, SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from PIL import Image
from torch import Tensor

from .context_schedule import ContextSchedule
from .pipeline_inputs import (
    Labels,
    check_action_names,
    check_integer,
    check_number,
    check_size,
    check_tensor,
    empty_videos,
    label_tensor,
    num_videos,
    video_tensor,
)
from .rollout import Rollout
from .transformer_far import FARTransformer3DModel

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
Generators = torch.Generator | list[torch.Generator]
StepCallback = Callable[["FARVideoPipeline", int, Tensor, dict[str, Any]], dict[str, Any]]


@dataclass
class FARVideoPipelineOutput(BaseOutput):
    """Output of [`FARVideoPipeline`].

    Args:
        frames: the videos, context first. "pil": a list of PIL images per video; "np": `[B, F, H, W, 3]` in
            [0, 1]; "pt": `[B, F, 3, H, W]` in [0, 1]; "latent": `[B, F, C, h, w]`.
    """

    frames: list[list[Image.Image]] | np.ndarray | Tensor


class _Interrupted(Exception):
    """Leaves the denoising loop of an interrupted call."""


class FARVideoPipeline(DiffusionPipeline):
    """Generates video with FAR, frame after frame, each seeing all frames before it (arXiv 2503.19325).

    Args:
        transformer: FAR, base or Long.
        vae: autoencoder of single frames; its `scaling_factor` is the only normalisation of the latents.
        scheduler: flow-matching scheduler; Euler (`FlowMatchEulerDiscreteScheduler`) is published.
        flex_rope_slope: default temporal decay of FlexRoPE, kept with the checkpoint.
        num_inference_steps: default denoising steps per frame, kept with the checkpoint.
        sample_size: default height and width of videos in pixels, kept with the checkpoint.
        action_names: what each action is called, kept with the checkpoint.
    """

    model_cpu_offload_seq = "transformer->vae"
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        transformer: FARTransformer3DModel,
        vae: AutoencoderDC,
        scheduler: SchedulerMixin,
        flex_rope_slope: float = 0.0,
        num_inference_steps: int = 50,
        sample_size: int | None = None,
        action_names: list[str] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)
        self.register_to_config(
            flex_rope_slope=flex_rope_slope,
            num_inference_steps=num_inference_steps,
            sample_size=sample_size,
            action_names=action_names,
        )
        check_action_names(action_names, getattr(self, "transformer", None))
        self.vae_scale_factor = self.vae.spatial_compression_ratio if getattr(self, "vae", None) else 8
        self.video_processor = VideoProcessor(vae_scale_factor=self.vae_scale_factor)
        self._guidance_scale = 1.0
        self._num_timesteps = 0
        self._interrupt = False
        self._new_latents: list[Tensor] = []
        self._context_latents: Tensor | None = None

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale not in (0, 1)

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Setting `_interrupt` (in a callback or from another thread) ends a call with the frames it has."""
        return self._interrupt

    @property
    def frame_multiple(self) -> int:
        """Height and width of a video must be multiples of this."""
        config = self.transformer.config
        return int(self.vae_scale_factor * math.lcm(config.patch_size, config.long_patch_size or 1))

    @torch.no_grad()
    def __call__(
        self,
        video: Any = None,
        video_latents: Tensor | None = None,
        num_frames: int = 32,
        class_labels: Labels | None = None,
        actions: Labels | None = None,
        guidance_scale: float = 1.0,
        num_inference_steps: int | None = None,
        flex_rope_slope: float | None = None,
        rope_interpolation: float = 1.0,
        context_schedule: ContextSchedule | None = None,
        generator: Generators | None = None,
        latents: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        batch_size: int = 1,
        use_cache: bool = True,
        output_type: str = "pil",
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        return_dict: bool = True,
    ) -> FARVideoPipelineOutput | tuple[Any]:
        """Generate videos, or continue given ones.

        Args:
            video: frames to continue: `[B, T, 3, H, W]` or `[T, 3, H, W]` tensor in [0, 1]; array `[B, T, H,
                W, 3]` or `[T, H, W, 3]`, uint8 or float in [0, 1]; a PIL image, a list of them or of such
                lists; a video file.
            video_latents: `[B, T, C, h, w]` scaled latents instead of `video`.
            num_frames: frames of the result, context included.
            class_labels: class of each video; -1 or `num_classes` is the null condition, as is None.
            actions: `[B, num_frames]` or `[num_frames]`; action t led to frame t; null as for `class_labels`.
            guidance_scale: 1 samples with the condition, 0 with the null condition only (the authors' -1),
                above 1 guides: null + scale * (conditioned - null).
            num_inference_steps: denoising steps per frame; by default the checkpoint's.
            flex_rope_slope: FlexRoPE's decay of logits per frame of distance; by default the checkpoint's.
            rope_interpolation: divide RoPE's frame positions by this ratio, for comparison with FlexRoPE.
            context_schedule: what is kept as context; by default everything.
            generator: one for all, or one per video.
            latents: noise `[B, new frames, C, h, w]` instead of a draw from the generator.
            height, width: size of the frames in pixels, by default the checkpoint's `sample_size`, else that
                of `video`; a `video` of another size is resized to cover it and cropped at the centre.
            batch_size: videos to make when neither `video` nor labels say how many.
            use_cache: see [`Rollout`].
            output_type: "pil", "np", "pt" or "latent".
            callback_on_step_end: called as (pipeline, step, timestep, tensors) after every denoising step,
                steps counted over all frames; may return changed tensors.
            callback_on_step_end_tensor_inputs: which tensors it gets, of `_callback_tensor_inputs`.
            return_dict: return a [`FARVideoPipelineOutput`] instead of a tuple.

        Raises:
            ValueError: for an argument that does not fit; it says what it got and what it takes.
        """
        check_integer("num_frames", num_frames, minimum=1)
        tensor_inputs = list(callback_on_step_end_tensor_inputs)
        if not set(tensor_inputs) <= set(self._callback_tensor_inputs):
            known = self._callback_tensor_inputs
            raise ValueError(f"callback_on_step_end_tensor_inputs={tensor_inputs} takes some of {known}")
        self._interrupt = False
        self._new_latents = []
        context = self.prepare_context(video, video_latents, class_labels, actions, height, width, batch_size)
        self._context_latents = context
        num_context, num_new = context.shape[1], num_frames - context.shape[1]
        if num_new < 1:
            raise ValueError(f"num_frames={num_frames} must be more than the {num_context} context frames")
        action_table = self.prepare_actions(actions, context.shape[0], num_frames)
        rollout = self.rollout(
            video_latents=context,
            context_actions=None if action_table is None else action_table[:, :num_context],
            class_labels=class_labels,
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps,
            flex_rope_slope=flex_rope_slope,
            rope_interpolation=rope_interpolation,
            context_schedule=context_schedule,
            generator=generator,
            use_cache=use_cache,
            output_type=output_type,
        )
        noise = self.prepare_latents(latents, context, num_new, generator)
        with self.progress_bar(total=num_new) as frame_bar:
            frame_bar.set_description("frames")
            for index in range(num_new):
                frame = self._denoise_frame(
                    rollout,
                    None if action_table is None else action_table[:, num_context + index],
                    noise[:, index : index + 1],
                    index,
                    callback_on_step_end,
                    tensor_inputs,
                )
                if frame is None:
                    break
                self._new_latents.append(frame)
                frame_bar.update()
        frames = self.frames_so_far(output_type)
        self.maybe_free_model_hooks()
        return FARVideoPipelineOutput(frames=frames) if return_dict else (frames,)

    def _denoise_frame(
        self,
        rollout: Rollout,
        action: Tensor | None,
        noise: Tensor,
        index: int,
        callback: StepCallback | None,
        tensor_inputs: Sequence[str],
    ) -> Tensor | None:
        """One frame `[B, 1, C, h, w]`, or None when interrupted on the way."""
        with self.progress_bar(total=self.num_timesteps) as step_bar:
            step_bar.set_description("steps")
            step_bar.leave = False

            def on_step(step: int, timestep: Tensor, latents: Tensor) -> Tensor:
                if callback is not None:
                    tensors = {"latents": latents}
                    callback_kwargs = {name: tensors[name] for name in tensor_inputs}
                    returned = callback(self, index * self.num_timesteps + step, timestep, callback_kwargs)
                    latents = (returned or {}).get("latents", latents)
                step_bar.update()
                if self.interrupt:
                    raise _Interrupted
                return latents

            try:
                return rollout.step_latents(action, noise, on_step)
            except _Interrupted:
                return None

    @torch.no_grad()
    def frames_so_far(self, output_type: str = "pil") -> Any:
        """Context and complete frames of the last call, also after an interruption or an exception.

        Args:
            output_type: "pil", "np", "pt" or "latent".
        """
        if self._context_latents is None:
            raise ValueError("frames_so_far: no call has been made yet")
        latents = torch.cat([self._context_latents, *self._new_latents], dim=1)
        if output_type == "latent":
            return latents
        if latents.shape[1] == 0:  # interrupted before the first frame
            return empty_videos(latents, self.vae_scale_factor, output_type)
        frames = [self.decode_latents(latents[:, index]) for index in range(latents.shape[1])]
        return self.video_processor.postprocess_video(torch.stack(frames, dim=2), output_type=output_type)

    @torch.no_grad()
    def rollout(
        self,
        video: Any = None,
        video_latents: Tensor | None = None,
        context_actions: Labels | None = None,
        class_labels: Labels | None = None,
        guidance_scale: float = 1.0,
        num_inference_steps: int | None = None,
        flex_rope_slope: float | None = None,
        rope_interpolation: float = 1.0,
        context_schedule: ContextSchedule | None = None,
        generator: Generators | None = None,
        height: int | None = None,
        width: int | None = None,
        batch_size: int = 1,
        use_cache: bool = True,
        output_type: str = "pil",
    ) -> Rollout:
        """A video to continue step by step: `frame = rollout.step(action=2)`.

        Arguments as for a call, but `context_actions` `[B, T]` or `[T]` are those of the T given frames only.
        A step returns one frame per video: "pil": a list of images; "np": `[B, H, W, 3]`; "pt":
        `[B, 3, H, W]`; "latent": `[B, C, h, w]`.
        """
        context = self.prepare_context(
            video, video_latents, class_labels, context_actions, height, width, batch_size
        )
        actions = self.prepare_actions(
            context_actions, context.shape[0], context.shape[1], name="context_actions"
        )
        num_classes, device = self.transformer.config.num_classes, self._execution_device
        labels = label_tensor("class_labels", class_labels, num_classes, (context.shape[0],), device)
        if num_inference_steps is None:
            num_inference_steps = self.config.num_inference_steps
        if flex_rope_slope is None:
            flex_rope_slope = self.config.flex_rope_slope
        settings: dict[str, Any] = {
            "guidance_scale": guidance_scale,
            "num_inference_steps": num_inference_steps,
            "flex_rope_slope": flex_rope_slope,
            "rope_interpolation": rope_interpolation,
            "context_schedule": context_schedule,
            "generator": generator,
        }
        self.check_inputs(context.shape[0], output_type, **settings)
        self._guidance_scale = guidance_scale
        self._num_timesteps = num_inference_steps
        return Rollout(
            self.transformer,
            self.scheduler,
            lambda latents: self._decode_frame(latents, output_type),
            context,
            context_actions=actions,
            class_labels=labels,
            use_cache=use_cache,
            device=device,
            **settings,
        )

    @torch.no_grad()
    def stream(
        self, actions: Iterable[Any] | None = None, num_new_frames: int | None = None, **kwargs: Any
    ) -> Iterator[Any]:
        """Yield new frames one by one, as long as there are actions and in constant memory.

        Args:
            actions: the action of each new frame, as they come: ints, `[B]` ints or None.
            num_new_frames: where to stop; by default when `actions` ends, or never.
            kwargs: arguments of [`rollout`](FARVideoPipeline.rollout).
        """
        rollout = self.rollout(**kwargs)
        for action in itertools.islice(
            itertools.repeat(None) if actions is None else actions, num_new_frames
        ):
            yield rollout.step(action)

    def check_inputs(
        self,
        batch_size: int,
        output_type: str,
        guidance_scale: float,
        num_inference_steps: int,
        flex_rope_slope: float,
        rope_interpolation: float,
        context_schedule: ContextSchedule | None,
        generator: Generators | None,
    ) -> None:
        """Raise a ValueError for settings that no rollout can use."""
        config = self.transformer.config
        check_number("guidance_scale", guidance_scale, "0 (null condition only), 1 (none), or more than 0")
        check_number("flex_rope_slope", flex_rope_slope, "0 (plain RoPE) or a positive decay per frame")
        check_number("rope_interpolation", rope_interpolation, "a positive ratio; 1 changes nothing")
        check_integer("num_inference_steps", num_inference_steps, minimum=1)
        if rope_interpolation == 0:
            raise ValueError("rope_interpolation=0 must be a positive ratio; 1 changes nothing")
        if guidance_scale != 1 and not (config.num_classes or config.num_actions):
            raise ValueError(
                f"guidance_scale={guidance_scale}: this model has no classes or actions to guide; pass 1"
            )
        if context_schedule is not None and not isinstance(context_schedule, ContextSchedule):
            raise ValueError(f"context_schedule={context_schedule!r} must be a ContextSchedule or None")
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"generator has {len(generator)} entries for {batch_size} videos")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type={output_type!r} must be one of {OUTPUT_TYPES}")

    def prepare_context(
        self,
        video: Any,
        video_latents: Tensor | None,
        class_labels: Labels | None,
        actions: Labels | None,
        height: int | None,
        width: int | None,
        batch_size: int,
    ) -> Tensor:
        """Scaled latents `[B, T, C, h, w]` of the context; T is 0 for a video from nothing."""
        if video is not None and video_latents is not None:
            raise ValueError("video and video_latents are both given; give one of them, or neither")
        if video is not None:
            return self.encode_video(video, height, width)
        channels = self.transformer.config.in_channels
        multiple = self.frame_multiple // self.vae_scale_factor
        if video_latents is not None:
            check_tensor("video_latents", video_latents)
            shape = tuple(video_latents.shape)
            if len(shape) != 5 or shape[2] != channels or shape[3] % multiple or shape[4] % multiple:
                takes = f"[B, T, {channels}, h, w] with h and w multiples of {multiple}"
                raise ValueError(f"video_latents has shape {shape}; it takes {takes}")
            return video_latents.to(self._execution_device, torch.float32)
        height, width = (self.config.sample_size if size is None else size for size in (height, width))
        if height is None or width is None:
            raise ValueError(f"height={height} and width={width} are needed when no video is given")
        check_size(height, width, self.frame_multiple)
        check_integer("batch_size", batch_size, minimum=1)
        batch_size = max(batch_size, num_videos(class_labels, 0), num_videos(actions, 1))
        size = (height // self.vae_scale_factor, width // self.vae_scale_factor)
        return torch.zeros(batch_size, 0, channels, *size, device=self._execution_device)

    def encode_video(self, video: Any, height: int | None = None, width: int | None = None) -> Tensor:
        """Scaled latents `[B, T, C, h, w]` of a video as in a call; each frame is encoded alone."""
        height, width = (self.config.sample_size if size is None else size for size in (height, width))
        frames = video_tensor(video, height, width)
        check_size(frames.shape[-2], frames.shape[-1], self.frame_multiple)
        device, dtype = self._execution_device, self.vae.dtype
        latents = [
            self.vae.encode(frame.to(device, dtype) * 2 - 1).latent.float() for frame in frames.unbind(1)
        ]
        return torch.stack(latents, dim=1) * self.vae.config.scaling_factor

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Pixels `[B, 3, H, W]`, about [-1, 1], of a frame's scaled latents `[B, C, h, w]`."""
        return self.vae.decode((latents / self.vae.config.scaling_factor).to(self.vae.dtype)).sample.float()

    def _decode_frame(self, latents: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return latents
        return self.video_processor.postprocess(self.decode_latents(latents), output_type=output_type)

    def prepare_actions(
        self, actions: Labels | None, batch_size: int, num_frames: int, name: str = "actions"
    ) -> Tensor | None:
        """`[B, num_frames]` actions, -1 for null; None if there are none."""
        num_actions = self.transformer.config.num_actions
        return label_tensor(name, actions, num_actions, (batch_size, num_frames), self._execution_device)

    def prepare_latents(
        self, latents: Tensor | None, context: Tensor, num_new_frames: int, generator: Generators | None
    ) -> Tensor:
        """Noise `[B, num_new_frames, C, h, w]` for frames after `context` `[B, T, C, h, w]`, in one draw."""
        shape, device = (context.shape[0], num_new_frames, *context.shape[2:]), self._execution_device
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        check_tensor("latents", latents)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents has shape {tuple(latents.shape)}; it takes {shape}")
        return latents.to(device, torch.float32)
