"""A held-out episode, and truth beside prediction."""

import json
from pathlib import Path

import numpy as np

from .video_files import read_video


def load_episode(folder: Path, index: int) -> tuple[np.ndarray, list[int]]:
    """Frames `[T, H, W, 3]` uint8 and actions `[T]` of an episode of a videofolder split."""
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    if not 0 <= index < len(lines):
        raise ValueError(f"--episode: got {index}; {folder} has episodes 0 to {len(lines) - 1}")
    episode = json.loads(lines[index])
    return read_video(folder / episode["file_name"]), episode["actions"]


def zoom_of(height: int, width: int) -> int:
    """How many times a small frame is enlarged, so that its shorter side has about 256 pixels."""
    return max(1, 256 // min(height, width))


def side_by_side(truth: np.ndarray, prediction: np.ndarray, num_context: int, zoom: int = 4) -> np.ndarray:
    """Truth left, prediction right, both `[T, H, W, 3]` in [0, 1]; a green frame marks context, a red
    one prediction.
    """
    panels = []
    for video in (truth, prediction):
        large = video.repeat(zoom, axis=1).repeat(zoom, axis=2)
        panels.append(np.pad(large, ((0, 0), (zoom, zoom), (zoom, zoom), (0, 0))))
    border = np.ones(panels[1].shape[1:3], bool)
    border[zoom:-zoom, zoom:-zoom] = False
    panels[1][:num_context, border] = (0.2, 0.8, 0.3)
    panels[1][num_context:, border] = (0.9, 0.2, 0.2)
    joined = np.concatenate(panels, axis=2)
    even = [(0, size % 2) for size in joined.shape[1:3]]  # for a common kind of H.264
    return np.pad(joined, ((0, 0), *even, (0, 0)))
