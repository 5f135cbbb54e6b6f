"""Clips of a real robot, with what its joints were told: a small data set of real video.

    git clone https://github.com/YifanTian07/G1-policy-train
    python data/robot_clips.py G1-policy-train robot-clips

A Unitree G1 picks up a can, filmed by its head camera: 100 episodes at 30 frames a second, 640 x 480, with
26 joint targets a frame; MIT license, as the repository says. Every third frame is kept, shrunk to 128 x 96,
and episodes are cut into clips of 32 frames without overlap. All clips of every seventh episode are for
validation. What is too short, or has no video in the clone, is left out.

OUTPUT gets train/ and validation/ with `<clip>.mp4` and `<clip>.npz`, whose `actions` `[32, 26]` led to the
frames: the joint targets that were set last before each; NaN for the first frame of an episode.
"""

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from pyarrow import parquet

from diffusers_far.video_files import iterate_video, save_video
from diffusers_far.whole_files import written_whole

FRAME_RATE, KEPT = 30, 3  # of the source, and which frame of it
FRAMES = 32  # of a clip
SHRINK = 5  # per side
HELD_OUT = 7  # each so many-th episode


def shrunk(frame: np.ndarray) -> np.ndarray:
    """A frame `[H, W, 3]` uint8 with the means of squares as pixels."""
    height, width = (side // SHRINK * SHRINK for side in frame.shape[:2])
    squares = frame[:height, :width].reshape(height // SHRINK, SHRINK, width // SHRINK, SHRINK, 3)
    return squares.mean(axis=(1, 3)).round().astype(np.uint8)


def clips_of(video: Path, table: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Frames `[F, H, W, 3]` and actions `[F, A]` of each clip of an episode.

    Raises:
        ValueError: where video and table are not of the same frames.
    """
    told = np.array(parquet.read_table(table, columns=["action"])["action"].to_pylist(), np.float32)
    frames = [shrunk(frame) for frame in itertools.islice(iterate_video(video), 0, None, KEPT)]
    if len(frames) != len(range(0, len(told), KEPT)):
        raise ValueError(f"{video}: {len(frames)} kept frames; {table} has {len(told)} rows, {KEPT} for each")
    # A row has what was set at its frame, so what led to a kept frame stands in the row before.
    actions = np.concatenate([np.full_like(told[:1], np.nan), told[KEPT - 1 :: KEPT]])
    for begin in range(0, len(frames) - FRAMES + 1, FRAMES):
        chosen = slice(begin, begin + FRAMES)
        yield np.stack(frames[chosen]), actions[chosen]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("repository", type=Path, help="folder of the clone")
    parser.add_argument("output", type=Path, help="folder of the clips")
    arguments = parser.parse_args()
    tables = sorted(arguments.repository.glob("**/episode_*.parquet"))
    if not tables:
        parser.error(f"REPOSITORY {arguments.repository}: no episode_*.parquet in it")
    counts = {"train": 0, "validation": 0}
    for table in tables:
        videos = sorted(arguments.repository.glob(f"**/{table.stem}.mp4"))
        if not videos:
            print(f"{table.stem}: no video")
            continue
        split = "validation" if int(table.stem.partition("_")[2]) % HELD_OUT == 3 else "train"
        folder = arguments.output / split
        folder.mkdir(parents=True, exist_ok=True)
        for number, (frames, actions) in enumerate(clips_of(videos[0], table)):
            clip = folder / f"{table.stem}_{number:02}.mp4"
            with written_whole(clip.with_suffix(".npz")) as unfinished, unfinished.open("wb") as file:
                np.savez_compressed(file, actions=actions)
            save_video(frames, clip, FRAME_RATE / KEPT)
            counts[split] += 1
    print(f"{counts['train']} clips to train on, {counts['validation']} for validation")


if __name__ == "__main__":
    main()
