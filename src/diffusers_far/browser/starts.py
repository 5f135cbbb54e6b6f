"""Real frames to begin a game with."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..actions import ActionSpace
from ..inputs import action_tensor, fit_frame
from ..video_files import read_video


@dataclass(frozen=True)
class Start:
    """The beginning of a game: frames `[T, H, W, 3]` uint8, and the actions `[T, ...]` that led to them."""

    frames: np.ndarray
    actions: list[Any] | None


def read_episodes(folder: Path) -> list[Start]:
    """Videos of a split of a videofolder, with their actions where its metadata have them.

    Raises:
        ValueError: when there is no `metadata.jsonl`, or it names a file that cannot be read.
    """
    table = folder / "metadata.jsonl"
    if not table.is_file():
        raise ValueError(f"episodes={str(folder)!r} has no metadata.jsonl: it takes a split of a videofolder")
    rows = [json.loads(line) for line in table.read_text().splitlines() if line.strip()]
    return [Start(read_video(folder / row["file_name"]), row.get("actions")) for row in rows]


def cut_starts(episodes: list[Start], num_starts: int = 6, num_frames: int = 32) -> list[Start]:
    """Evenly spread clips of the episodes."""
    starts = []
    for number in range(num_starts if episodes else 0):
        episode = episodes[number % len(episodes)]
        rounds = -(-num_starts // len(episodes))
        first = (len(episode.frames) - num_frames) * (number // len(episodes)) // rounds
        clip = slice(max(0, first), max(0, first) + num_frames)
        actions = None if episode.actions is None else episode.actions[clip]
        starts.append(Start(episode.frames[clip], actions))
    return starts


def fit_starts(starts: list[Start], size: tuple[int, int], space: ActionSpace | None) -> list[Start]:
    """Starts for a model of this size of frames and such actions.

    Actions that the model does not know come from another world: the frames stay, with no word of what led to
    them.
    """
    fitted = []
    for start in starts:
        frames = [fit_frame(frame, *size) for frame in start.frames]
        known = start.actions is not None and _are_known(start.actions, space)
        fitted.append(Start(np.stack(frames), start.actions if known else None))
    return fitted


def starts_for_export(
    episodes: Path, size: tuple[int | None, int | None], space: ActionSpace | None, num_frames: int = 8
) -> list[tuple[np.ndarray, list[Any] | None]]:
    """Short clips for a model of this size of frames; none for a model of any size.

    A long clip would take long to be committed before the first frame. The one with most to see comes first.
    """
    height, width = size
    if height is None or width is None:
        return []
    clips = cut_starts(read_episodes(episodes), num_frames=num_frames)
    starts = fit_starts(clips, (height, width), space)
    starts.sort(key=lambda start: -_colours(start.frames[-1]))
    return [(start.frames, start.actions) for start in starts]


def _colours(frame: np.ndarray) -> float:
    """How much there is to see in a frame `[H, W, 3]` uint8: the entropy of its colours, in 512 classes."""
    classes = (frame >> 5).astype(int) @ (64, 8, 1)
    shares = np.bincount(classes.ravel()) / classes.size
    return -float((shares * np.log2(shares, where=shares > 0, out=np.zeros_like(shares))).sum())


def _are_known(actions: list[Any], space: ActionSpace | None) -> bool:
    if space is None:
        return False
    if not space.shape:
        return all(isinstance(action, int) and 0 <= action < space.sizes[0] for action in actions)
    try:
        action_tensor("actions", actions, space, (1, len(actions)), torch.device("cpu"))
    except ValueError:
        return False
    return True
