"""Clips of a recording of a robot: which frames, with which actions, in which split."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from diffusers_far.video_files import read_video, save_video

SCRIPT = Path(__file__).parents[2] / "data" / "robot_clips.py"
ROWS = 200  # of an episode: 67 kept frames, two clips and a rest


def level(row: Any) -> Any:
    """Seven from that of the next frame, or far more."""
    return 20 + 7 * row % 196


def write_episode(repository: Path, number: int, num_frames: int = ROWS) -> None:
    """Frame r has the brightness `level(r)`; the targets of row r are 100 * number + r and r / 2."""
    video = repository / "videos" / "head" / f"episode_{number:06}.mp4"
    table = repository / "data" / f"episode_{number:06}.parquet"
    for path in (video, table):
        path.parent.mkdir(parents=True, exist_ok=True)
    frames = (np.full((60, 80, 3), level(index), np.uint8) for index in range(num_frames))
    save_video(frames, video, 30)
    targets = [[100.0 * number + row, row / 2] for row in range(ROWS)]
    parquet.write_table(pyarrow.table({"action": targets, "frame_index": list(range(ROWS))}), table)


def cut(repository: Path, output: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPT, repository, output], capture_output=True, text=True, timeout=300
    )


def test_clips_have_every_third_frame_and_what_led_to_it(tmp_path: Path) -> None:
    repository, output = tmp_path / "clone", tmp_path / "clips"
    for number in (2, 3):
        write_episode(repository, number)
    (repository / "data" / "episode_000007.parquet").write_bytes(
        (repository / "data" / "episode_000002.parquet").read_bytes()
    )
    ran = cut(repository, output)
    assert ran.returncode == 0, ran.stderr
    assert "episode_000007: no video" in ran.stdout
    assert "2 clips to train on, 2 for validation" in ran.stdout
    names = {str(path.relative_to(output)) for path in output.glob("*/*")}
    assert names == {
        f"{split}/episode_{number:06}_{clip:02}.{kind}"
        for split, number in (("train", 2), ("validation", 3))
        for clip in (0, 1)
        for kind in ("mp4", "npz")
    }
    for clip in (0, 1):
        path = output / "validation" / f"episode_000003_{clip:02}.mp4"
        video, actions = read_video(path), np.load(path.with_suffix(".npz"))["actions"]
        assert video.shape == (32, 12, 16, 3) and actions.shape == (32, 2) and actions.dtype == np.float32
        rows = 3 * np.arange(32 * clip, 32 * (clip + 1))
        assert np.abs(video.mean(axis=(1, 2, 3)) - level(rows)).max() < 3.5
        expected = np.stack([300.0 + rows - 1, (rows - 1) / 2], axis=1)
        if clip == 0:
            assert np.isnan(actions[0]).all()
            actions, expected = actions[1:], expected[1:]
        np.testing.assert_array_equal(actions, expected)


@pytest.mark.parametrize("num_frames", [None, ROWS - 20])
def test_what_is_no_recording_is_told(tmp_path: Path, num_frames: int | None) -> None:
    if num_frames is not None:
        write_episode(tmp_path / "clone", 1, num_frames)
    ran = cut(tmp_path / "clone", tmp_path / "clips")
    assert ran.returncode != 0
    said = "no episode_*.parquet in it" if num_frames is None else "60 kept frames"
    assert said in ran.stderr
