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

ACTIONS = ("noop", "forward", "left", "right", "forward_left", "forward_right")
SPLITS = ("train", "validation")
STATE_FOLDER = ".recorder"
CARD_TEMPLATE = Path(__file__).with_name("README_doom_maze.md")

Records = dict[str, list[dict[str, Any]]]  # the lines of the metadata by split


@dataclass(frozen=True)
class Settings:
    """What a recording's content depends on, besides the number of episodes."""

    seed: int
    frames: int
    textures: int


def video_path(output: Path, split: str, episode: int) -> Path:
    return output / split / f"{episode:05d}.mp4"


def record_path(output: Path, split: str, episode: int) -> Path:
    return output / STATE_FOLDER / split / f"{episode:05d}.json"


def settings_path(output: Path) -> Path:
    return output / STATE_FOLDER / "settings.json"


def write_text(path: Path, text: str) -> None:
    """Write a file beside its place, then rename it there."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text)
    part.replace(path)


def prepare_folder(output: Path, settings: Settings) -> None:
    """Make the folders of a recording; refuse to mix episodes of different settings in one."""
    path = settings_path(output)
    if path.exists():
        for name, existing in json.loads(path.read_text()).items():
            if (value := getattr(settings, name)) != existing:
                raise ValueError(f"--{name} is {value}, but {output} was recorded with --{name} {existing}")
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
    lines = {
        split: [record_path(output, split, episode).read_text() for episode in episodes[split]]
        for split in SPLITS
    }
    records = {split: [json.loads(line) for line in lines[split]] for split in SPLITS}
    check_disjoint(records)
    for split in SPLITS:
        if lines[split]:
            write_text(output / split / "metadata.jsonl", "\n".join(lines[split]) + "\n")
    settings = Settings(**json.loads(settings_path(output).read_text()))
    write_text(output / "README.md", data_card(output, records, settings))


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
    write_text(output / "validation" / "metadata.jsonl", "\n".join(lines) + "\n")
    settings = Settings(**json.loads(settings_path(recording).read_text()))
    records: Records = {"train": [], "validation": [json.loads(line) for line in lines]}
    write_text(output / "README.md", data_card(output, records, settings, sample=True))


def data_card(output: Path, records: Records, settings: Settings, sample: bool = False) -> str:
    """The README of a recording, or of a sample of one: the template with what was measured."""
    num_episodes = {split: len(records[split]) for split in SPLITS}
    options = f"--frames {settings.frames} --seed {settings.seed} --textures {settings.textures}"
    if sample:
        numbers = " ".join(str(record["episode"]) for record in records["validation"])
        origin = (
            "This folder is a sample: validation episodes of a larger recording, recorded with\n"
            f"`{options}` and copied unchanged with\n\n"
            f"    python data/doom_maze.py OUTPUT --sample-of RECORDING --episodes {numbers}"
        )
    else:
        counts = " ".join(f"--{split} {num_episodes[split]}" for split in SPLITS)
        origin = f"Recorded with\n\n    python data/doom_maze.py OUTPUT {counts} {options}"
    return Template(CARD_TEMPLATE.read_text()).substitute(
        origin=origin,
        actions=", ".join(f"{index} {name}" for index, name in enumerate(ACTIONS)),
        frames=settings.frames,
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
            "bytes per frame": f"{num_bytes / len(actions):.0f}",
        }
        for index, name in enumerate(ACTIONS):
            rows[f"share of {name}"] = f"{actions.count(index) / len(actions):.3f}"
        columns.append(rows)
    lines = [f"| {' | '.join([name, *(rows[name] for rows in columns)])} |" for name in columns[0]]
    lines.insert(1, "|---" * (len(columns) + 1) + "|")
    return "\n".join(lines)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)
