"""FARVideoPipeline: continue or generate videos frame by frame."""

import itertools
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import AutoencoderDC, DiffusionPipeline, SchedulerMixin
from diffusers.loaders.lora_pipeline import CogVideoXLoraLoaderMixin
from diffusers.utils import BaseOutput, scale_lora_layers
from diffusers.video_processor import VideoProcessor
from PIL import Image
from torch import Tensor

from .checked_loading import (
    check_autoencoder,
    check_options,
    check_scaling_factor,
    check_scheduler_config,
)
from .context_schedule import ContextSchedule
from .inputs import (
    ActionNames,
    Labels,
    action_tensor,
    check_action_names,
    check_integer,
    check_sample_size,
    check_size,
    check_tensor,
    empty_videos,
    label_tensor,
    num_videos,
    video_tensor,
)
from .rollout import Rollout, check_settings
from .transformer_far import FARTransformer3DModel

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
Generators = torch.Generator | list[torch.Generator]
Slope = float | Literal["auto"]

AUTO_SLOPE = 4.0  # of `flex_rope_slope="auto"` beyond the training length, times its frames: docs/context.md
StepCallback = Callable[["FARVideoPipeline", int, Tensor, dict[str, Any]], dict[str, Any]]


@dataclass
class FARVideoPipelineOutput(BaseOutput):
    """Output of [`FARVideoPipeline`].

    Args:
        frames: the videos, context first. "pil": a list of PIL images per video; "np": `[B, F, H, W, 3]` in
            [0, 1]; "pt": `[B, F, 3, H, W]` in [0, 1]; "latent": `[B, F, C, h, w]`.
    """

    frames: list[list[Image.Image]] | np.ndarray | Tensor


def check_lora(tensors: dict[str, Tensor], transformer: FARTransformer3DModel) -> None:
    """Raise a ValueError unless all tensors of a LoRA are of layers of the transformer."""
    layers = {name.replace(".base_layer", "") for name, _ in transformer.named_modules()}
    unknown = [
        name
        for name in tensors
        if not name.startswith("transformer.")
        or name.removeprefix("transformer.").partition(".lora")[0] not in layers
    ]
    if unknown or not tensors:
        shown = ", ".join(unknown[:3]) + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
        raise ValueError(f"not a LoRA of this transformer: {shown or 'it has no tensors'}")


class _Interrupted(Exception):
    """Leaves the denoising loop of an interrupted call."""


_BEGIN_OF_CALLS = threading.Lock()


# Of diffusers' mixins, one for pipelines in which a `transformer` alone has adapters.
class FARVideoPipeline(DiffusionPipeline, CogVideoXLoraLoaderMixin):
    """Generates video with FAR, frame after frame, each seeing all frames before it (arXiv 2503.19325).

    Adapters are saved, loaded, mixed, fused and unloaded as in diffusers (`load_lora_weights` and so on).
    `from_pretrained` takes only whole checkpoints: it raises a ValueError for missing, unknown or NaN
    weights, a lost or empty configuration, and options that the part they are of does not have.

    Args:
        transformer: FAR, base or Long.
        vae: autoencoder of single frames; its `scaling_factor` is the only normalisation of the latents.
        scheduler: flow-matching scheduler; Euler (`FlowMatchEulerDiscreteScheduler`) is published.
        flex_rope_slope: default temporal decay of FlexRoPE, or "auto" as in a call, kept with the checkpoint.
        num_inference_steps: default denoising steps per frame, kept with the checkpoint.
        sample_size: default size of videos in pixels, kept with the checkpoint: one number, or (height,
            width).
        action_names: what each action is called, kept with the checkpoint. Of a model with groups of actions:
            of each group its name, or `{name: names of its actions}`. Of one with vectors: what each number
            is called.
        num_training_frames: frames of the longest clip that the model was trained with, kept with the
            checkpoint; by default a context has no more. None: unknown, and a context keeps everything.
    """

    model_cpu_offload_seq = "transformer->vae"
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        transformer: FARTransformer3DModel,
        vae: AutoencoderDC,
        scheduler: SchedulerMixin,
        flex_rope_slope: float | str = 0.0,  # diffusers checks types, and knows no Literal
        num_inference_steps: int = 50,
        sample_size: int | Sequence[int] | None = None,
        action_names: ActionNames | None = None,
        num_training_frames: int | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)
        self.register_to_config(
            flex_rope_slope=flex_rope_slope,
            num_inference_steps=num_inference_steps,
            sample_size=sample_size,
            action_names=action_names,
            num_training_frames=num_training_frames,
        )
        if num_training_frames is not None:
            check_integer("num_training_frames", num_training_frames, minimum=1)
        model = getattr(self, "transformer", None)
        check_action_names(action_names, None if model is None else model.action_space)
        if getattr(self, "vae", None) is not None:
            check_scaling_factor(self.vae.config.scaling_factor)
        self.vae_scale_factor = self.vae.spatial_compression_ratio if getattr(self, "vae", None) else 8
        self.video_processor = VideoProcessor(vae_scale_factor=self.vae_scale_factor)
        multiple = self.frame_multiple if getattr(self, "transformer", None) else 1
        check_sample_size(sample_size, multiple)
        self._guidance_scale = 1.0
        self._num_timesteps = 0
        self._interrupt = False
        self._in_call = False
        self._new_latents: list[Tensor] = []
        self._context_latents: Tensor | None = None

    @property
    def guidance_scale(self) -> float:
        """That of the running call. A callback may set `_guidance_scale` for the steps after it."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale not in (0, 1)

    @property
    def num_timesteps(self) -> int:
        """Denoising steps of the running call, over all its frames, as a callback counts them."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Setting `_interrupt` (in a callback or from another thread) ends a call with the frames it has."""
        return self._interrupt

    @property
    def default_size(self) -> tuple[Any, Any]:
        """Height and width of videos in pixels, of the checkpoint's `sample_size`; None where it has none."""
        size = self.config.sample_size
        return (size, size) if size is None or isinstance(size, int) else (size[0], size[1])

    @property
    def frame_multiple(self) -> int:
        """Height and width of a video must be multiples of this."""
        config = self.transformer.config
        return int(self.vae_scale_factor * math.lcm(config.patch_size, config.long_patch_size or 1))

    def register_to_config(self, **options: Any) -> None:
        # That it tells where the pipeline is from is the last step of loading, for `DiffusionPipeline` too.
        super().register_to_config(**options)
        if "_name_or_path" in options:
            self._check_files(Path(options["_name_or_path"]))

    def _check_files(self, folder: Path) -> None:
        """Raise unless the files of autoencoder and scheduler are whole; the transformer checks its own."""
        parts = {
            name: Path(getattr(getattr(self, name).config, "_name_or_path", None) or "")
            for name in ("transformer", "vae")
        }
        if not folder.is_dir():  # the id of a repository: the parts know where the download lies
            folders = [path.parent for name, path in parts.items() if path.name == name]
            folder = next((path for path in folders if (path / self.config_name).is_file()), folder)
        if (folder / "vae").is_dir() and parts["vae"] == folder / "vae":
            check_autoencoder(self.vae, folder / "vae")
        if (folder / "scheduler").is_dir():
            check_scheduler_config(self.scheduler, folder / "scheduler")

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The options in a model_index.json; diffusers' own leaves out in silence those it does not know."""
        check_options([cls], config_dict, "model_index.json")
        return super().extract_init_dict(config_dict, **kwargs)

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | dict[str, Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """Load a LoRA of the transformer; diffusers' own leaves out in silence what does not fit.

        Args:
            pretrained_model_name_or_path_or_dict: folder, file, repo id, or tensors by name.
            adapter_name: what `set_adapters` calls it.
            hotswap: put it in the place of the adapter of this name.
            kwargs: as for diffusers' `load_lora_weights`, such as `weight_name`.

        Raises:
            ValueError: for tensors that are of no layer of the transformer.
        """
        source = pretrained_model_name_or_path_or_dict
        low_cpu_mem_usage = kwargs.pop("low_cpu_mem_usage", False)
        kwargs["return_lora_metadata"] = True
        tensors, metadata = self.lora_state_dict(
            dict(source) if isinstance(source, dict) else source, **kwargs
        )
        check_lora(tensors, self.transformer)
        self.load_lora_into_transformer(
            tensors,
            self.transformer,
            adapter_name=adapter_name,
            metadata=metadata,
            _pipeline=self,
            low_cpu_mem_usage=low_cpu_mem_usage,
            hotswap=hotswap,
        )

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
        flex_rope_slope: Slope | None = None,
        rope_interpolation: float = 1.0,
        context_schedule: ContextSchedule | None = None,
        generator: Generators | None = None,
        latents: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        batch_size: int | None = None,
        use_cache: bool = True,
        output_type: str = "pil",
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
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
                `[..., G]` integers of a model with G groups of actions; `[..., A]` numbers of one with
                vectors, where NaN is null.
            guidance_scale: 1 samples with the condition, 0 with the null condition only (the authors' -1),
                above 1 guides: null + scale * (conditioned - null).
            num_inference_steps: denoising steps per frame; by default the checkpoint's.
            flex_rope_slope: FlexRoPE's decay of logits per frame of distance; by default the checkpoint's.
                "auto": 0 where the context stays within the frames that the model was trained with, else what
                measured best beyond them (docs/context.md).
            rope_interpolation: divide RoPE's frame positions by this ratio, for comparison with FlexRoPE.
            context_schedule: what is kept as context; by default as many frames as the model was trained with
                (`num_training_frames` of the checkpoint), the newest ones.
            generator: one for all, or one per video. Noise is drawn frame by frame, so that a call, a stream
                and a rollout give the same frames for the same seed.
            latents: noise `[B, new frames, C, h, w]` instead of a draw from the generator.
            height, width: size of the frames in pixels, by default that of `latents`, else the checkpoint's
                `sample_size`, else that of `video`; a `video` of another size is resized to cover it and
                cropped at the centre.
            batch_size: videos to make where nothing else says how many; by default one.
            use_cache: see [`Rollout`].
            output_type: "pil", "np", "pt" or "latent".
            callback_on_step_end: called as (pipeline, step, timestep, tensors) after every denoising step,
                steps counted over all frames; may return changed tensors.
            callback_on_step_end_tensor_inputs: which tensors it gets, of `_callback_tensor_inputs`.
            return_dict: return a [`FARVideoPipelineOutput`] instead of a tuple.
            attention_kwargs: `{"scale": s}` multiplies the weights of the LoRA adapters in this call.

        Raises:
            ValueError: for an argument that does not fit; it says what it got and what it takes.
        """
        tensor_inputs = list(callback_on_step_end_tensor_inputs)
        if not set(tensor_inputs) <= set(self._callback_tensor_inputs):
            known = self._callback_tensor_inputs
            raise ValueError(f"callback_on_step_end_tensor_inputs={tensor_inputs} takes some of {known}")
        check_integer("num_frames", num_frames, minimum=1)
        self._check_attention_kwargs(attention_kwargs)
        with _BEGIN_OF_CALLS:
            if self._in_call:
                raise RuntimeError(
                    "this pipeline is in a call already, whose state it holds; make a pipeline of the same "
                    "parts for each thread: FARVideoPipeline(**pipe.components)"
                )
            self._in_call = True
        try:
            rollout, action_table, noise = self._begin(
                video=video,
                video_latents=video_latents,
                actions=actions,
                num_frames=num_frames,
                class_labels=class_labels,
                guidance_scale=guidance_scale,
                num_inference_steps=num_inference_steps,
                flex_rope_slope=flex_rope_slope,
                rope_interpolation=rope_interpolation,
                context_schedule=context_schedule,
                generator=generator,
                latents=latents,
                height=height,
                width=width,
                batch_size=batch_size,
                use_cache=use_cache,
                output_type=output_type,
            )
            num_context = rollout.num_frames
            self._interrupt = False
            self._guidance_scale = guidance_scale
            self._num_timesteps = rollout.num_timesteps * (num_frames - num_context)
            self._new_latents, self._context_latents = [], rollout.context_latents
            with (
                self._scaled_adapters(attention_kwargs),
                self.progress_bar(total=num_frames - num_context) as frame_bar,
            ):
                frame_bar.set_description("frames")
                for index in range(num_frames - num_context):
                    frame = self._denoise_frame(
                        rollout,
                        None if action_table is None else action_table[:, num_context + index],
                        None if noise is None else noise[:, index : index + 1],
                        index,
                        callback_on_step_end,
                        tensor_inputs,
                    )
                    if frame is None:
                        break
                    self._new_latents.append(frame)
                    frame_bar.update()
            frames = self.frames_so_far(output_type)
        finally:
            self._in_call = False
        self.maybe_free_model_hooks()
        return FARVideoPipelineOutput(frames=frames) if return_dict else (frames,)

    def _check_attention_kwargs(self, attention_kwargs: dict[str, Any] | None) -> None:
        if attention_kwargs is None:
            return
        scale = attention_kwargs.get("scale", 1.0) if isinstance(attention_kwargs, dict) else None
        if (
            not isinstance(scale, int | float)
            or not math.isfinite(scale)
            or set(attention_kwargs) - {"scale"}
        ):
            raise ValueError(f'attention_kwargs={attention_kwargs!r} must be {{"scale": a number}}, or None')
        if scale != 1 and not getattr(self.transformer, "peft_config", None):
            raise ValueError(f"attention_kwargs={attention_kwargs!r}: there is no LoRA adapter to scale")

    @contextmanager
    def _scaled_adapters(self, attention_kwargs: dict[str, Any] | None) -> Iterator[None]:
        scale = (attention_kwargs or {}).get("scale", 1.0)
        if scale == 1:
            yield
            return
        layers = [module for module in self.transformer.modules() if hasattr(module, "scaling")]
        before = [dict(layer.scaling) for layer in layers]
        scale_lora_layers(self.transformer, scale)
        try:
            yield
        finally:  # not divided again: a scale of 0 leaves nothing to divide
            for layer, scaling in zip(layers, before, strict=True):
                layer.scaling.update(scaling)

    def _denoise_frame(
        self,
        rollout: Rollout,
        action: Tensor | None,
        noise: Tensor | None,
        index: int,
        callback: StepCallback | None,
        tensor_inputs: Sequence[str],
    ) -> Tensor | None:
        """One frame `[B, 1, C, h, w]`, or None when interrupted on the way."""
        with self.progress_bar(total=rollout.num_timesteps) as step_bar:
            step_bar.set_description("steps")
            step_bar.leave = False

            def on_step(step: int, timestep: Tensor, latents: Tensor) -> Tensor:
                if callback is not None:
                    tensors = {"latents": latents}
                    callback_kwargs = {name: tensors[name] for name in tensor_inputs}
                    number = index * rollout.num_timesteps + step
                    returned = callback(self, number, timestep, callback_kwargs)
                    latents = (returned or {}).get("latents", latents)
                    if self.do_classifier_free_guidance and not rollout.do_classifier_free_guidance:
                        raise ValueError(
                            f"guidance_scale={self._guidance_scale} was set in a call that began without "
                            "guidance; begin with a guidance_scale other than 0 and 1"
                        )
                    rollout.guidance_scale = self._guidance_scale
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
        flex_rope_slope: Slope | None = None,
        rope_interpolation: float = 1.0,
        context_schedule: ContextSchedule | None = None,
        generator: Generators | None = None,
        height: int | None = None,
        width: int | None = None,
        batch_size: int | None = None,
        use_cache: bool = True,
        max_rewind_frames: int = 64,
        output_type: str = "pil",
    ) -> Rollout:
        """A video to continue step by step: `frame = rollout.step(action=2)`.

        Arguments as for a call, but `context_actions` `[B, T]` or `[T]` are those of the T given frames only.
        A step returns one frame per video: "pil": a list of images; "np": `[B, H, W, 3]`; "pt":
        `[B, 3, H, W]`; "latent": `[B, C, h, w]`. [`Rollout`] has the other verbs.
        """
        return self._begin(
            video=video,
            video_latents=video_latents,
            actions=context_actions,
            num_frames=None,
            class_labels=class_labels,
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps,
            flex_rope_slope=flex_rope_slope,
            rope_interpolation=rope_interpolation,
            context_schedule=context_schedule,
            generator=generator,
            latents=None,
            height=height,
            width=width,
            batch_size=batch_size,
            use_cache=use_cache,
            output_type=output_type,
            max_rewind_frames=max_rewind_frames,
        )[0]

    def stream(
        self, actions: Iterable[Any] | None = None, num_new_frames: int | None = None, **kwargs: Any
    ) -> Iterator[Any]:
        """Yield new frames one by one, as long as there are actions and in constant memory.

        Args:
            actions: the action of each new frame, as they come: each as for [`Rollout.step`].
            num_new_frames: where to stop; by default when `actions` ends, or never.
            kwargs: arguments of [`rollout`](FARVideoPipeline.rollout), checked now, not at the first frame.
        """
        if num_new_frames is not None:
            check_integer("num_new_frames", num_new_frames, minimum=0)
        rollout = self.rollout(**kwargs)
        coming = itertools.repeat(None) if actions is None else actions
        return (rollout.step(action) for action in itertools.islice(coming, num_new_frames))

    def _begin(
        self,
        *,
        video: Any,
        video_latents: Tensor | None,
        actions: Labels | None,
        num_frames: int | None,
        class_labels: Labels | None,
        latents: Tensor | None,
        height: int | None,
        width: int | None,
        batch_size: int | None,
        use_cache: bool,
        output_type: str,
        num_inference_steps: int | None,
        flex_rope_slope: Slope | None,
        max_rewind_frames: int = 64,
        **settings: Any,
    ) -> tuple[Rollout, Tensor | None, Tensor | None]:
        """Check all arguments, then encode the context: a rollout that is ready to go on.

        Args:
            actions: of all `num_frames` frames of a call; None: of the context alone.

        Returns:
            The rollout, all `actions` `[B, F]`, and the noise of the new frames, if it was given.
        """
        if num_inference_steps is None:
            num_inference_steps = self.config.num_inference_steps
        if flex_rope_slope is None:
            flex_rope_slope = self.config.flex_rope_slope
        if flex_rope_slope == "auto":
            flex_rope_slope = self._auto_slope(settings["context_schedule"])
        settings |= {"num_inference_steps": num_inference_steps, "flex_rope_slope": flex_rope_slope}
        self.check_inputs(output_type, **settings)
        check_integer("max_rewind_frames", max_rewind_frames, minimum=0)
        pixels, given = self._prepare_context(video, video_latents, latents, height, width)
        shape = self._context_shape(pixels, given, latents, height, width)
        shape = (self._count_videos(shape[0], batch_size, class_labels, actions), *shape[1:])
        generator = settings["generator"]
        if isinstance(generator, list) and len(generator) != shape[0]:
            raise ValueError(f"generator has {len(generator)} entries for {shape[0]} videos")
        num_context = shape[1]
        if num_frames is not None and num_frames <= num_context:
            raise ValueError(f"num_frames={num_frames} must be more than the {num_context} context frames")
        name = "context_actions" if num_frames is None else "actions"
        num_actions = num_context if num_frames is None else num_frames
        action_table = self.prepare_actions(actions, shape[0], num_actions, name)
        config, device = self.transformer.config, self._execution_device
        labels = label_tensor("class_labels", class_labels, config.num_classes, shape[:1], device)
        noise = None
        if latents is not None and num_frames is not None:
            noise = self.prepare_latents(latents, (shape[0], num_frames - num_context, *shape[2:]))
        if pixels is not None:
            given = self._encode_pixels(pixels)
        elif given is None:
            given = torch.zeros(shape, device=device)
        rollout = Rollout(
            self.transformer,
            self.scheduler,
            lambda video: self.encode_video(video, *(side * self.vae_scale_factor for side in shape[3:])),
            lambda latents: self._decode_frame(latents, output_type),
            given,
            context_actions=None if action_table is None else action_table[:, :num_context],
            class_labels=labels,
            num_training_frames=self.config.num_training_frames,
            use_cache=use_cache,
            max_rewind_frames=max_rewind_frames,
            device=device,
            **settings,
        )
        return rollout, action_table, noise

    def check_inputs(
        self,
        output_type: str,
        generator: Generators | None,
        **settings: Any,
    ) -> None:
        """Raise a ValueError for settings that no rollout can use."""
        check_settings(self.transformer, self.scheduler, **settings)
        generators = generator if isinstance(generator, list) else [generator]
        if not all(isinstance(item, torch.Generator | None) for item in generators):
            raise ValueError(f"generator={generator!r} must be a torch.Generator, a list of them, or None")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type={output_type!r} must be one of {OUTPUT_TYPES}")

    def _auto_slope(self, schedule: Any) -> float:
        """What `flex_rope_slope="auto"` stands for."""
        trained = self.config.num_training_frames
        if trained is None:
            raise ValueError(
                "flex_rope_slope='auto' takes a checkpoint with num_training_frames; it must be a number here"
            )
        if not isinstance(schedule, ContextSchedule):
            schedule = ContextSchedule()
        most = schedule.most_frames(self.transformer.short_window, trained)
        return 0.0 if most is not None and most <= trained else AUTO_SLOPE / trained

    def _prepare_context(
        self,
        video: Any,
        video_latents: Tensor | None,
        latents: Tensor | None,
        height: int | None,
        width: int | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """The frames to continue: pixels `[B, T, 3, H, W]`, or latents `[B, T, C, h, w]`, or neither."""
        if video is not None and video_latents is not None:
            raise ValueError("video and video_latents are both given; give one of them, or neither")
        if video is not None:
            return self._prepare_pixels(video, height, width), None
        if video_latents is None:
            return None, None
        channels = self.transformer.config.in_channels
        multiple = self.frame_multiple // self.vae_scale_factor
        check_tensor("video_latents", video_latents)
        shape = tuple(video_latents.shape)
        if len(shape) != 5 or shape[2] != channels or shape[3] % multiple or shape[4] % multiple:
            takes = f"[B, T, {channels}, h, w] with h and w multiples of {multiple}"
            raise ValueError(f"video_latents has shape {shape}; it takes {takes}")
        for name, size, side in (("height", height, shape[3]), ("width", width, shape[4])):
            if size is not None and size != side * self.vae_scale_factor:
                raise ValueError(
                    f"{name}={size}, but video_latents of {shape[3]} x {shape[4]} are of frames of "
                    f"{shape[3] * self.vae_scale_factor} x {shape[4] * self.vae_scale_factor} pixels"
                )
        return None, video_latents.to(self._execution_device, torch.float32)

    def _context_shape(
        self,
        pixels: Tensor | None,
        given: Tensor | None,
        latents: Tensor | None,
        height: int | None,
        width: int | None,
    ) -> tuple[int, ...]:
        """`[B, T, C, h, w]` of the context. B is 0 where nothing was given that says how many videos."""
        if given is not None:
            return tuple(given.shape)
        channels, scale = self.transformer.config.in_channels, self.vae_scale_factor
        if pixels is not None:
            return (*pixels.shape[:2], channels, pixels.shape[3] // scale, pixels.shape[4] // scale)
        batch_size = 0
        if latents is not None:  # noise, whose own checks come later
            check_tensor("latents", latents)
            if latents.ndim == 5:
                batch_size = latents.shape[0]
                height = latents.shape[3] * scale if height is None else height
                width = latents.shape[4] * scale if width is None else width
        height, width = self._with_defaults(height, width)
        if height is None or width is None:
            raise ValueError(f"height={height} and width={width} are needed when no video is given")
        check_size(height, width, self.frame_multiple)
        return batch_size, 0, channels, int(height) // scale, int(width) // scale

    def _count_videos(
        self, given: int, batch_size: int | None, class_labels: Labels | None, actions: Labels | None
    ) -> int:
        if batch_size is not None:
            check_integer("batch_size", batch_size, minimum=1)
        space = self.transformer.action_space
        ndim = 1 + (0 if space is None else len(space.shape))
        number = given or max(num_videos(class_labels, 0), num_videos(actions, ndim))
        if batch_size is None or (not given and number == 1):
            return int(batch_size or number)
        if batch_size != number:
            raise ValueError(f"batch_size={batch_size}, but the other arguments are of {number} videos")
        return number

    def _with_defaults(self, height: int | None, width: int | None) -> tuple[int | None, int | None]:
        default_height, default_width = self.default_size
        return default_height if height is None else height, default_width if width is None else width

    def _prepare_pixels(self, video: Any, height: int | None, width: int | None) -> Tensor:
        height, width = self._with_defaults(height, width)
        frames = video_tensor(video, height, width)
        check_size(frames.shape[-2], frames.shape[-1], self.frame_multiple)
        return frames

    def _encode_pixels(self, pixels: Tensor) -> Tensor:
        device, dtype = self._execution_device, self.vae.dtype
        latents = [
            self.vae.encode(frame.to(device, dtype) * 2 - 1).latent.float() for frame in pixels.unbind(1)
        ]
        return torch.stack(latents, dim=1) * self.vae.config.scaling_factor

    def encode_video(self, video: Any, height: int | None = None, width: int | None = None) -> Tensor:
        """Scaled latents `[B, T, C, h, w]` of a video as in a call; each frame is encoded alone."""
        return self._encode_pixels(self._prepare_pixels(video, height, width))

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
        """`[B, num_frames]` actions (of groups and vectors `[B, num_frames, .]`); None if there are none."""
        shape = (batch_size, num_frames)
        return action_tensor(name, actions, self.transformer.action_space, shape, self._execution_device)

    def prepare_latents(self, latents: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Noise `[B, num_new_frames, C, h, w]`, checked against this shape."""
        check_tensor("latents", latents)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents has shape {tuple(latents.shape)}; it takes {shape}")
        return latents.to(self._execution_device, torch.float32)
