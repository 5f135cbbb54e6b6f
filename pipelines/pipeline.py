"""Built by pipelines/build.py of diffusers-far from its package; change it there."""

import copy
import itertools
import math
import numpy as np
import torch
from PIL import Image
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from diffusers import AutoencoderDC, DiffusionPipeline, SchedulerMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from itertools import accumulate
from pathlib import Path
from torch import Tensor, nn
from typing import Any, NamedTuple


# context_schedule.py: ContextSchedule: which frames are the context of the next one, and at which level.

class ContextFrames(NamedTuple):
    """Positions in the video of the frames that the next frame sees, oldest first."""

    long: tuple[int, ...]
    short: tuple[int, ...]


@dataclass(frozen=True)
class ContextSchedule:
    """What stays short-term, becomes long-term, or is dropped as a video grows.

    With no bound all frames are kept, as published: a base model keeps each in full, a Long model keeps the
    last `short_window` (the frame being denoised included) in full and all older ones as long-term frames.
    With bounds a rollout runs in constant memory, however long.

    Args:
        max_short_frames: short-term frames, the one being denoised included. For a base model this is a
            sliding window. For a Long model it may only narrow its trained window.
        max_long_frames: long-term frames kept by a Long model, the oldest going first; 0 keeps none.
        num_sink_frames: so many of the first frames are never dropped; they count towards the bound of their
            level.
        refresh_interval: a short-term frame depends on the long-term ones before it, so a cached Long model
            computes its window anew each time that so many frames have left it: 1 is exact. With more, or
            with None (never), the frames of the window stay as they were when they were new: an approximation
            that saves most of what a new frame's context costs.
    """

    max_short_frames: int | None = None
    max_long_frames: int | None = None
    num_sink_frames: int = 0
    refresh_interval: int | None = 1

    def __post_init__(self) -> None:
        if self.max_short_frames is not None and self.max_short_frames < 1:
            raise ValueError(
                f"max_short_frames={self.max_short_frames} must be at least 1, or None for no bound"
            )
        if self.max_long_frames is not None and self.max_long_frames < 0:
            raise ValueError(
                f"max_long_frames={self.max_long_frames} must be at least 0, or None for no bound"
            )
        if self.num_sink_frames < 0:
            raise ValueError(f"num_sink_frames={self.num_sink_frames} must be at least 0")
        if self.refresh_interval is not None and self.refresh_interval < 1:
            raise ValueError(
                f"refresh_interval={self.refresh_interval} must be at least 1, or None for never"
            )
        for name, bound in (
            ("max_short_frames", self.max_short_frames),
            ("max_long_frames", self.max_long_frames),
        ):
            if bound is not None and 0 < bound <= self.num_sink_frames:
                raise ValueError(f"num_sink_frames={self.num_sink_frames} must be less than {name}={bound}")

    def context(self, num_frames: int, short_window: int | None = None) -> ContextFrames:
        """Context of frame `num_frames`, when frames 0 to `num_frames - 1` exist.

        Args:
            num_frames: frames so far.
            short_window: the window of a Long model; None for a base model.
        """
        if short_window is None:
            bound = None if self.max_short_frames is None else self.max_short_frames - 1
            return ContextFrames((), self._newest(num_frames, bound))
        window = short_window if self.max_short_frames is None else min(self.max_short_frames, short_window)
        first_short = max(0, num_frames - (window - 1))
        return ContextFrames(
            self._newest(first_short, self.max_long_frames), tuple(range(first_short, num_frames))
        )

    def _newest(self, num_frames: int, bound: int | None) -> tuple[int, ...]:
        """The sink frames and the newest of `num_frames` frames, at most `bound` in all."""
        if bound is None or num_frames <= bound:
            return tuple(range(num_frames))
        sinks = min(self.num_sink_frames, bound)
        return (*range(sinks), *range(num_frames - (bound - sinks), num_frames))


# pipeline_inputs.py: What users pass to the pipeline, turned into tensors, or into an error that names the argument.

Labels = int | Sequence[int] | Sequence[Sequence[int]] | np.ndarray | Tensor

_VIDEO_FORMS = (
    "a [B, T, 3, H, W] or [T, 3, H, W] tensor in [0, 1], a [B, T, H, W, 3] or [T, H, W, 3] array (uint8, or "
    "float in [0, 1]), a PIL image, a list of PIL images or of such lists, or the path of a video file"
)


def iterate_video(path: str | Path) -> Iterator[np.ndarray]:
    """Frames `[H, W, 3]` uint8 of a video or animated image file, decoded one by one with PyAV.

    Raises:
        ValueError: when there is no such file, or it cannot be read as a video.
    """
    import av  # needed for files only
    from av.video.reformatter import VideoReformatter

    if not Path(path).is_file():
        raise ValueError(f"video={str(path)!r} is not a file")
    number = 0
    try:
        with av.open(str(path)) as container:
            reformatter = VideoReformatter()  # one for all frames: setting it up costs more than a frame
            for frame in container.decode(video=0):
                number += 1
                yield reformatter.reformat(frame, format="rgb24").to_ndarray()
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"video={str(path)!r} cannot be read as a video: {error}") from error
    if number == 0:
        raise ValueError(f"video={str(path)!r} has no frames")


def read_video(path: str | Path) -> np.ndarray:
    """All frames of a video or animated image file, `[T, H, W, 3]` uint8; errors as of `iterate_video`."""
    return np.stack(list(iterate_video(path)))


def video_tensor(video: Any, height: int | None, width: int | None) -> Tensor:
    """`[B, T, 3, H, W]` float frames in [0, 1] of any form of video that the pipeline takes.

    Frames of another size are resized to cover `height` x `width` and cropped at the centre.
    """
    if isinstance(video, str | Path):
        video = read_video(video)
    if isinstance(video, Image.Image):
        video = [video]
    if isinstance(video, list | tuple) and video and all(isinstance(frame, Image.Image) for frame in video):
        video = [video]
    if (
        isinstance(video, list | tuple)
        and video
        and all(isinstance(frames, list | tuple) for frames in video)
    ):
        if len({len(frames) for frames in video}) > 1:
            raise ValueError(
                f"video has videos of {[len(frames) for frames in video]} frames; they must be equally long"
            )
        arrays = [_stack_images(frames) for frames in video]
        if len({array.shape for array in arrays}) > 1:
            raise ValueError(
                f"video has videos of shapes {[array.shape for array in arrays]}; they must be equal"
            )
        video = np.stack(arrays)
    if isinstance(video, np.ndarray):
        video = _array_tensor(video)
    if not isinstance(video, Tensor):
        raise ValueError(f"video is a {type(video).__name__}; it takes {_VIDEO_FORMS}")
    if video.ndim == 4:
        video = video.unsqueeze(0)
    if video.ndim != 5 or video.shape[2] != 3 or video.shape[1] == 0:
        raise ValueError(f"video has shape {tuple(video.shape)}; it takes {_VIDEO_FORMS}")
    if not video.is_floating_point():
        raise ValueError(
            f"video is a tensor of {video.dtype}; tensors are float in [0, 1] (uint8 is for arrays)"
        )
    check_finite("video", video)
    if video.min() < 0 or video.max() > 1:
        raise ValueError(f"video has values from {video.min():.3g} to {video.max():.3g}; it takes [0, 1]")
    height, width = video.shape[-2] if height is None else height, video.shape[-1] if width is None else width
    check_size(height, width, multiple=1)
    return _resize(video.float(), height, width)


def _stack_images(images: Sequence[Image.Image]) -> np.ndarray:
    if not images or not all(isinstance(image, Image.Image) for image in images):
        raise ValueError(
            f"video holds {sorted({type(image).__name__ for image in images})}; it takes {_VIDEO_FORMS}"
        )
    if len({image.size for image in images}) > 1:
        raise ValueError(
            f"video has images of sizes {sorted({image.size for image in images})}; they must be equal"
        )
    return np.stack([np.asarray(image.convert("RGB")) for image in images])


def _array_tensor(array: np.ndarray) -> Tensor:
    if array.ndim not in (4, 5) or array.shape[-1] != 3:
        raise ValueError(f"video is an array of shape {array.shape}; it takes {_VIDEO_FORMS}")
    frames = torch.from_numpy(np.ascontiguousarray(array)).movedim(-1, -3)
    return frames.float() / 255 if array.dtype == np.uint8 else frames


def _resize(video: Tensor, height: int, width: int) -> Tensor:
    if video.shape[-2:] == (height, width):
        return video
    # Through PIL: it filters properly when it shrinks, which tensors in diffusers' image processor do not.
    images = VideoProcessor.numpy_to_pil(video.flatten(0, 1).permute(0, 2, 3, 1).cpu().numpy())
    resizer = VideoProcessor(do_normalize=False, vae_scale_factor=1)
    frames = resizer.preprocess(images, height, width, resize_mode="crop")
    return frames.unflatten(0, video.shape[:2])


def check_integer(name: str, value: Any, minimum: int) -> None:
    """Raise a ValueError unless `value` is an int of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name}={value!r} must be an int of at least {minimum}")


def check_number(name: str, value: Any, takes: str) -> None:
    """Raise a ValueError unless `value` is finite and not negative."""
    if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{name}={value!r} must be {takes}")


def check_action_names(names: list[str] | None, transformer: Any) -> None:
    """Raise a ValueError unless there is a name for each action of the model, or none at all."""
    num_actions = None if transformer is None else transformer.config.num_actions
    if names is not None and num_actions is not None and len(names) != num_actions:
        raise ValueError(f"action_names={names} must be {num_actions}, as many as the model has actions")


def check_size(height: int, width: int, multiple: int) -> None:
    """Raise a ValueError unless both are positive multiples of `multiple`."""
    for name, size in (("height", height), ("width", width)):
        if not isinstance(size, int) or size < 1 or size % multiple:
            raise ValueError(f"{name}={size} must be a positive multiple of {multiple} pixels")


def check_tensor(name: str, value: Any) -> None:
    """Raise a ValueError unless `value` is a tensor of finite values."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}; it takes a tensor")
    check_finite(name, value)


def empty_videos(latents: Tensor, scale: int, output_type: str) -> Any:
    """Videos without frames, of the batch and size of `latents` `[B, 0, C, h, w]`."""
    height, width = latents.shape[-2] * scale, latents.shape[-1] * scale
    pixels = torch.zeros(latents.shape[0], 0, 3, height, width, device=latents.device)
    if output_type == "pil":
        return [[] for _ in range(latents.shape[0])]
    return pixels.movedim(2, -1).cpu().numpy() if output_type == "np" else pixels


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise a ValueError when a tensor holds NaN or infinite values."""
    if not torch.isfinite(tensor).all():
        raise ValueError(
            f"{name} holds {int((~torch.isfinite(tensor)).sum())} values that are NaN or infinite"
        )


def label_tensor(
    name: str, labels: Labels | None, num_labels: int | None, shape: tuple[int, ...], device: torch.device
) -> Tensor | None:
    """Class labels `[B]` or actions `[B, F]`, checked, with -1 for the null condition.

    Args:
        name: the argument, for errors.
        labels: what the user gave; a missing batch dimension is filled in.
        num_labels: labels that the model knows; None if it takes none.
        shape: (B,) or (B, F).
        device: of the result.
    """
    if labels is None:
        return None
    if num_labels is None:
        raise ValueError(f"{name} is given, but this model takes none; pass None")
    try:
        values = torch.as_tensor(np.asarray(labels) if not isinstance(labels, Tensor) else labels)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}={labels!r} cannot be read as integers of shape {list(shape)}") from error
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise ValueError(f"{name} has dtype {values.dtype}; it takes integers")
    given = tuple(values.shape)
    if values.ndim == len(shape) - 1:
        values = values.expand(shape[0], *values.shape)
    if tuple(values.shape) != shape:
        raise ValueError(f"{name} has shape {given}; it takes {list(shape)}, or {list(shape[1:])} for all")
    values = values.to(device=device, dtype=torch.long)
    if values.numel() and (int(values.min()) < -1 or int(values.max()) > num_labels):
        raise ValueError(
            f"{name} has values from {int(values.min())} to {int(values.max())}; it takes 0 to "
            f"{num_labels - 1}, or -1 or {num_labels} for the null condition"
        )
    return values


def num_videos(labels: Labels | None, ndim: int) -> int:
    """How many videos labels of `ndim` dimensions per video speak of; 1 if they do not say."""
    if labels is None:
        return 1
    try:
        shape = labels.shape if isinstance(labels, Tensor | np.ndarray) else np.shape(labels)
    except ValueError:  # ragged: `label_tensor` names the argument
        return 1
    return shape[0] if len(shape) > ndim else 1


def parse_actions(script: str, names: list[str] | None, num_actions: int, num_frames: int) -> list[int]:
    """Actions of `num_frames` frames, of a text such as "forward*8 left*4 forward".

    Args:
        script: names or numbers of actions, each with an optional count; the last one goes on until the end.
        names: of the actions.
        num_actions: that the model has.
        num_frames: of the result.

    Raises:
        ValueError: for a word that is no action or no count.
    """
    actions: list[int] = []
    for word in script.replace(",", " ").split():
        name, star, count = word.partition("*")
        index = names.index(name) if names and name in names else int(name) if name.isdecimal() else -1
        if not 0 <= index < num_actions or (star and not count.isdecimal()):
            known = ", ".join(names) if names else f"0 to {num_actions - 1}"
            raise ValueError(f"{word!r} is not an action: it takes {known}, each with a count such as *8.")
        actions += [index] * min(int(count or 1), num_frames)
    if not actions:
        raise ValueError("The actions are empty: it takes words such as forward*8.")
    return (actions + actions[-1:] * num_frames)[:num_frames]


# flow_matching.py: FAR's training objective: flow matching per frame, with stochastic clean context (section 3.2).

CLEAN_TIMESTEP = -1.0


def add_noise(latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """`sigma * noise + (1 - sigma) * latents` for latents and noise `[B, F, C, H, W]`, sigma `[B, F]`."""
    sigma = sigma[..., None, None, None].to(latents.dtype)
    return sigma * noise + (1 - sigma) * latents


def velocity_target(latents: Tensor, noise: Tensor) -> Tensor:
    """What the model predicts: `noise - latents`, `[B, F, C, H, W]`."""
    return noise - latents


def sample_sigmas(
    shape: tuple[int, int],
    generator: torch.Generator | None = None,
    num_train_timesteps: int = 1000,
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
) -> Tensor:
    """Logit-normal noise levels, one per frame, on the scheduler's grid of `num_train_timesteps` levels.

    Args:
        shape: (B, F).
        generator: CPU generator of the draw.

    Returns:
        `[B, F]` sigmas in {1 / num_train_timesteps, ..., 1}, on the CPU.
    """
    uniform = torch.sigmoid(torch.randn(shape, generator=generator) * logit_std + logit_mean)
    index = (uniform * num_train_timesteps).long().clamp(max=num_train_timesteps - 1)
    return 1 - index.float() / num_train_timesteps


def sample_intervals(
    shape: tuple[int, ...], max_steps: int = 16, generator: torch.Generator | None = None
) -> Tensor:
    """Steps to train a flow map on: where each starts and ends.

    They are those of samplers that take 1 to `max_steps` equal steps from pure noise to a clean frame. A
    sampler of n steps has a chance in proportion to 1 / n, and each of its steps the same.

    Args:
        shape: of the draw, (B, F).
        max_steps: of a sampler.
        generator: CPU generator of the draw.

    Returns:
        `[2, B, F]` sigmas in [0, 1], the first above the second.
    """
    chances = 1 / torch.arange(1.0, max_steps + 1)
    draws = torch.multinomial(chances, math.prod(shape), replacement=True, generator=generator)
    num_steps = 1 + draws.view(shape)
    index = (torch.rand(shape, generator=generator) * num_steps).floor().clamp(max=num_steps - 1)
    return 1 - torch.stack([index, index + 1]) / num_steps


def sample_clean_frames(
    shape: tuple[int, int],
    probability: float,
    num_long_frames: int = 0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Which frames are given clean and left out of the loss: stochastic clean context.

    Args:
        shape: (B, F).
        probability: chance of each frame of the window, 0.1 as published.
        num_long_frames: leading frames before the window; always clean.
        generator: CPU generator of the draw.

    Returns:
        `[B, F]` bool, on the CPU. A video whose window came out all clean keeps its last frame noisy, so that
        every video has a loss.
    """
    clean = torch.rand(shape, generator=generator) < probability
    clean[:, :num_long_frames] = True
    clean[:, -1] &= ~clean.all(dim=1)
    return clean


def frame_loss(prediction: Tensor, target: Tensor, clean: Tensor) -> Tensor:
    """Squared error of the velocity: mean over a frame, over a video's noisy frames, then over the batch.

    Args:
        prediction, target: `[B, F, C, H, W]` of the window's frames.
        clean: `[B, F]` bool, frames without loss.
    """
    error = (prediction.float() - target.float()).square().mean(dim=(2, 3, 4))
    noisy = (~clean).to(error.dtype)
    return ((error * noisy).sum(dim=1) / noisy.sum(dim=1).clamp(min=1)).mean()


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


# rollout.py: Rollout: one running video. The pipeline's `__call__` and `stream` are thin loops over it.

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


# pipeline_far_video.py: FARVideoPipeline: continue or generate videos frame by frame.

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
