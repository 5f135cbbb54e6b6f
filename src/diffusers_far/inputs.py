"""What users pass to the pipeline, turned into tensors, or into an error that names the argument."""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .actions import ActionSpace
from .video_files import VideoFile, image_frames, rgb_pixels

ActionNames = Sequence[Any]  # of str and {str: list[str]}; diffusers' check of types knows no such unions
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
    frames = np.stack([fit_frame(frame, *shape) for frame in pixels.reshape(-1, *pixels.shape[-3:])])
    return torch.from_numpy(frames).movedim(-1, 1).float().div(255).unflatten(0, video.shape[:-3])


def _fitted(frame: np.ndarray, height: int | None, width: int | None) -> np.ndarray:
    return fit_frame(
        frame, frame.shape[0] if height is None else height, frame.shape[1] if width is None else width
    )


def fit_frame(
    frame: np.ndarray, height: int, width: int, fit: Literal["crop", "pad", "stretch"] = "crop"
) -> np.ndarray:
    """A frame `[H, W, 3]` uint8 at `height` x `width`.

    Args:
        fit: what becomes of other proportions: the middle is taken ("crop"), or all of it, with black borders
            ("pad") or out of proportion ("stretch").
    """
    if frame.shape[:2] == (height, width):
        return frame
    image, size, resampling = Image.fromarray(frame), (int(width), int(height)), Image.Resampling.LANCZOS
    if fit == "stretch":
        return np.asarray(image.resize(size, resampling))
    return np.asarray((ImageOps.fit if fit == "crop" else ImageOps.pad)(image, size, resampling))


def check_integer(name: str, value: Any, minimum: int) -> None:
    """Raise a ValueError unless `value` is an int of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < minimum:
        raise ValueError(f"{name}={value!r} must be an int of at least {minimum}")


def check_number(name: str, value: Any, takes: str) -> None:
    """Raise a ValueError unless `value` is finite and not negative."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{name}={value!r} must be {takes}")


def check_action_names(names: ActionNames | None, space: ActionSpace | None) -> None:
    """Raise a ValueError unless the names are those of the actions of a model, or none at all.

    Args:
        names: of each action; of each number of a vector; of each group, or `{name: names of its actions}`.
        space: None for a model that is not there, or without actions, which takes any names.
    """
    if names is None or space is None:
        return
    if not space.is_grouped and not space.is_vector:
        if len(names) != space.num_actions:
            raise ValueError(
                f"action_names={names} must be {space.num_actions}, as many as the model has actions"
            )
        return
    if space.is_vector:
        fits = len(names) == space.action_dim and all(isinstance(name, str) for name in names)
        takes = f"{space.action_dim} names, one for each number of a vector"
    else:
        fits = len(names) == len(space.sizes) and all(
            isinstance(name, str) or (isinstance(name, dict) and len(name) == 1) for name in names
        )
        sized = zip(group_names(names), space.sizes, strict=True) if fits else ()
        fits = fits and all(values is None or len(values) == size for (_, values), size in sized)
        takes = (
            f"{len(space.sizes)} names of groups, or {{name: names of its actions}} of each; the model has "
            f"{space}"
        )
    if not fits:
        raise ValueError(f"action_names={names} must be {takes}")


def group_names(names: ActionNames) -> list[tuple[str, list[str] | None]]:
    """Name of each group of actions, and names of its actions, if they have some."""
    return [(name, None) if isinstance(name, str) else next(iter(name.items())) for name in names]


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


def action_tensor(
    name: str, actions: Any, space: ActionSpace | None, shape: tuple[int, ...], device: torch.device
) -> Tensor | None:
    """Actions `[*shape, *space.shape]`, checked: integers with -1 for null, or floats with NaN for null.

    Args:
        name: the argument, for errors.
        actions: what the user gave; a missing batch dimension is filled in.
        space: what the model takes; None for a model without actions.
        shape: (B,) or (B, F).
        device: of the result.
    """
    if actions is None:
        return None
    if space is None or not space.shape:
        return label_tensor(name, actions, None if space is None else space.sizes[0], shape, device)
    kind = "numbers" if space.is_vector else "integers"
    takes = f"{list(shape + space.shape)}, or {list(shape[1:] + space.shape)} for all"
    try:
        values = torch.as_tensor(np.asarray(actions) if not isinstance(actions, Tensor) else actions)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}={actions!r} cannot be read as {kind} of shape {takes}") from error
    if values.is_complex() or values.dtype == torch.bool or (values.is_floating_point() > space.is_vector):
        raise ValueError(f"{name} has dtype {values.dtype}; it takes {kind}: the model has {space}")
    given, expected = tuple(values.shape), shape + space.shape
    if values.ndim == len(expected) - 1:
        values = values.expand(shape[0], *values.shape)
    if tuple(values.shape) != expected:
        raise ValueError(f"{name} has shape {given}; it takes {takes}: the model has {space}")
    if space.is_vector:
        values = values.to(device=device, dtype=torch.float32)
        missing = values.isnan()
        if values.isinf().any() or (missing.any(-1) & ~missing.all(-1)).any():
            raise ValueError(
                f"{name} has vectors with infinite values, or with NaN beside numbers; a vector of NaN alone "
                "is the null condition"
            )
        return values
    values = values.to(device=device, dtype=torch.long)
    for group, size in enumerate(space.sizes):
        of_group = values[..., group]
        if of_group.numel() and (int(of_group.min()) < -1 or int(of_group.max()) > size):
            raise ValueError(
                f"{name} has values from {int(of_group.min())} to {int(of_group.max())} in group {group}; it "
                f"takes 0 to {size - 1}, or -1 or {size} for the null condition"
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


def describe_actions(names: ActionNames | None, space: ActionSpace) -> str:
    """What the words of a text of actions are, for people."""
    if space.is_vector:
        return "+".join(f"{name}=NUMBER" for name in names or map(str, range(space.shape[0])))
    if not space.is_grouped:
        return ", ".join(map(str, names)) if names else f"0 to {space.sizes[0] - 1}"
    return ", ".join(
        f"{name}={'|'.join(values) if values else f'0 to {size - 1}'}"
        for (name, values), size in zip(_groups(names, space), space.sizes, strict=True)
    )


def parse_actions(script: str, names: ActionNames | None, space: ActionSpace, num_frames: int) -> list[Any]:
    """Actions of `num_frames` frames, of a text such as "forward*8 left*4 forward".

    Of groups, a word names those that have an action other than 0: "keyboard=forward+mouse=left*8", or
    "forward+left*8" where this is no question. Of vectors, it names numbers: "x=0.5+y=-1*8"; the others are
    the mean of the training data, or 0.

    Args:
        script: actions by names or numbers, each with an optional count; the last one goes on until the end.
        names: as of a pipeline's `action_names`.
        space: what the model takes.
        num_frames: of the result.

    Raises:
        ValueError: for a word that is no action or no count.
    """
    if len(script) > MAX_ACTIONS_TEXT:
        raise ValueError(f"The actions have {len(script)} characters: at most {MAX_ACTIONS_TEXT}.")
    actions: list[Any] = []
    for word in script.replace(",", " ").split():
        name, star, count = word.partition("*")
        action = _action(name, names, space)
        repeats = _whole_number(count) if star else 1
        if action is None or repeats is None:
            shown = word if len(word) <= 40 else f"{word[:40]}..."
            known = describe_actions(names, space)
            raise ValueError(f"{shown!r} is not an action: it takes {known}, each with a count such as *8.")
        actions += [action] * min(repeats, num_frames - len(actions))
    if not actions:
        raise ValueError("The actions are empty: it takes words such as forward*8.")
    return actions + actions[-1:] * (num_frames - len(actions))


def _action(word: str, names: ActionNames | None, space: ActionSpace) -> Any:
    """The action of a word without its count; None if there is none."""
    if not space.shape:
        return _index(word, [str(name) for name in names or ()], space.sizes[0])
    if space.is_vector:
        vector = list(space.mean or (0.0,) * space.shape[0])
        for part in word.split("+"):
            name, _, text = part.partition("=")
            index, number = _index(name, [str(name) for name in names or ()], len(vector)), _number(text)
            if index is None or number is None:
                return None
            vector[index] = number
        return vector
    groups, chosen = _groups(names, space), [0] * len(space.sizes)
    for part in word.split("+"):
        name, equals, value = part.partition("=")
        if equals:
            index = _index(name, [name for name, _ in groups], len(groups))
        else:  # the group that has an action of this name, if only one has
            owners = [index for index, (_, values) in enumerate(groups) if values and name in values]
            index, value = owners[0] if len(owners) == 1 else None, name
        action = None if index is None else _index(value, groups[index][1] or [], space.sizes[index])
        if index is None or action is None:
            return None
        chosen[index] = action
    return chosen


def _groups(names: ActionNames | None, space: ActionSpace) -> list[tuple[str, list[str] | None]]:
    return group_names(names or [str(group) for group in range(len(space.sizes))])


def _index(word: str, names: Sequence[str], number: int) -> int | None:
    """Of a name or number among `number`."""
    index = names.index(word) if word in names else _whole_number(word)
    return index if index is not None and index < number else None


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _whole_number(text: str) -> int | None:
    """None for other texts, and for numbers of more digits than any count has."""
    return int(text) if text.isdecimal() and len(text) <= 18 else None
