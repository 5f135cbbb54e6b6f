"""What users pass to the pipeline, turned into tensors, or into an error that names the argument."""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .video_files import VideoFile, image_frames, rgb_pixels

Labels = int | Sequence[int] | Sequence[Sequence[int]] | np.ndarray | Tensor

MAX_ACTIONS_TEXT = 100_000  # characters

_VIDEO_FORMS = (
    "a [B, T, 3, H, W] or [T, 3, H, W] tensor or a [B, T, H, W, 3] or [T, H, W, 3] array (uint8 in 0 to 255, "
    "or float in [0, 1]), a PIL image, the path of a video file, or a list: of frames, or of videos"
)
_ROUNDING = 1e-3  # by which float pixels may miss [0, 1]


def video_tensor(video: Any, height: int | None, width: int | None) -> Tensor:
    """`[B, T, 3, H, W]` float frames in [0, 1] of any form of video that the pipeline takes.

    Frames of another size are resized to cover `height` x `width` and cropped at the centre.

    Raises:
        ValueError: for anything else; the message begins with "video".
    """
    check_size(1 if height is None else height, 1 if width is None else width, multiple=1)
    if not isinstance(video, list | tuple):
        if isinstance(video, np.ndarray | Tensor) and video.ndim == 5:
            return _resize(_float_pixels("video", video, ndim=5), height, width)
        return _one_video("video", video, height, width).unsqueeze(0)
    if not video:
        raise ValueError(f"video is an empty list; it takes {_VIDEO_FORMS}")
    if all(_is_frame(item) for item in video):
        return _one_video("video", video, height, width).unsqueeze(0)
    videos = [_one_video(f"video[{index}]", item, height, width) for index, item in enumerate(video)]
    shapes = [tuple(item.shape) for item in videos]
    if len({shape[0] for shape in shapes}) > 1:
        raise ValueError(
            f"video has videos of {[shape[0] for shape in shapes]} frames; they must be equally long"
        )
    if len(set(shapes)) > 1:
        sizes = [f"{shape[3]} x {shape[2]}" for shape in shapes]
        raise ValueError(
            f"video has videos of sizes {sizes}; they must be equal, or height and width be given"
        )
    return torch.stack(videos)


def _is_frame(item: Any) -> bool:
    """Whether an item of a list is a frame rather than a video."""
    return isinstance(item, Image.Image) or (isinstance(item, np.ndarray | Tensor) and item.ndim == 3)


def _one_video(name: str, video: Any, height: int | None, width: int | None) -> Tensor:
    """`[T, 3, H, W]` of one video."""
    if isinstance(video, str | Path):
        # One by one, so that a long video of large frames fits in memory when small ones are asked for.
        frames = [_fitted(frame, height, width) for frame in VideoFile(video).frames()]
        return torch.from_numpy(np.stack(frames)).movedim(-1, 1).float() / 255
    if isinstance(video, Image.Image):
        video = image_frames(video)
    if isinstance(video, list | tuple):
        return _resize(_stack_frames(name, video), height, width)
    if isinstance(video, np.ndarray | Tensor):
        return _resize(_float_pixels(name, video, ndim=4), height, width)
    raise ValueError(f"{name} is a {type(video).__name__}; it takes {_VIDEO_FORMS}")


def _stack_frames(name: str, frames: Sequence[Any]) -> Tensor:
    if not frames or not all(_is_frame(frame) for frame in frames):
        held = sorted({type(frame).__name__ for frame in frames})
        raise ValueError(f"{name} holds {held or 'nothing'}; it takes {_VIDEO_FORMS}")
    pixels = []
    for index, frame in enumerate(frames):
        frame_name = f"{name}[{index}]"
        if isinstance(frame, Image.Image):
            try:
                frame = rgb_pixels(frame)
            except (ValueError, OSError) as error:
                raise ValueError(f"{frame_name} cannot be read as an image: {error}") from error
        pixels.append(_float_pixels(frame_name, frame, ndim=3))
    sizes = sorted({(frame.shape[2], frame.shape[1]) for frame in pixels})
    if len(sizes) > 1:
        raise ValueError(f"{name} has images of sizes {sizes}; they must be equal")
    return torch.stack(pixels)


def _float_pixels(name: str, pixels: np.ndarray | Tensor, ndim: int) -> Tensor:
    """`[..., 3, H, W]` float32 in [0, 1], of an array with the channels at the end, or a tensor as here."""
    is_array = isinstance(pixels, np.ndarray)
    kind = "an array" if is_array else "a tensor"
    channels = -1 if is_array else -3
    if pixels.ndim != ndim or pixels.shape[channels] != 3 or 0 in pixels.shape:
        raise ValueError(f"{name} is {kind} of shape {tuple(pixels.shape)}; it takes {_VIDEO_FORMS}")
    if isinstance(pixels, np.ndarray):
        is_integer, is_float = pixels.dtype == np.uint8, pixels.dtype in (np.float16, np.float32, np.float64)
    else:
        is_integer, is_float = pixels.dtype == torch.uint8, pixels.is_floating_point()
    if not is_integer and not is_float:
        raise ValueError(
            f"{name} is {kind} of {pixels.dtype}; it takes uint8 in 0 to 255, or float in [0, 1]"
        )
    if isinstance(pixels, np.ndarray):
        pixels = torch.from_numpy(np.array(pixels)).movedim(-1, -3)
    if is_integer:
        return pixels.float() / 255
    pixels = pixels.float()
    check_finite(name, pixels)
    low, high = float(pixels.min()), float(pixels.max())
    if low < -_ROUNDING or high > 1 + _ROUNDING:
        raise ValueError(
            f"{name} has values from {low:.3g} to {high:.3g}; floats are in [0, 1], and uint8 in 0 to 255"
        )
    return pixels.clamp(0, 1)


def _resize(video: Tensor, height: int | None, width: int | None) -> Tensor:
    """`[..., 3, H, W]` with frames of this size; None: as they are."""
    shape = (video.shape[-2] if height is None else height, video.shape[-1] if width is None else width)
    if video.shape[-2:] == shape:
        return video
    # Through PIL: it filters properly when it shrinks, which tensors do not.
    pixels = (video.movedim(-3, -1) * 255).round().byte().cpu().numpy()
    frames = np.stack([_fitted(frame, *shape) for frame in pixels.reshape(-1, *pixels.shape[-3:])])
    return torch.from_numpy(frames).movedim(-1, 1).float().div(255).unflatten(0, video.shape[:-3])


def _fitted(frame: np.ndarray, height: int | None, width: int | None) -> np.ndarray:
    size = (frame.shape[0] if height is None else height, frame.shape[1] if width is None else width)
    return frame if frame.shape[:2] == size else fit_frame(frame, *size)


def fit_frame(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """A frame `[H, W, 3]` uint8 resized to cover `height` x `width`, cropped at the centre."""
    resampling = Image.Resampling.LANCZOS
    return np.asarray(ImageOps.fit(Image.fromarray(frame), (int(width), int(height)), resampling))


def check_integer(name: str, value: Any, minimum: int) -> None:
    """Raise a ValueError unless `value` is an int of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < minimum:
        raise ValueError(f"{name}={value!r} must be an int of at least {minimum}")


def check_number(name: str, value: Any, takes: str) -> None:
    """Raise a ValueError unless `value` is finite and not negative."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{name}={value!r} must be {takes}")


def check_action_names(names: list[str] | None, transformer: Any) -> None:
    """Raise a ValueError unless there is a name for each action of the model, or none at all."""
    num_actions = None if transformer is None else transformer.config.num_actions
    if names is not None and num_actions is not None and len(names) != num_actions:
        raise ValueError(f"action_names={names} must be {num_actions}, as many as the model has actions")


def check_size(height: int, width: int, multiple: int) -> None:
    """Raise a ValueError unless both are positive multiples of `multiple`."""
    for name, size in (("height", height), ("width", width)):
        if isinstance(size, bool) or not isinstance(size, Integral) or size < 1 or size % multiple:
            raise ValueError(f"{name}={size} must be a positive multiple of {multiple} pixels")


def check_sample_size(size: Any, multiple: int) -> None:
    """Raise a ValueError unless it is None, a number, or (height, width), of multiples of `multiple`."""
    pair = size if isinstance(size, list | tuple) and len(size) == 2 else (size, size)
    for side in pair if size is not None else ():
        if isinstance(side, bool) or not isinstance(side, Integral) or side < 1 or side % multiple:
            raise ValueError(
                f"sample_size={size!r} must be a positive multiple of {multiple} pixels, or two of them: "
                "(height, width)"
            )


def check_tensor(name: str, value: Any) -> None:
    """Raise a ValueError unless `value` is a float tensor of finite values."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}; it takes a tensor")
    if not value.is_floating_point():
        raise ValueError(f"{name} is a tensor of {value.dtype}; it takes floats")
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
    if len(script) > MAX_ACTIONS_TEXT:
        raise ValueError(f"The actions have {len(script)} characters: at most {MAX_ACTIONS_TEXT}.")
    actions: list[int] = []
    for word in script.replace(",", " ").split():
        name, star, count = word.partition("*")
        index = names.index(name) if names and name in names else _whole_number(name)
        repeats = _whole_number(count) if star else 1
        if index is None or repeats is None or index >= num_actions:
            known = ", ".join(names) if names else f"0 to {num_actions - 1}"
            shown = word if len(word) <= 40 else f"{word[:40]}..."
            raise ValueError(f"{shown!r} is not an action: it takes {known}, each with a count such as *8.")
        actions += [index] * min(repeats, num_frames - len(actions))
    if not actions:
        raise ValueError("The actions are empty: it takes words such as forward*8.")
    return actions + actions[-1:] * (num_frames - len(actions))


def _whole_number(text: str) -> int | None:
    """None for other texts, and for numbers of more digits than any count has."""
    return int(text) if text.isdecimal() and len(text) <= 18 else None
