"""evaluation/rollout_picture.py: real frames above predicted ones, of any data that training takes."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusers_far.shipped import ANY_STEP_CHECKPOINT
from evaluation import rollout_picture


@pytest.mark.parametrize("split", ["", "validation"])
def test_held_out_videos_or_all(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str
) -> None:
    """Of data with a split for validation, those of training are left out."""
    videos = {"a": 7, "b": 200}
    folder = tmp_path / "data" / split
    folder.mkdir(parents=True)
    for name, level in videos.items():
        video = np.full((5, 96, 64, 3), level, np.uint8)
        np.savez(folder / f"{name}.npz", video=video, actions=np.ones(5, int))
    if split:
        (tmp_path / "data/train").mkdir()
        np.savez(
            tmp_path / "data/train/c.npz", video=np.zeros((5, 64, 64, 3), np.uint8), actions=np.ones(5, int)
        )
    picture = tmp_path / "picture.png"
    words = [str(repository / ANY_STEP_CHECKPOINT), str(tmp_path / "data"), "--output", str(picture)]
    words += ["--context", "3", "--frames", "2", "--columns", "2", "--steps", "1"]
    monkeypatch.setattr(sys, "argv", ["rollout_picture.py", *words])
    rollout_picture.main()
    pixels = np.array(Image.open(picture))
    assert pixels.shape[1] == 2 * (2 * 64 + 2)  # columns of frames at twice their size, with gaps
    rows = pixels.shape[0] // len(videos)
    for number, level in enumerate(videos.values()):
        real = pixels[number * rows : number * rows + 128, :128]
        made = pixels[number * rows + 130 : number * rows + 258, :128]
        assert (real == level).all() and np.ptp(made) > 0

    monkeypatch.setattr(sys, "argv", ["rollout_picture.py", *words, "--frames", "9"])
    with pytest.raises(SystemExit):
        rollout_picture.main()
