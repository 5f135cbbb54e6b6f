"""Uploads and scripts of actions: what is taken, and what visitors are told."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusers_far.actions import ActionSpace
from diffusers_far.browser import uploads
from diffusers_far.browser.uploads import read_upload
from diffusers_far.inputs import parse_actions
from diffusers_far.video_files import save_video

NAMES = ["noop", "forward", "left", "forward-left"]


def wide_video(path: Path, num_frames: int = 5) -> Path:
    """Frames 96 x 48: red left, blue right, green in the middle 48 columns."""
    frame = np.zeros((48, 96, 3))
    frame[:, :24, 0] = frame[:, 24:72, 1] = frame[:, 72:, 2] = 1.0
    save_video(np.stack([frame] * num_frames), path, 10)
    return path


@pytest.mark.parametrize(
    ("fit", "left", "top"), [("crop to fill", 1, 1), ("stretch", 0, 1), ("pad", 0, None)]
)
def test_frames_are_made_to_fit(tmp_path: Path, fit: str, left: int, top: int | None) -> None:
    """`left`: the colour at the left edge; the top of a padded picture is blurred filling."""
    video = read_upload(wide_video(tmp_path / "wide.mp4"), 32, 32, fit)
    assert video.shape == (5, 32, 32, 3) and video.dtype == np.uint8
    assert video[2, 16, 2].argmax() == left
    assert video[2, 16, 16].argmax() == 1
    if top is not None:
        assert video[2, 2, 16].argmax() == top


def test_gifs_are_videos(tmp_path: Path) -> None:
    images = [Image.new("RGB", (40, 40), (60 * index, 0, 0)) for index in range(4)]
    images[0].save(tmp_path / "moving.gif", save_all=True, append_images=images[1:], duration=100)
    video = read_upload(tmp_path / "moving.gif", 16, 16, "stretch")
    assert len(video) == 4
    assert np.abs(video[:, 8, 8, 0].astype(int) - [0, 60, 120, 180]).max() < 10


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = wide_video(tmp_path / "wide.mp4")
    monkeypatch.setattr(uploads, "MAX_UPLOAD_FRAMES", 5)
    assert len(read_upload(path, 16, 16, "pad")) == 5
    monkeypatch.setattr(uploads, "MAX_UPLOAD_FRAMES", 4)
    with pytest.raises(ValueError, match=r"too long: at most 4 frames"):
        read_upload(path, 16, 16, "pad")
    monkeypatch.setattr(uploads, "MAX_UPLOAD_PIXELS", 96 * 47)
    with pytest.raises(ValueError, match=r"96 x 48 pixels"):
        read_upload(path, 16, 16, "pad")
    monkeypatch.setattr(uploads, "MAX_UPLOAD_MB", 0.0001)
    with pytest.raises(ValueError, match=r"MB: at most 0.0001 MB"):
        read_upload(path, 16, 16, "pad")


@pytest.mark.parametrize("content", [b"", b"not a video", b"GIF89a"])
def test_a_file_that_is_no_video(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file.mp4").write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as a video"):
        read_upload(tmp_path / "file.mp4", 16, 16, "pad")


def test_a_truncated_video(tmp_path: Path) -> None:
    path = wide_video(tmp_path / "wide.mp4")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="cannot be read as a video"):
        read_upload(path, 16, 16, "pad")


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("forward*2 left", [1, 1, 2, 2, 2]),
        ("noop, forward-left*9", [0, 3, 3, 3, 3]),
        ("2*3\n1", [2, 2, 2, 1, 1]),
        ("left*1000000000000", [2, 2, 2, 2, 2]),
    ],
)
def test_scripts(script: str, expected: list[int]) -> None:
    assert parse_actions(script, NAMES, ActionSpace(4), 5) == expected


@pytest.mark.parametrize(
    "script", ["up", "forward*x", "forward*", "4", "-1", "", "  ", "forward*2*3", "left*-1"]
)
def test_bad_scripts(script: str) -> None:
    with pytest.raises(ValueError, match=r"not an action|are empty"):
        parse_actions(script, NAMES, ActionSpace(4), 5)


def test_actions_without_names() -> None:
    assert parse_actions("1*2 0", None, ActionSpace(2), 3) == [1, 1, 0]
    with pytest.raises(ValueError, match="it takes 0 to 1"):
        parse_actions("forward", None, ActionSpace(2), 3)
