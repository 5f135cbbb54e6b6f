"""Clips to begin a game with, as files of an export: pictures for the player, latents for the model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..actions import ActionSpace
from ..inputs import action_tensor
from ..pipeline_far_video import FARVideoPipeline

Clip = tuple[np.ndarray, Sequence[Any] | None]


def check_starts(starts: Sequence[Clip], size: tuple[int, int], space: ActionSpace | None) -> None:
    """Raise a ValueError unless clips have frames of this size, and a known action per frame."""
    for index, (frames, actions) in enumerate(starts):
        name = f"starts[{index}]"
        if frames.dtype != np.uint8 or frames.shape[1:] != (*size, 3) or not len(frames):
            takes = f"uint8 [T, {size[0]}, {size[1]}, 3]"
            raise ValueError(f"{name} has frames {frames.dtype} {list(frames.shape)}; it takes {takes}")
        if actions is not None:
            action_tensor(f"{name} actions", [list(actions)], space, (1, len(frames)), torch.device("cpu"))


def write_starts(pipeline: FARVideoPipeline, starts: Sequence[Clip], folder: Path) -> list[dict[str, Any]]:
    """Write clips as latents (float16) and their frames side by side; names of the files, and actions."""
    written = []
    for index, (frames, actions) in enumerate(starts):
        latents, picture = f"start_{index}.bin", f"start_{index}.jpg"
        with torch.no_grad():
            encoded = pipeline.encode_video(frames, *frames.shape[1:3])[0].cpu().numpy()
        (folder / latents).write_bytes(encoded.astype("<f2").tobytes())
        strip = Image.fromarray(np.concatenate(list(frames), axis=1))
        strip.save(folder / picture, quality=90, subsampling=0)
        written.append(
            {
                "num_frames": len(frames),
                "latents": latents,
                "picture": picture,
                "actions": None if actions is None else [_as_json(action) for action in actions],
            }
        )
    return written


def _as_json(action: Any) -> Any:
    """An action without NaN, which JSON does not have: the null condition is null."""
    value = np.asarray(action)
    return None if value.dtype.kind == "f" and np.isnan(value).any() else value.tolist()
