"""What users pass to the pipeline, turned into tensors, or into an error that names the argument."""

import math
from collections.abc import Iterator, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.video_processor import VideoProcessor
from PIL import Image
from torch import Tensor

Labels = int | Sequence[int] | Sequence[Sequence[int]] | np.ndarray | Tensor

MAX_SCRIPT = 100_000  # characters

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
    if len(script) > MAX_SCRIPT:
        raise ValueError(f"The actions are {len(script)} characters long: at most {MAX_SCRIPT}.")
    actions: list[int] = []
    for word in script.replace(",", " ").split():
        name, star, count = word.partition("*")
        index = int(name) if name.isdecimal() and len(name) < 10 else -1
        if names and name in names:
            index = names.index(name)
        if not 0 <= index < num_actions or (star and not count.isdecimal()):
            known = ", ".join(names) if names else f"0 to {num_actions - 1}"
            raise ValueError(
                f"{word[:40]!r} is not an action: it takes {known}, each with a count such as *8."
            )
        wanted = int(count or 1) if len(count) < 10 else num_frames
        actions += [index] * min(wanted, num_frames - len(actions))
    if not actions:
        raise ValueError("The actions are empty: it takes words such as forward*8.")
    return (actions + actions[-1:] * num_frames)[:num_frames]
