"""training/episodes.py: frames one by one, at which times, at which size, and what is refused."""

import hashlib
import zipfile
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffusers_far import read_video
from diffusers_far.training.episodes import Actions, ArrayVideo, EmbeddedVideo, Episode, RecordedVideo, fit
from diffusers_far.training.options import FrameOptions
from tests.video_writing import numbered_frames, numbers, write_video


def episode(file: Path, **known: Any) -> Episode:
    return Episode(file.stem, RecordedVideo(file), **known)


def kept(one: Episode, **options: Any) -> tuple[list[int], list[int]]:
    """Numbers that frames come with, and those that their pixels show."""
    pairs = list(one.frames(FrameOptions(**options)))
    return [number for number, _ in pairs], numbers([frame for _, frame in pairs])


def test_all_frames_by_default(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", numbered_frames(12))
    one = episode(tmp_path / "a.mp4")
    frames = [frame for _, frame in one.frames()]
    assert np.array_equal(frames, read_video(tmp_path / "a.mp4"))
    assert kept(one) == (list(range(12)), list(range(12)))
    stated = one.video.stated()
    assert (stated.num_frames, stated.height, stated.width) == (12, 32, 48)
    assert one.frame_rate == 10


def test_stride_and_fps_take_frames_by_number_and_by_time(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", numbered_frames(30), rate=30)
    one = episode(tmp_path / "a.mp4")
    assert kept(one, stride=7) == ([0, 7, 14, 21, 28],) * 2
    assert kept(one, fps=10) == (list(range(0, 30, 3)),) * 2
    assert kept(one, fps=10, stride=2) == (list(range(0, 30, 6)),) * 2
    assert kept(one, fps=12)[0] == [0, 2, 5, 7, 10, 12, 15, 17, 20, 22, 25, 27]  # the one shown at k / 12 s


def test_a_variable_rate_keeps_its_pace(tmp_path: Path) -> None:
    """As of a phone: 20 frames a second, a second in which it hangs, and 40 frames a second."""
    times = [*range(0, 500, 50), *range(1500, 2000, 25)]
    for ending in ("mp4", "mkv"):
        write_video(tmp_path / f"a.{ending}", numbered_frames(30), times=times)
        found, shown = kept(episode(tmp_path / f"a.{ending}"), fps=10)
        expected = [max(n for n, time in enumerate(times) if time <= 100 * k) for k in range(20)]
        assert found == shown == expected
        assert found.count(9) == 10  # the frame at which it hung, for as long as it did


def test_a_faster_rate_repeats_frames(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", numbered_frames(4), rate=5)
    assert kept(episode(tmp_path / "a.mp4"), fps=10)[0] == [0, 0, 1, 1, 2, 2, 3]


def test_part_of_a_video(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", numbered_frames(31), rate=10)
    part = Episode("a", RecordedVideo(tmp_path / "a.mp4", 1.95, 2.45))
    assert kept(part) == (list(range(5)), [20, 21, 22, 23, 24])
    assert part.video.stated().num_frames == 5
    other = RecordedVideo(tmp_path / "a.mp4", 1.95, 2.55)
    assert part.video.digest().hexdigest() != other.digest().hexdigest()


def test_a_file_in_memory_reads_as_the_file(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", numbered_frames(5))
    data = (tmp_path / "a.mp4").read_bytes()
    one = Episode("x/a", EmbeddedVideo(tmp_path / "shard.tar", data, ".mp4"))
    assert kept(one) == ([0, 1, 2, 3, 4],) * 2
    assert one.where.endswith("shard.tar: x/a")
    assert one.video.digest().hexdigest() == hashlib.sha256(data).hexdigest()


def test_arrays_are_read_frame_by_frame(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (6, 8, 10, 3), dtype=np.uint8)
    np.savez(tmp_path / "plain.npz", video=frames)
    np.savez_compressed(tmp_path / "small.npz", video=frames)
    for name in ("plain", "small"):
        one = Episode(name, ArrayVideo(tmp_path / f"{name}.npz"))
        assert np.array_equal([frame for _, frame in one.frames()], frames)
        assert kept(one, stride=4)[0] == [0, 4]
        assert one.video.stated().num_frames == 6 and one.frame_rate is None
    # The file is longer than what is read of it.
    with zipfile.ZipFile(tmp_path / "cut.npz", "w") as archive:
        content = zipfile.ZipFile(tmp_path / "plain.npz").read("video.npy")
        archive.writestr("video.npy", content[:-100])
    cut = Episode("cut", ArrayVideo(tmp_path / "cut.npz"))
    assert len(list(islice(cut.frames(), 5))) == 5
    with pytest.raises(ValueError, match=r"cut\.npz is cut off after 5 of 6 frames"):
        list(cut.frames())


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (np.zeros((2, 4, 4, 3), np.float32), r"video is float32 \[2, 4, 4, 3\]; it takes uint8"),
        (np.zeros((2, 3, 4, 4), np.uint8), r"video is uint8 \[2, 3, 4, 4\]; it takes uint8 \[T, H, W, 3\]"),
        (
            np.asfortranarray(np.zeros((2, 4, 4, 3), np.uint8)),
            r"video is uint8 \[2, 4, 4, 3\] in Fortran order; it takes",
        ),
        (np.zeros((0, 4, 4, 3), np.uint8), r"video is uint8 \[0, 4, 4, 3\]"),
    ],
)
def test_arrays_that_are_no_videos_are_named(tmp_path: Path, video: np.ndarray, message: str) -> None:
    np.savez(tmp_path / "a.npz", video=video)
    with pytest.raises(ValueError, match=rf"a\.npz: {message}"):
        list(Episode("a", ArrayVideo(tmp_path / "a.npz")).frames())


def test_fit_crops_pads_or_stretches() -> None:
    frame = np.zeros((20, 40, 3), np.uint8)
    frame[:, 10:30] = 200  # the middle square
    cropped, padded, stretched = (fit(frame, 10, 10, how) for how in ("crop", "pad", "stretch"))
    assert cropped.shape == padded.shape == stretched.shape == (10, 10, 3)
    assert cropped.min() > 180  # what lies beside it leaves a trace
    assert padded[:2].max() == padded[-2:].max() == 0  # above and below
    assert padded[5, 5].min() > 180 and padded[5, 0].max() < 10
    assert stretched[:, 4:6].min() > 180 and stretched[:, :1].max() < 10
    assert fit(frame, 20, 40, "crop") is frame


def test_resolution(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", numbered_frames(3))
    shapes = {
        frame.shape for _, frame in episode(tmp_path / "a.mp4").frames(FrameOptions(resolution="16x24"))
    }
    assert shapes == {(16, 24, 3)}
    assert FrameOptions(resolution="64").frame_size == (64, 64) and FrameOptions().frame_size is None
    for value in ("64x", "0", "axb", "64x64x64", "-8", "64 x 64"):
        with pytest.raises(ValueError, match=f"resolution={value!r} must be a number of pixels, or two"):
            FrameOptions(resolution=value)
    with pytest.raises(ValueError, match="stride=0 must be an integer of at least 1"):
        FrameOptions(stride=0)
    with pytest.raises(ValueError, match="fps=0 must be a number greater than 0"):
        FrameOptions(fps=0)


def test_what_does_not_fit_the_frames_is_named(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", numbered_frames(4))
    with pytest.raises(ValueError, match=r"a\.mp4: 4 frames, but 3 actions"):
        list(
            episode(tmp_path / "a.mp4", read_actions=lambda: Actions((1, 2, 3))).frames(
                FrameOptions(stride=4)
            )
        )
    with pytest.raises(ValueError, match=r"a\.mp4: 4 frames, but 5 revisits"):
        list(episode(tmp_path / "a.mp4", revisits=(0,) * 5).frames())
    np.savez(tmp_path / "b.npz", video=numbered_frames(2))
    with pytest.raises(
        ValueError, match=r"fps=5: .*b\.npz does not say when its frames are shown; give a stri"
    ):
        list(Episode("b", ArrayVideo(tmp_path / "b.npz")).frames(FrameOptions(fps=5)))
    whole = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(whole[:-200])
    with pytest.raises(ValueError, match=r"a\.mp4.* cannot be read as a video|a\.mp4.* is cut off"):
        list(episode(tmp_path / "a.mp4").frames())


def test_images_of_two_sizes_take_a_resolution(tmp_path: Path) -> None:
    from PIL import Image

    from diffusers_far.training.episodes import ImageSequence

    files = []
    for number, side in enumerate((8, 8, 12)):
        files.append(tmp_path / f"{number}.png")
        Image.new("RGB", (side, side), (8 * number,) * 3).save(files[-1])
    one = Episode("a", ImageSequence(tmp_path, tuple(files)))
    with pytest.raises(ValueError, match=r"has frames of 8 x 8 and of 12 x 12 pixels; give a resolution"):
        list(one.frames())
    assert kept(one, resolution="8") == ([0, 1, 2],) * 2
