"""Where training videos come from: a folder, or a repo of the Hub, as episodes, read one after another.

`open_source` finds out what a folder holds. A file is one episode or many of them, and files of several kinds
may lie side by side:

- a video file, with what `metadata.jsonl`, `.csv` or `.parquet` says of it, or with an `.npz` of the same
  stem that has its `actions` (Minecraft), or in a folder for each class;
- an `.npz` with `video` uint8 `[T, H, W, 3]` and maybe `actions` (DMLab);
- a folder of numbered images (BAIR as it is often unpacked), and maybe `actions.npy`;
- a shard of webdataset (`.tar`) or a `.parquet` with the bytes of videos, both read with `datasets`.

UCF-101 with its official lists and LeRobot v3 are known by their lists and by `meta/info.json`. docs/data.md
shows what each looks like. Nothing is read of an episode before it is asked for; of a shard, one episode at a
time is in memory.

Actions are integers `[T]`, integers of several groups `[T, G]`, or vectors of floats `[T, A]`. Groups may
have names: an `.npz` with `action_keyboard` and `action_mouse`, `[T]` each, or in a table
`{"keyboard": [...], "mouse": [...]}`.

Shapes: T frames, H x W pixels.
"""

import csv
import hashlib
import json
import logging
import math
import os
import re
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from .episodes import (
    Actions,
    ArrayVideo,
    EmbeddedVideo,
    Episode,
    Episodes,
    ImageSequence,
    RecordedVideo,
    Shard,
    Stated,
    VideoPart,
    no_actions,
)
from .options import FrameOptions

VIDEO_ENDINGS = "avi|flv|gif|m4v|mkv|mov|mp4|mpeg|mpg|ts|webm|wmv"
SPLITS = {"train": "train"} | dict.fromkeys(("validation", "valid", "val"), "validation") | {"test": "test"}
VALIDATION_SHARE, LEAST_VALIDATION = 0.05, 2
LAST_SHARE, LEAST_LAST_FRAMES = 0.1, 32  # held out of the only video
NUM_EXAMINED = 64  # episodes that `describe` opens

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """What `open_source` found."""

    data: str  # as the user wrote it
    kind: str  # in words
    splits: Mapping[str, Episodes]
    class_names: tuple[str, ...] = ()
    holds_out: bool = True  # whether some episodes become the validation where there is no split for it

    def split(self, name: str) -> Episodes:
        """The episodes of a split.

        Without a split for validation, a hash of the names holds out about 5% of the episodes, and at least
        2. What is trained on is still trained on when other episodes are added, and what is held out mostly
        stays so. Of a single episode, the last tenth is held out, or 32 frames, but at most half.

        Raises:
            ValueError: for a split that is not there, and if there is only one episode that cannot be parted:
                of a shard, or of less than four frames.
        """
        if name in self._splits:
            return self._splits[name]
        if name == "validation":
            raise ValueError(
                f"data={self.data!r} has one video, whose end cannot be held out, as it is too short or in a "
                "shard; it takes a longer file, two or more videos, or a folder validation"
            )
        raise ValueError(f"data={self.data!r} has no folder {name!r}; it has {', '.join(self._splits)}")

    @cached_property
    def is_held_out_by_hash(self) -> bool:
        return self.holds_out and "validation" not in self.splits

    @cached_property
    def _splits(self) -> dict[str, Episodes]:
        splits = dict(self.splits)
        if "train" not in splits or not self.is_held_out_by_hash:
            return splits
        everything = splits["train"]
        if len(everything) > 1:
            held_out = hold_out(everything.names)
            splits["train"] = everything.only(set(everything.names) - held_out)
            splits["validation"] = everything.only(held_out)
        elif everything.listed and (cut := _end_of_training(everything.listed[0])):
            (single,) = everything.listed
            splits["train"] = Episodes.of([single.part(0, cut)], ())
            splits["validation"] = Episodes.of([single.part(cut)], ())
        return splits

    def examine(self, split: str, options: FrameOptions) -> "Examined":
        """What some of the episodes say of themselves."""
        episodes = self.split(split)
        stated = [episode.video.stated() for episode in episodes.some(NUM_EXAMINED)]
        lengths = [num_kept(one, options) for one in stated if one.num_frames is not None]
        num_frames = round(sum(lengths) / len(lengths) * len(episodes)) if lengths else None
        return Examined(stated, lengths, num_frames, len(stated) == len(lengths) == len(episodes))

    def describe(self, options: FrameOptions | None = None) -> str:
        """Three lines: what was found, what its frames are like, and how it is split."""
        options = options or FrameOptions()
        name = "train" if "train" in self._splits else next(iter(self._splits))
        episodes, purpose = self.split(name), "to train on" if name == "train" else f"for {name}"
        examined = self.examine(name, options)
        found = f"{self.data}: {self.kind}"
        if self.class_names:
            some = ", ".join(self.class_names[:5]) + (", ..." if len(self.class_names) > 5 else "")
            found += f" of {len(self.class_names)} classes ({some})"
        frames = f"frames of {examined.sizes} pixels, {examined.rates}; {examined.amount} {purpose}"
        episode = next(iter(episodes.some(1)))
        known = [] if (actions := episode.read_actions()) is None else [_describe(actions)]
        known += ["revisits"] if episode.revisits is not None else []
        known += ["a class label"] if episode.class_label is not None else []
        frames += f"; with {' and '.join(known)}" if known else "; no actions or labels"
        split = f"{len(episodes)} {purpose}"
        if name == "train" and "validation" in self._splits:
            how = "by a hash of their names" if self.is_held_out_by_hash else "as the source says"
            split += f", {len(self.split('validation'))} held out for validation {how}"
        if isinstance(episode.video, VideoPart):
            split = f"its first {episode.video.end} frames to train on, the rest held out for validation"
        return f"{found}\n{frames}\n{split}"


def _describe(actions: Actions) -> str:
    first = next(iter(actions.values), 0)
    if not isinstance(first, tuple):
        return "actions"
    kind = f"vectors of {len(first)} numbers" if isinstance(first[0], float) else f"{len(first)} groups"
    return f"actions ({kind}{': ' if actions.names else ''}{', '.join(actions.names)})"


@dataclass(frozen=True)
class Examined:
    """Of some episodes of a split."""

    stated: list[Stated]
    lengths: list[int]  # in frames, as they will be used, of those that say so
    num_frames: int | None  # of all episodes, as they will be used
    is_exact: bool

    @property
    def sizes(self) -> str:
        sizes = sorted({(one.height * one.width, one.height, one.width) for one in self.stated})
        words = [f"{height} x {width}" for _, height, width in sizes]
        return words[0] if len(words) == 1 else f"{words[0]} to {words[-1]}"

    @property
    def rates(self) -> str:
        rates = sorted({round(one.frame_rate, 2) for one in self.stated if one.frame_rate is not None})
        if not rates:
            return "no frame rate stated"
        return (f"{rates[0]:g}" if len(rates) == 1 else f"{rates[0]:g} to {rates[-1]:g}") + " a second"

    @property
    def amount(self) -> str:
        if self.num_frames is None:
            return "unknown how many"
        return f"{'' if self.is_exact else 'about '}{self.num_frames:,} frames"


def num_kept(stated: Stated, options: FrameOptions) -> int:
    """Frames that are used of a video whose number of frames is known."""
    assert stated.num_frames is not None
    number: float = stated.num_frames
    if options.fps is not None and stated.frame_rate:
        number *= options.fps / stated.frame_rate
    return math.ceil(round(number, 3) / options.stride)


def hold_out(names: Sequence[str]) -> set[str]:
    """Names of the episodes for validation: those whose hash says so, and at least 2, but never all."""
    order = sorted(names, key=_hash_share)
    chosen = [name for name in order if _hash_share(name) < VALIDATION_SHARE]
    return set(order[: min(max(len(chosen), LEAST_VALIDATION), len(order) - 1)])


def _end_of_training(single: Episode) -> int | None:
    """The frame from which on the only episode is held out; None for one that is too short."""
    num_frames = single.video.stated().num_frames
    if num_frames is None:
        num_frames = sum(1 for _ in single.video.timed_frames())
    held_out = min(max(int(LAST_SHARE * num_frames), LEAST_LAST_FRAMES), num_frames // 2)
    return None if held_out < 2 else num_frames - held_out


def _hash_share(name: str) -> float:
    """In [0, 1), of a name, whatever the system."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


# ------------------------------------------------------------------------------------------------------------
# What a folder is


def open_source(data: str | Path, ignore_actions: bool = False, camera: str | None = None) -> Source:
    """Find out what a folder holds, or download a repo of the Hub and find out what that holds.

    Args:
        data: folder, or id of a data set on the Hub, such as name/dataset.
        ignore_actions: read the videos alone.
        camera: which one of a LeRobot data set; it may be None where there is one only.

    Raises:
        ValueError: for a folder without episodes, and for what does not fit the format, with its file.
    """
    data = str(data)
    folder = Path(data)
    if not folder.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", data):
        folder = _download(data)
    if not folder.is_dir():
        problem = "is a file" if folder.is_file() else "is not there"
        raise ValueError(f"data={data!r} {problem}; it takes a folder, or the id of a data set on the Hub")
    files = [path for path in sorted(folder.rglob("*")) if not _is_hidden(path, folder) and path.is_file()]
    if (folder / "meta/info.json") in files:
        source = _open_lerobot(data, folder, ignore_actions, camera)
    elif camera is not None:
        raise ValueError(f"camera={camera!r}: {data} is no LeRobot data set, which alone has cameras")
    elif lists := [file for file in files if file.name == "trainlist01.txt"]:
        source = _open_ucf101(data, files, lists[0])
    else:
        source = _open_files(data, folder, files)
    if not source.splits:
        raise ValueError(
            f"{folder} has no videos; a video's name ends in one of {VIDEO_ENDINGS}; docs/data.md has what "
            "else there may be"
        )
    if ignore_actions:
        splits = {
            name: replace(
                episodes,
                listed=tuple(replace(one, read_actions=no_actions) for one in episodes.listed),
                shards=tuple(_WithoutActions(shard) for shard in episodes.shards),
            )
            for name, episodes in source.splits.items()
        }
        source = replace(source, splits=splits)
    return source


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _download(repo_id: str) -> Path:
    """The files of a data set of the Hub, those that are not there yet."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo_id, repo_type="dataset"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"data={repo_id!r} is no folder, and as a data set of the Hub it cannot be had: {reason}"
        ) from error


class _WithoutActions:
    """A shard whose actions are left out."""

    def __init__(self, shard: Shard) -> None:
        self.shard, self.path, self.names = shard, shard.path, shard.names
        self.kind, self.class_names = shard.kind, shard.class_names

    def __iter__(self) -> Iterator[Episode]:
        return (replace(episode, read_actions=no_actions) for episode in self.shard)


# ------------------------------------------------------------------------------------------------------------
# Files, each of one episode or of many

_is_video = re.compile(rf".*\.({VIDEO_ENDINGS})", re.IGNORECASE).fullmatch
_is_numbered_image = re.compile(r".*?(\d+)\.(png|jpe?g|webp|bmp)", re.IGNORECASE).fullmatch
_is_table = re.compile(r"metadata\.(jsonl|csv|parquet)").fullmatch
_split_of_shard = re.compile(rf"({'|'.join(SPLITS)})(?![a-zA-Z]).*\.(tar|parquet)").fullmatch


@dataclass
class _Part:
    """What a folder, or a split of it, holds."""

    base: Path  # names of episodes start from it
    listed: dict[Path, Episode] = field(default_factory=dict)
    shards: list[Shard] = field(default_factory=list)
    tables: list[Path] = field(default_factory=list)

    @property
    def episodes(self) -> Episodes:
        return Episodes.of(self.listed.values(), self.shards)


def _open_files(data: str, folder: Path, files: Sequence[Path]) -> Source:
    split_of_folder = _split_folders(
        {file.relative_to(folder).parts[0] for file in files if file.parent != folder}
    )
    by_split: dict[str, list[Path]] = {}
    bases: dict[str, Path] = {}
    shared_tables, left_out = [], []
    for file in files:
        top = file.relative_to(folder).parts[0]
        match = _split_of_shard(file.name)
        if file.parent == folder and split_of_folder and _is_table(file.name):
            shared_tables.append(file)
        elif top in split_of_folder:
            by_split.setdefault(split_of_folder[top], []).append(file)
            bases[split_of_folder[top]] = folder / top
        elif "train" in split_of_folder.values():
            left_out.append(file)
        else:
            split = SPLITS[match[1]] if match and not split_of_folder else "train"
            by_split.setdefault(split, []).append(file)
            bases[split] = folder
    _warn("are in none of its splits", left_out)
    parts = {split: _list_files(bases[split], own) for split, own in by_split.items()}
    kinds = Counter(_kind(episode) for part in parts.values() for episode in part.listed.values())
    for part in parts.values():
        for shard in part.shards:
            kinds[shard.kind] += len(shard.names)

    class_names = _class_folders(parts.values())
    tables = [*shared_tables, *(table for part in parts.values() for table in part.tables)]
    if tables:
        class_names = _add_metadata(parts.values(), tables) or class_names
    elif class_names:
        for part in parts.values():
            part.listed = {
                file: replace(episode, class_label=class_names.index(file.parent.name))
                for file, episode in part.listed.items()
            }
    stated = {shard.class_names for part in parts.values() for shard in part.shards if shard.class_names}
    if len(stated) > 1:
        raise ValueError(f"{folder}: its files name different classes for the same numbers: {stated}")
    class_names = class_names or next(iter(stated), ())
    splits = {split: part.episodes for split, part in parts.items() if len(part.episodes)}
    if "validation" not in splits and "test" in splits and "train" in splits:
        splits["validation"] = splits["test"]  # data sets of two parts call the second one so
    words = " and ".join(f"{number:,} {kind}" for kind, number in kinds.items())
    return Source(data, words, splits, class_names)


def _split_folders(names: set[str]) -> dict[str, str]:
    """Which of the folders in a folder are splits, and of what."""
    if "train" not in names:
        names = {name for name in names if SPLITS.get(name) == "validation"}
    found: dict[str, str] = {}
    for name in sorted(names, key=lambda name: (SPLITS.get(name) != name, name)):
        split = SPLITS.get(name, name)
        found[name] = name if split in found.values() else split
    return found


def _kind(episode: Episode) -> str:
    video = episode.video
    if isinstance(video, RecordedVideo):
        beside = " with an npz of actions" if episode.read_actions is not no_actions else ""
        return f"videos ({video.path.suffix.lower()[1:]}){beside}"
    return "npz episodes" if isinstance(video, ArrayVideo) else "folders of images"


def _list_files(base: Path, files: Sequence[Path]) -> _Part:
    """The episodes and shards among some files, without what metadata and folders say of them."""
    part, strange = _Part(base), []
    images: dict[Path, list[Path]] = {}
    actions_of_images: dict[Path, Path] = {}
    stems = {file.with_suffix("") for file in files if _is_video(file.name)}
    with_actions = {file.with_suffix("") for file in files if file.suffix == ".npz"} & stems
    for file in files:
        stem = file.with_suffix("")
        name = stem.relative_to(base).as_posix()
        if _is_table(file.name):
            part.tables.append(file)
        elif _is_video(file.name):
            read = partial(_npz_actions, file.with_suffix(".npz")) if stem in with_actions else no_actions
            part.listed[file] = Episode(name, RecordedVideo(file), read_actions=read)
        elif file.suffix == ".npz" and stem in stems:
            pass
        elif file.suffix == ".npz" and "video" in _npz_keys(file):
            part.listed[file] = Episode(name, ArrayVideo(file), read_actions=partial(_npz_actions, file))
        elif file.suffix == ".tar":
            part.shards.append(TarShard(file, name))
        elif file.suffix == ".parquet" and (column := _video_column(file)):
            part.shards.append(ParquetShard(file, name, column))
        elif _is_numbered_image(file.name):
            images.setdefault(file.parent, []).append(file)
        elif file.name == "actions.npy":
            actions_of_images[file.parent] = file
        else:
            strange.append(file)
    for parent, numbered in images.items():
        if len(numbered) < 2 or parent == base:
            strange += numbered
            continue
        own = actions_of_images.pop(parent, None)
        numbered.sort(key=lambda file: int(_is_numbered_image(file.name)[1]))  # type: ignore[index]
        name = parent.relative_to(base).as_posix()
        part.listed[parent] = Episode(name, ImageSequence(parent, tuple(numbered)))
        if own is not None:
            part.listed[parent] = replace(part.listed[parent], read_actions=partial(_npy_actions, own))
    strange += actions_of_images.values()
    _warn("are no videos", strange)
    return part


def _class_folders(parts: Iterable[_Part]) -> tuple[str, ...]:
    """Names of the folders of classes, of all splits together: a class has the same number in each.

    Empty if they are no classes: if there is one only, and where videos also lie deeper or higher.
    """
    files = [(part.base, file) for part in parts for file in part.listed]
    names = {file.parent.name for _, file in files}
    in_order = all(file.parent.parent == base for base, file in files)
    # BAIR, as it is often unpacked, has its parts in such folders.
    are_parts = all(re.fullmatch(r"traj_\d+_to_\d+", name) for name in names)
    return tuple(sorted(names)) if in_order and len(names) > 1 and not are_parts else ()


def _warn(reason: str, files: Sequence[Path]) -> None:
    if files:
        names = ", ".join(file.name for file in files[:10]) + (", ..." if len(files) > 10 else "")
        logger.warning("left out, as %s (%d in %s): %s", reason, len(files), files[0].parent, names)


# ------------------------------------------------------------------------------------------------------------
# Metadata


def _add_metadata(parts: Iterable[_Part], tables: Sequence[Path]) -> tuple[str, ...]:
    """Keep the episodes that the tables list, with what they say; returns the names of classes, if labels are
    names. A part that no table says anything of is left as it is.
    """
    rows = [(row, table) for table in tables for row in _rows(table)]
    labels = [_label(row) for row, _ in rows]
    are_names = bool(labels) and all(isinstance(label, str) for label in labels)
    class_names = tuple(sorted(set(labels))) if are_names else ()
    known: dict[Path, dict[str, Any]] = {}
    for row, table in rows:
        file, values = _checked_row(row, table, class_names)
        if file in known or not any(file in part.listed for part in parts):
            raise ValueError(f"metadata name {file}, which is no video, or twice")
        known[file] = values
    for part in parts:
        listed = {}
        for file in part.listed.keys() & known.keys():
            actions = known[file].pop("actions")
            listed[file] = replace(part.listed[file], **known[file])
            if actions is not None:
                listed[file] = replace(listed[file], read_actions=partial(_same, actions))
        if listed or part.tables:
            _warn("metadata do not list", sorted(part.listed.keys() - listed.keys()))
            part.listed = listed
    return class_names


def _same(value: Any) -> Any:
    return value


def _label(row: Any) -> Any:
    return row.get("class_label", row.get("label")) if isinstance(row, dict) else None


def _rows(table: Path) -> list[Any]:
    if table.suffix == ".parquet":
        from pyarrow import parquet  # comes with `datasets`

        return parquet.read_table(table).to_pylist()
    text = table.read_text(encoding="utf-8-sig")
    if table.suffix == ".csv":
        return [_csv_row(row) for row in csv.DictReader(text.splitlines())]
    try:
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{table} has a line that is no JSON ({error}): {error.doc[:80]}") from error


def _csv_row(row: dict[str, Any]) -> dict[str, Any]:
    """Lists are written as JSON, or as numbers with spaces between them."""
    values: dict[str, Any] = {}
    for name, text in row.items():
        if text is None or not str(text).strip():
            continue
        text = str(text).strip()
        if name == "actions" and re.match(r"\[\s*\[|\{", text):
            try:
                values[name] = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"actions {text[:80]!r} are no JSON: {error}") from error
        elif name in ("actions", "revisits"):
            words = text.strip("[]").replace(",", " ").split()
            values[name] = [int(word) if re.fullmatch(r"-?\d+", word) else word for word in words]
        elif name in ("label", "class_label"):
            values[name] = int(text) if re.fullmatch(r"-?\d+", text) else text
        else:
            values[name] = text
    return values


def _checked_row(row: Any, table: Path, class_names: Sequence[str]) -> tuple[Path, dict[str, Any]]:
    """The file that a row of the metadata is about, and what it says of it."""
    name = row.get("file_name") if isinstance(row, dict) else None
    if not isinstance(name, str):
        raise ValueError(f"{table} has a line without file_name: {str(row)[:80]}")
    where = f"{table}: {name}"
    values = _checked(row, where, class_names)
    return Path(os.path.normpath(table.parent / name)), values


def _checked(row: Mapping[str, Any], where: str, class_names: Sequence[str] = ()) -> dict[str, Any]:
    """What a row says of an episode: `actions`, `revisits`, `class_label`."""
    values: dict[str, Any] = {}
    for kind, least in (("actions", -1), ("revisits", 0)):
        found = row.get(kind)
        if kind == "actions" and _is_nested(found):
            values[kind] = _nested_actions(found, f"{where} has actions")
            continue
        if found is not None and not isinstance(found, list | np.ndarray):
            raise ValueError(f"{where} has {kind} {found!r}; it takes a list of one integer per frame")
        for frame, value in enumerate(() if found is None else found):
            _check_integer(value, least, f"{where} has {kind} {value!r} at frame {frame}")
        values[kind] = None if found is None else tuple(int(value) for value in found)
    if values["actions"] is not None and not isinstance(values["actions"], Actions):
        values["actions"] = Actions(values["actions"])
    label = row.get("class_label", row.get("label", row.get("cls")))
    if label is not None:
        if label in class_names:
            label = class_names.index(label)
        _check_integer(label, 0, f"{where} has class_label {label!r}")
    values["class_label"] = label
    return values


def _is_nested(found: Any) -> bool:
    """Whether actions are of groups or vectors."""
    if isinstance(found, Mapping):
        return True
    return isinstance(found, list | np.ndarray) and len(found) > 0 and isinstance(found[0], list | np.ndarray)


def _nested_actions(found: Any, where: str) -> Actions:
    names = sorted(found) if isinstance(found, Mapping) else []
    columns = [np.asarray(found[name]) for name in names]
    if len({column.dtype.kind == "f" for column in columns}) > 1:
        raise ValueError(f"{where} of integers and of floats ({', '.join(names)}); it takes one kind")
    try:
        array = np.stack(columns, axis=1) if names else np.array(list(found))
    except ValueError as error:
        raise ValueError(f"{where} that are not equally long: {error}") from error
    return _as_actions(array, where, names)


def _check_integer(value: Any, least: int, found: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{found}; it takes integers of at least {least}")


# ------------------------------------------------------------------------------------------------------------
# npz


def _npz_keys(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"{path} is not an npz file, or damaged: {error}") from error


def _npz_actions(path: Path) -> Actions | None:
    with np.load(path, allow_pickle=False) as content:
        if "actions" in content:
            return _as_actions(content["actions"], f"{path}: actions")
        prefix = "action_"
        groups = {key.removeprefix(prefix): content[key] for key in content if key.startswith(prefix)}
        if groups:
            return _nested_actions(
                groups, f"{path} has {', '.join(prefix + name for name in sorted(groups))}"
            )
        if "video" in content:
            return None
        raise ValueError(f"{path} has no actions; it has {', '.join(content)}")


def _npy_actions(path: Path) -> Actions:
    try:
        return _as_actions(np.load(path, allow_pickle=False), str(path))
    except (OSError, EOFError) as error:
        raise ValueError(f"{path} is no .npy, or damaged: {error}") from error


def _as_actions(actions: np.ndarray, where: str, names: Sequence[str] = ()) -> Actions:
    """Integers `[T]` or, of groups, `[T, G]`; or vectors of floats `[T, A]`, NaN where there is none."""
    kind = actions.dtype.kind
    if actions.ndim == 2 and actions.shape[1] == 1 and kind in "iub":
        actions = actions[:, 0]
    if (
        kind not in ("iub" if actions.ndim == 1 else "iubf")
        or actions.ndim not in (1, 2)
        or 0 in actions.shape
    ):
        raise ValueError(
            f"{where} are {actions.dtype} {list(actions.shape)}; it takes integers [T], integers of groups "
            "[T, G], or floats [T, A]. --ignore-actions trains on the videos alone"
        )
    if kind == "f":
        missing = np.isnan(actions)
        if np.isinf(actions).any() or (missing.any(axis=1) & ~missing.all(axis=1)).any():
            raise ValueError(f"{where} have vectors with infinite values, or with NaN beside numbers")
        return Actions(tuple(tuple(map(float, row)) for row in actions), tuple(names))
    if actions.size and int(actions.min()) < -1:
        raise ValueError(f"{where} have {int(actions.min())}; it takes integers of at least -1")
    if actions.ndim == 1:
        return Actions(tuple(int(action) for action in actions), tuple(names))
    return Actions(tuple(tuple(int(action) for action in row) for row in actions), tuple(names))


# ------------------------------------------------------------------------------------------------------------
# Shards: tar and parquet, as `datasets` reads them


def _stream(kind: str, path: Path) -> Any:
    import datasets

    try:
        stream = datasets.load_dataset(kind, data_files={"train": [str(path)]}, split="train", streaming=True)
    except Exception as error:  # of many types, which `datasets` does not name
        raise ValueError(f"{path} cannot be read as {kind}: {error}") from error
    return stream.decode(False)  # the bytes of videos, as they are


class TarShard:
    """A shard of a webdataset: files of one name are one episode. `<name>.mp4`; `.cls` has the label, `.json`
    `actions`, `revisits` and `label`, `.actions.npy` actions.
    """

    kind = "videos in webdataset shards"
    class_names: tuple[str, ...] = ()

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.prefix = path, name
        keys: dict[str, None] = {}
        try:
            with tarfile.open(path) as archive:
                for member in archive:
                    key, ending = _key_and_ending(member.name)
                    if member.isfile() and _is_video(f"video.{ending}"):
                        keys[key] = None
        except (tarfile.TarError, EOFError) as error:
            raise ValueError(f"{path} is no tar file, or damaged: {error}") from error
        self.names = [f"{name}/{key}" for key in keys]

    def __iter__(self) -> Iterator[Episode]:
        for row in _stream("webdataset", self.path):
            name = f"{self.prefix}/{row['__key__']}"
            endings = [ending for ending in row if _is_video(f"video.{ending}") and row[ending] is not None]
            if not endings:
                continue
            facts = {**(row.get("json") or {})}
            for key, field_name in (("cls", "label"), ("actions.npy", "actions"), ("npy", "actions")):
                if row.get(key) is not None:
                    facts[field_name] = row[key]
            yield _embedded(name, self.path, row[endings[0]], f".{endings[0]}", facts)


def _key_and_ending(member: str) -> tuple[str, str]:
    """As webdataset splits a name: at the first point after the last slash."""
    folder, slash, name = member.rpartition("/")
    stem, _, ending = name.partition(".")
    return folder + slash + stem, ending


def _video_column(path: Path) -> str | None:
    """The column of a parquet file that has videos, as bytes or as `{bytes, path}`; None if there is none."""
    from pyarrow import types

    with _parquet_file(path) as file:
        columns = [
            field.name
            for field in file.schema_arrow
            if types.is_binary(field.type)
            or types.is_large_binary(field.type)
            or (types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0)
        ]
    return "video" if "video" in columns else next(iter(columns), None)


def _parquet_file(path: Path) -> Any:
    from pyarrow import ArrowException, parquet

    try:
        return parquet.ParquetFile(path)
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path} is no parquet file, or damaged: {error}") from error


class ParquetShard:
    """A parquet file with a video in each row, and maybe its `label`, `actions` and `revisits`."""

    kind = "videos in parquet"

    def __init__(self, path: Path, name: str, column: str) -> None:
        self.path, self.column = path, column
        with _parquet_file(path) as file:
            self.names = [f"{name}/{row:06d}" for row in range(file.metadata.num_rows)]
            described = json.loads((file.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
        features = described.get("info", {}).get("features", {})
        self.class_names = tuple((features.get("label") or {}).get("names") or ())

    def __iter__(self) -> Iterator[Episode]:
        for name, row in zip(self.names, _stream("parquet", self.path), strict=True):
            if row[self.column] is None:
                raise ValueError(f"{self.path}: {name} has no video")
            yield _embedded(name, self.path, row[self.column], ".mp4", row)


def _embedded(name: str, path: Path, video: Any, suffix: str, facts: Mapping[str, Any]) -> Episode:
    """An episode of a row of a shard; `video` is bytes, or `{bytes, path}`."""
    data, file = (video["bytes"], video.get("path")) if isinstance(video, dict) else (video, None)
    suffix = Path(file).suffix if file and _is_video(Path(file).name) else suffix
    values = _checked(facts, f"{path}: {name}")
    actions = values.pop("actions")
    if data is None:
        return Episode(
            name, RecordedVideo(path.parent / str(file)), read_actions=partial(_same, actions), **values
        )
    return Episode(name, EmbeddedVideo(path, data, suffix), read_actions=partial(_same, actions), **values)


# ------------------------------------------------------------------------------------------------------------
# UCF-101


def _open_ucf101(data: str, files: Sequence[Path], train_list: Path) -> Source:
    """UCF-101: a folder for each class, and the official lists beside `classInd.txt`; the first of three."""
    test_list, class_list = train_list.with_name("testlist01.txt"), train_list.with_name("classInd.txt")
    for file in (test_list, class_list):
        if not file.is_file():
            raise ValueError(f"{train_list} is there, but {file.name} is not: UCF-101 comes with both")
    classes = [line.split()[1] for line in class_list.read_text().splitlines() if line.strip()]
    videos = {f"{file.parent.name}/{file.name}": file for file in files if _is_video(file.name)}
    splits, missing = {}, []
    for split, listing in (("train", train_list), ("validation", test_list)):
        episodes = []
        for line in listing.read_text().splitlines():
            if not line.strip():
                continue
            name = line.split()[0]
            class_name = name.partition("/")[0]
            if class_name not in classes:
                raise ValueError(f"{listing} has {name}, whose class is not in {class_list.name}")
            if name in videos:
                label = classes.index(class_name)
                stem = PurePosixPath(name).with_suffix("").as_posix()
                episodes.append(Episode(stem, RecordedVideo(videos[name]), class_label=label))
            else:
                missing.append(Path(name))
        if episodes:
            splits[split] = Episodes.of(episodes, ())
    _warn("they are listed, but not there", missing)
    number = sum(map(len, splits.values()))
    return Source(data, f"UCF-101, {number:,} videos by the official lists", splits, tuple(classes))


# ------------------------------------------------------------------------------------------------------------
# LeRobot


def _open_lerobot(data: str, folder: Path, ignore_actions: bool, camera: str | None) -> Source:
    """A LeRobot data set of version 3: mp4 files of many episodes, whose times parquet files have."""
    from pyarrow import parquet

    info = json.loads((folder / "meta/info.json").read_text(encoding="utf-8"))
    version = str(info.get("codebase_version"))
    if not version.startswith("v3"):
        raise ValueError(f"{folder} is a LeRobot data set of version {version}; it takes v3")
    features = info["features"]
    cameras = sorted(name for name, feature in features.items() if feature["dtype"] == "video")
    if not cameras:
        raise ValueError(f"{folder} is a LeRobot data set without a feature of dtype video")
    if camera is None and len(cameras) > 1:
        raise ValueError(
            f"{folder} has {len(cameras)} cameras: choose one by --camera {' or '.join(cameras)}"
        )
    if camera is not None and camera not in cameras:
        raise ValueError(f"camera={camera!r}: {folder} has {', '.join(cameras)}")
    action, camera = features.get("action"), camera or cameras[0]
    has_actions = action is not None and not ignore_actions
    names = _lerobot_names(action) if action is not None else ()
    half = 0.5 / info["fps"]  # times are rounded
    episodes = []
    for table in sorted((folder / "meta/episodes").rglob("*.parquet")):
        for row in parquet.read_table(table).to_pylist():
            place = {name: row[f"videos/{camera}/{name}"] for name in ("chunk_index", "file_index")}
            start, end = (row[f"videos/{camera}/{name}_timestamp"] for name in ("from", "to"))
            path = folder / info["video_path"].format(video_key=camera, **place)
            video = RecordedVideo(path, max(0.0, start - half), end - half)
            episode = Episode(f"episode-{row['episode_index']:06d}", video)
            if has_actions:
                place = {name: row[f"data/{name}"] for name in ("chunk_index", "file_index")}
                table_of_frames = folder / info["data_path"].format(**place)
                read = partial(_lerobot_actions, table_of_frames, row["episode_index"], names)
                episode = replace(episode, read_actions=read)
            episodes.append(episode)
    if not episodes:
        raise ValueError(f"{folder / 'meta/episodes'} has no episodes")
    kind = f"LeRobot {version}, {len(episodes):,} episodes of the camera {camera}"
    return Source(data, kind, {"train": Episodes.of(episodes, ())})


def _lerobot_names(feature: Mapping[str, Any]) -> tuple[str, ...]:
    """Of the numbers of an action: a list, or lists of several parts; empty if they do not fit."""
    names = feature.get("names") or []
    if isinstance(names, Mapping):
        names = [name for part in names.values() for name in (part if isinstance(part, list) else [part])]
    return tuple(map(str, names)) if len(names) == math.prod(feature["shape"]) else ()


def _lerobot_actions(table: Path, episode: int, names: Sequence[str]) -> Actions:
    """LeRobot has the action that follows a frame; ours leads to it, so the first frame has none."""
    from pyarrow import parquet

    rows = parquet.read_table(
        table, columns=["frame_index", "action"], filters=[("episode_index", "=", episode)]
    )
    array = np.array(rows.sort_by("frame_index")["action"].to_pylist())
    if array.dtype.kind == "f" and array.ndim == 1:
        array = array[:, None]
    actions = _as_actions(array, f"{table}: action")
    first = actions.values[0]
    null: Any = -1
    if isinstance(first, tuple):
        null = tuple(math.nan if isinstance(number, float) else -1 for number in first)
    return Actions((null, *actions.values[:-1]), tuple(names) if isinstance(first, tuple) else ())
