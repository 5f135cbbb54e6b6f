"""The files of a doom-maze recording: videos, metadata, data card, and what makes the recording resumable.

    OUTPUT/README.md                        data card
    OUTPUT/<split>/00000.mp4                one video per episode
    OUTPUT/<split>/metadata.jsonl           one line per episode
    OUTPUT/.recorder/settings.json          settings of the recording
    OUTPUT/.recorder/<split>/00000.json     an episode's line of the metadata, written before its video

`datasets` skips the hidden folder. Every file is written under another name and then renamed, so a recorder
that is killed at any time leaves no partial file where a reader would find it.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

ACTIONS = ("noop", "forward", "left", "right", "forward_left", "forward_right")
SPLITS = ("train", "validation")
WALKS = ("explore", "revisit", "scripted")
TEXTURE_SETS = ("standard", "other")
STATE_FOLDER = ".recorder"
CARD_TEMPLATE = Path(__file__).with_name("README_doom_maze.md")

CLIP_LENGTHS = (96, 256)  # of which the data card says how many contain a revisit

# The same view: so near that most of the picture is the same.
SAME_DISTANCE, SAME_ANGLE = 48, 25  # map units, degrees
# Still in view: so near that a part of the picture may be the same. Frames show 90 degrees.
# The angle is 60 and a degree more, because turns of 15 degrees add up to 60 only nearly.
NEAR_DISTANCE, NEAR_ANGLE = 160, 61

# For the data card: how each walk goes.
WALK_TEXTS = {
    "explore": """\
The walker heads for random cells, rarely visited ones first, along shortest
paths, and with a probability of 2% a frame holds a random action for 1 to 8 frames.""",
    "revisit": """\
The walker comes back: half of its goals are cells that
it has been to, the others rarely visited ones; some walks go out and back along the same path; it turns
around; on the way it looks away now and then, by 4 to 24 turns and back by the same number, and seldom holds
a random action for 1 to 8 frames.""",
    "scripted": """\
After a walk of 100 frames that comes back to cells
and views, each episode runs one script, by its number modulo 5: turn away from a view, so that nothing of it
is on screen for 8, 16, 32 or 64 frames, and turn back; or walk up to 4 cells ahead and back to the same pose.
Then the walker turns over views that it has just seen, and walks on.""",
}
SCRIPT_FIELDS = """\
- `script`: what the walker did: turn-away-8, -16, -32, -64 or there-and-back.
- `start_frame`: the index of the last frame at the starting view, before the walker leaves it.
- `return_frame`: the index of the first frame at which it has regained this view.
"""

Records = dict[str, list[dict[str, Any]]]  # the lines of the metadata by split


@dataclass(frozen=True)
class Settings:
    """What a recording's content depends on, besides the number of episodes."""

    seed: int
    frames: int
    textures: int
    walk: str = "explore"  # defaults: of folders that were recorded before there was a choice
    maze_nodes: tuple[int, int] = (4, 5)
    texture_set: str = "standard"

    def options(self) -> dict[str, str]:
        """The settings as options of the recorder: their names and values as text."""
        return {
            f"--{name.replace('_', '-')}": " ".join(map(str, value))
            if isinstance(value, tuple)
            else str(value)
            for name, value in vars(self).items()
        }


def video_path(output: Path, split: str, episode: int) -> Path:
    return output / split / f"{episode:05d}.mp4"


def record_path(output: Path, split: str, episode: int) -> Path:
    return output / STATE_FOLDER / split / f"{episode:05d}.json"


def settings_path(output: Path) -> Path:
    return output / STATE_FOLDER / "settings.json"


def read_settings(output: Path) -> Settings:
    values = json.loads(settings_path(output).read_text())
    return Settings(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


def write_text(path: Path, text: str) -> None:
    """Write a file beside its place, then rename it there."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text)
    part.replace(path)


def prepare_folder(output: Path, settings: Settings) -> None:
    """Make the folders of a recording; refuse to mix episodes of different settings in one."""
    path = settings_path(output)
    if path.exists():
        existing = read_settings(output).options()
        for name, value in settings.options().items():
            if value != existing[name]:
                raise ValueError(f"{name} is {value}, but {output} was recorded with {name} {existing[name]}")
    elif output.exists() and any(entry.name != STATE_FOLDER for entry in output.iterdir()):
        raise ValueError(f"output is {output}, which is neither empty nor a recording that could be resumed")
    for split in SPLITS:
        (output / STATE_FOLDER / split).mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(asdict(settings)))
    for split in SPLITS:
        (output / split).mkdir(exist_ok=True)
    for leftover in path.parent.glob("tmp*"):  # of a recorder that was killed
        shutil.rmtree(leftover, ignore_errors=True)


def write_metadata(output: Path) -> None:
    """Write the metadata of every split and the data card, from the records of the finished episodes."""
    episodes = {split: sorted(int(path.stem) for path in (output / split).glob("*.mp4")) for split in SPLITS}
    records = {
        split: [json.loads(record_path(output, split, episode).read_text()) for episode in episodes[split]]
        for split in SPLITS
    }
    check_disjoint(records)
    for split in SPLITS:
        if records[split]:
            write_text(output / split / "metadata.jsonl", metadata_lines(records[split]))
    settings = read_settings(output)
    write_text(output / "README.md", data_card(output, records, settings))


def metadata_lines(records: list[dict[str, Any]]) -> str:
    """The metadata of a split: its records, and when the view of each frame was seen before."""
    lines = [record | {"revisits": revisited_frames(record["poses"]).tolist()} for record in records]
    return "".join(json.dumps(line) + "\n" for line in lines)


def check_disjoint(records: Records) -> None:
    """Fail if a maze of one split is also in the other."""
    train, validation = ({tuple(record["maze"]) for record in records[split]} for split in SPLITS)
    if shared := train & validation:
        raise RuntimeError(f"{len(shared)} mazes are in both splits")


def copy_sample(recording: Path, output: Path, episodes: list[int]) -> None:
    """Copy validation episodes of a recording, unchanged, to a folder that is a data set of its own."""
    if not settings_path(recording).exists():
        raise ValueError(f"--sample-of is {recording}, which is not a recording")
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"output is {output}, which is not empty")
    episodes = sorted(set(episodes))
    videos = [video_path(recording, "validation", episode) for episode in episodes]
    for episode, video in zip(episodes, videos, strict=True):
        if not video.exists():
            raise ValueError(f"--episodes has {episode}, which {recording} has not in its validation split")

    (output / "validation").mkdir(parents=True)
    for video in videos:
        shutil.copy(video, output / "validation" / video.name)
    lines = [record_path(recording, "validation", episode).read_text() for episode in episodes]
    settings = read_settings(recording)
    records: Records = {"train": [], "validation": [json.loads(line) for line in lines]}
    write_text(output / "validation" / "metadata.jsonl", metadata_lines(records["validation"]))
    write_text(output / "README.md", data_card(output, records, settings, sample=True))


def data_card(output: Path, records: Records, settings: Settings, sample: bool = False) -> str:
    """The README of a recording, or of a sample of one: the template with what was measured."""
    num_episodes = {split: len(records[split]) for split in SPLITS}
    options = " ".join(f"{name} {value}" for name, value in settings.options().items())
    if sample:
        numbers = " ".join(str(record["episode"]) for record in records["validation"])
        origin = (
            "This folder is a sample: validation episodes of a larger recording, recorded with\n"
            f"`{options}`\nand copied unchanged with\n\n"
            f"    python data/doom_maze.py OUTPUT --sample-of RECORDING --episodes {numbers}"
        )
    else:
        counts = " ".join(f"--{split} {num_episodes[split]}" for split in SPLITS)
        origin = f"Recorded with\n\n    python data/doom_maze.py OUTPUT {counts} \\\n        {options}"
    return Template(CARD_TEMPLATE.read_text()).substitute(
        origin=origin,
        actions=", ".join(f"{index} {name}" for index, name in enumerate(ACTIONS)),
        frames=settings.frames,
        walk=WALK_TEXTS[settings.walk],
        landmarks="12%" if settings.walk == "explore" or settings.texture_set == "other" else "24%",
        fields=SCRIPT_FIELDS if settings.walk == "scripted" else "",
        sizes=sizes_text(settings),
        split="validation" if not num_episodes["train"] else "train",
        statistics=statistics_table(output, records),
    )


def statistics_table(output: Path, records: Records) -> str:
    """A Markdown table of what was measured, one column per split that has episodes."""
    columns = []
    for split in SPLITS:
        if not (episodes := records[split]):
            continue
        actions = [action for record in episodes for action in record["actions"]]
        visited = [record["visited_fraction"] for record in episodes]
        psnr = [record["psnr"] for record in episodes]
        num_bytes = sum((output / split / record["file_name"]).stat().st_size for record in episodes)
        rows = {
            "": split,
            "episodes": f"{len(episodes)}",
            "frames": f"{len(actions)}",
            "different mazes": f"{len({tuple(record['maze']) for record in episodes})}",
            "open cells visited in an episode, mean (least)": f"{mean(visited):.2f} ({min(visited):.2f})",
            "PSNR of the videos, mean (least), dB": f"{mean(psnr):.1f} ({min(psnr):.1f})",
            **{
                f"clips of {length} frames with a revisit": share_text(clips_with_revisit(episodes, length))
                for length in CLIP_LENGTHS
            },
            "bytes per frame": f"{num_bytes / len(actions):.0f}",
        }
        for index, name in enumerate(ACTIONS):
            rows[f"share of {name}"] = f"{actions.count(index) / len(actions):.3f}"
        columns.append(rows)
    lines = [f"| {' | '.join([name, *(rows[name] for rows in columns)])} |" for name in columns[0]]
    lines.insert(1, "|---" * (len(columns) + 1) + "|")
    return "\n".join(lines)


def revisited_frames(
    poses: Any, window: int = 8, horizon: int = 16, start: int | None = None
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """For each frame, how many frames ago its view was last seen before a window without it; 0 if never.

    The rule by which a frame is a *revisit*: something that a model with a short window can know only from
    older frames. Let the `window` frames before frame e be the newest that the model observed, and t one of
    the `horizon` frames from e on that it predicts. Frame t is a revisit if

    - none of the frames of the window, e - window to e - 1, has the view of t in part: all are 160 map units
      or more away, or more than 60 degrees;
    - a frame before e - window has the same view: less than 48 map units and less than 25 degrees away.

    A walker does not jump, so the view comes back over some frames; that is why t may lie behind e. Every e
    that fulfills both counts, and the result is t minus the latest frame with the same view.

    Args:
        poses: (num_frames, 3), x and y in map units and the angle in degrees, as in the metadata.
        window: the number of newest frames in which a revisited view must not be.
        horizon: how many frames a model predicts from one window.
        start: takes e = start alone, as for a measurement that predicts from one point of an episode; frames
            before `start` or after start + horizon - 1 are then no revisits. For the revisits that N observed
            frames can tell, pass `poses[start - N:]` and start=N.

    Returns:
        (num_frames,), int64; more than `window` where the frame is a revisit.
    """
    poses = np.asarray(poses, dtype=np.float64)
    if poses.ndim != 2 or poses.shape[1] != 3:
        raise ValueError(f"poses must have the shape (num_frames, 3), but has {poses.shape}")
    for name, value, least in (("window", window, 1), ("horizon", horizon, 1), ("start", start, 0)):
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, but is {value}")
    num_frames = len(poses)
    distance = np.hypot(*(poses[:, None, :2] - poses[None, :, :2]).transpose(2, 0, 1))
    angle = np.abs((poses[:, None, 2] - poses[None, :, 2] + 180) % 360 - 180)
    same = (distance < SAME_DISTANCE) & (angle < SAME_ANGLE)
    near = (distance < NEAR_DISTANCE) & (angle < NEAR_ANGLE)

    frames = np.arange(num_frames)
    # [t, s]: the latest frame up to s with the view of t, or -1; and how many up to s have it in part.
    last_same = np.maximum.accumulate(np.where(same, frames, -1), axis=1)
    num_near = np.cumsum(near, axis=1)

    last_seen = np.full(num_frames, -1)
    for ahead in range(horizon):
        ends = frames - ahead  # e of each frame t
        valid = ends > window
        if start is not None:
            valid &= ends == start
        t, e = frames[valid], ends[valid]
        before_window = e - window - 1
        is_clear = num_near[t, e - 1] == num_near[t, before_window]
        last_seen[t] = np.maximum(last_seen[t], np.where(is_clear, last_same[t, before_window], -1))
    return np.where(last_seen >= 0, frames - last_seen, 0)


def clips_with_revisit(episodes: list[dict[str, Any]], length: int) -> tuple[int, int]:
    """How many clips of `length` frames contain a revisit of a view in them, and how many there are."""
    num_with, num_clips = 0, 0
    for record in episodes:
        ago = revisited_frames(record["poses"])
        last_start = len(ago) - length
        if last_start < 0:
            continue
        contains = np.zeros(last_start + 1, dtype=bool)  # by the clip's first frame
        for t in np.flatnonzero(ago):
            contains[max(0, t - length + 1) : t - ago[t] + 1] = True
        num_with += int(contains.sum())
        num_clips += len(contains)
    return num_with, num_clips


def share_text(num_and_total: tuple[int, int]) -> str:
    num, total = num_and_total
    return f"{num / total:.1%}" if total else "no clips so long"


def sizes_text(settings: Settings) -> str:
    """The sizes of the mazes in cells: '9 x 9 or 11 x 11'."""
    least, most = settings.maze_nodes
    few = " (only about 30 layouts)"
    sizes = [f"{2 * n + 1} x {2 * n + 1}{few if n == 3 else ''}" for n in range(least, most + 1)]
    return " or ".join(filter(None, [", ".join(sizes[:-1]), sizes[-1]]))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)
