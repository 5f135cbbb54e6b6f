"""Which clips an evaluation takes, and what is read of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffusers_far.evaluation.clips import Clip, choose_clips, open_clips
from diffusers_far.evaluation.protocols import EvaluateOptions
from tests.evaluation.guesses import write_videos


def options(**changes: Any) -> EvaluateOptions:
    return EvaluateOptions(**{"num_context": 4, "num_frames": 10, "measures": ["psnr"]} | changes)


def test_videos_are_spread_and_short_ones_left_out() -> None:
    videos = [(f"v{i:02d}", 9 if i % 4 == 0 else 30, None) for i in range(20)]
    clips, num_short = choose_clips(videos, options(num_videos=3))
    assert num_short == 5 and [clip.video for clip in clips] == ["v01", "v07", "v14"]
    assert [clip.video for clip in choose_clips(videos, options(every=5))[0]] == ["v01", "v07", "v14"]
    for every_one in (options(), options(protocol="mcvd", num_videos=0)):
        assert len(choose_clips(videos, every_one)[0]) == 15


def test_clips_of_a_video_reach_from_its_beginning_to_its_end() -> None:
    clips, _ = choose_clips([("a", 30, None), ("b", 11, None)], options(clips_per_video=3))
    starts = [(clip.video, clip.start) for clip in clips]
    assert starts == [("a", 0), ("a", 10), ("a", 20), ("b", 0), ("b", 1)]


def test_latte_takes_as_many_videos_of_each_class() -> None:
    videos = [(f"v{i:02d}", 16, 0 if i < 12 else i % 3) for i in range(24)]  # 16 of class 0, 4 of the others
    latte = {"protocol": "latte", "num_context": 0, "num_frames": 16, "measures": ["fvd"]}
    labels = [clip.class_label for clip in choose_clips(videos, options(**latte, num_videos=9))[0]]
    assert [labels.count(label) for label in range(3)] == [3, 3, 3]
    labels = [clip.class_label for clip in choose_clips(videos, options(**latte, num_videos=20))[0]]
    assert [labels.count(label) for label in range(3)] == [12, 4, 4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_videos": 3}, "num_videos=3: validation has 2 videos of 10 frames or more"),
        ({"num_frames": 100}, "num_frames=100: the longest of 2 videos in validation has 24 frames"),
        ({"split": "test"}, "has no folder 'test'"),
        ({"num_videos": 1, "num_frames": 24, "measures": ["fvd"]}, "fvd takes two or more"),
    ],
)
def test_data_that_do_not_suffice_are_refused(changes: Any, message: str, tmp_path: Path) -> None:
    write_videos(tmp_path, 2)
    with pytest.raises(ValueError, match=message):
        open_clips(tmp_path, options(**changes))


def test_frames_and_their_actions(tmp_path: Path) -> None:
    write_videos(tmp_path, 2, actions=np.arange(24) % 5)
    settled = options(stride=2, clips_per_video=2, num_videos=1)
    videos = open_clips(tmp_path, settled)
    assert videos.clips == [Clip("000", 0), Clip("000", 2)]
    stored = np.load(tmp_path / "validation" / "000.npz")
    for real in videos.read(videos.clips, settled.frame_options()):
        frames = slice(2 * real.clip.start, 2 * real.clip.start + 20, 2)
        assert real.frames is not None and real.actions is not None
        pixels = (real.frames * 255).round().byte().movedim(1, -1)
        assert torch.equal(pixels, torch.from_numpy(stored["video"][frames]))
        assert real.actions.tolist() == stored["actions"][frames].tolist()
    ignoring = options(ignore_actions=True)
    videos = open_clips(tmp_path, ignoring)
    assert next(videos.read(videos.clips, ignoring.frame_options())).actions is None


def test_a_folder_without_splits_is_held_out_or_whole(tmp_path: Path) -> None:
    write_videos(tmp_path, 5, split=".")
    assert len(open_clips(tmp_path, options()).clips) == 2  # as training holds out
    assert len(open_clips(tmp_path, options(split="train")).clips) == 5
