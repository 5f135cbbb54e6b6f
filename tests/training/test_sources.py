"""training/sources.py: each kind of source on small real files, what is held out, and what is refused."""

import io
import json
import logging
import os
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from diffusers_far.training import encode_latents, train_folder
from diffusers_far.training.episodes import load_frames
from diffusers_far.training.options import AutoencoderOptions, FrameOptions
from diffusers_far.training.sources import Source, hold_out, open_source
from diffusers_far.training.train_autoencoder import AutoencoderTrainer
from tests.conftest import REPOSITORY
from tests.hub.hub_double import HubDouble, Repository, serve
from tests.python_process import run_python
from tests.video_writing import numbered_frames, numbers, write_video

DATA = REPOSITORY.parent / "shared" / "data"


def shown(source: Source, split: str) -> dict[str, list[int]]:
    """Names of the episodes, and the numbers that their frames show."""
    return {
        episode.name: numbers([frame for _, frame in episode.frames()]) for episode in source.split(split)
    }


def known(source: Source, split: str = "train") -> dict[str, tuple[Any, Any]]:
    """Actions and class labels by name."""
    return {episode.name: (episode.actions, episode.class_label) for episode in source.split(split)}


def touch(folder: Path, *names: str, rows: list[dict] | None = None) -> Path:
    """A data set whose train split has empty files of these names, for what reads only the names."""
    for name in names:
        (folder / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "train" / name).touch()
    if rows is not None:
        (folder / "train/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "validation").mkdir(exist_ok=True)
    (folder / "validation" / "held_out.mp4").touch()
    return folder


def episodes(data: Path, split: str = "train") -> dict[str, Any]:
    return {episode.name: episode for episode in open_source(data).split(split)}


# ----------------------------------------------------------------------------------------------------
# Folders of videos


def test_a_plain_folder_of_mixed_videos(tmp_path: Path) -> None:
    """Of several formats, sizes, lengths and rates; the split is by a hash of the names."""
    for number, (ending, rate, size) in enumerate(
        [("mp4", 10, (32, 48)), ("mkv", 25, (48, 32)), ("avi", 10, (32, 32)), ("mp4", 30, (64, 96))] * 2
    ):
        write_video(tmp_path / f"clip {number}.{ending}", numbered_frames(4 + number, *size), rate)
    source = open_source(tmp_path)
    train, held_out = shown(source, "train"), shown(source, "validation")
    assert len(train) == 6 and len(held_out) == 2
    assert {name: len(frames) for name, frames in (train | held_out).items()} == {
        f"clip {number}": 4 + number for number in range(8)
    }
    assert all(frames == list(range(len(frames))) for frames in train.values())
    lines = source.describe().splitlines()
    assert len(lines) == 3
    assert "4 videos (mp4)" in lines[0] and "2 videos (mkv)" in lines[0] and "2 videos (avi)" in lines[0]
    assert "32 x 32 to 64 x 96 pixels, 10 to 30 a second" in lines[1] and "no actions or labels" in lines[1]
    assert f"; {sum(map(len, train.values()))} frames to train on" in lines[1]
    assert lines[2] == "6 to train on, 2 held out for validation by a hash of their names"
    options = FrameOptions(resolution="16", fps=5)
    sizes = {frame.shape for episode in source.split("train") for _, frame in episode.frames(options)}
    assert sizes == {(16, 16, 3)}


def test_the_validation_folder_wins(tmp_path: Path) -> None:
    for name in ("a.mp4", "sub/b.mp4", "c.mp4", "validation/d.mp4"):
        write_video(tmp_path / name, numbered_frames(3))
    source = open_source(tmp_path)
    assert list(shown(source, "train")) == ["a", "c", "sub/b"] and list(shown(source, "validation")) == ["d"]
    assert source.describe().endswith("3 to train on, 1 held out for validation as the source says")


def test_test_is_held_out_where_there_is_no_validation(tmp_path: Path) -> None:
    for name in ("train/a.mp4", "test/b.mp4", "extra/c.mp4"):
        write_video(tmp_path / name, numbered_frames(2))
    source = open_source(tmp_path)
    assert [list(source.split(split).names) for split in ("train", "validation", "extra")] == [
        ["a"],
        ["b"],
        ["c"],
    ]
    write_video(tmp_path / "val/v.mp4", numbered_frames(2))
    assert list(open_source(tmp_path).split("validation").names) == ["v"]


def test_folders_of_classes_give_the_same_labels_in_every_split(tmp_path: Path) -> None:
    touch(tmp_path, "dogs/1.mp4", "cats/1.mp4", "birds/1.mp4")
    (tmp_path / "validation/held_out.mp4").unlink()
    (tmp_path / "validation/dogs").mkdir(parents=True)
    (tmp_path / "validation/dogs/2.mp4").touch()
    source = open_source(tmp_path)
    assert source.class_names == ("birds", "cats", "dogs")
    assert known(source) == {"birds/1": (None, 0), "cats/1": (None, 1), "dogs/1": (None, 2)}
    assert known(source, "validation") == {"dogs/2": (None, 2)}


def test_class_folders_without_splits(tmp_path: Path) -> None:
    for name in ("cats/1.mp4", "cats/2.mp4", "dogs/1.mp4", "dogs/2.mp4"):
        write_video(tmp_path / name, numbered_frames(2))
    source = open_source(tmp_path)
    found = known(source) | known(source, "validation")
    assert found == {
        f"{name}/{n}": (None, label) for label, name in enumerate(("cats", "dogs")) for n in (1, 2)
    }
    assert "of 2 classes (cats, dogs)" in source.describe() and "with a class label" in source.describe()


def test_metadata_say_what_is_known_of_a_video(tmp_path: Path) -> None:
    rows = [{"file_name": "b [1].mp4", "actions": [0, -1, 2]}, {"file_name": "a.mkv", "class_label": 3}]
    rows[0]["revisits"] = [0, 0, 2]
    found = episodes(touch(tmp_path / "my [data]", "b [1].mp4", "a.mkv", rows=rows))
    assert list(found) == ["a", "b [1]"]
    assert (found["a"].actions, found["a"].revisits, found["a"].class_label) == (None, None, 3)
    one = found["b [1]"]
    assert (one.actions, one.revisits, one.class_label) == ((0, -1, 2), (0, 0, 2), None)


def test_metadata_in_parquet_and_in_subfolders(tmp_path: Path) -> None:
    touch(tmp_path, "one/a.mp4", "two/a.mp4")
    for part, action in (("one", 1), ("two", 2)):
        table = pyarrow.table({"file_name": ["a.mp4"], "actions": [[action, action]]})
        parquet.write_table(table, tmp_path / "train" / part / "metadata.parquet")
    assert known(open_source(tmp_path)) == {"one/a": ((1, 1), None), "two/a": ((2, 2), None)}


def test_metadata_in_csv(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4", "b.mp4", "c.mp4")
    lines = ["file_name,actions,label", 'a.mp4,"[0, 1, 2]",cat', "b.mp4,3 -1 0,dog", "c.mp4,,cat"]
    (tmp_path / "train/metadata.csv").write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    source = open_source(tmp_path)
    assert known(source) == {"a": ((0, 1, 2), 0), "b": ((3, -1, 0), 1), "c": (None, 0)}
    assert source.class_names == ("cat", "dog")


def test_one_table_for_all_splits(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4")
    rows = [
        {"file_name": "train/a.mp4", "label": "z"},
        {"file_name": "validation/held_out.mp4", "label": "y"},
    ]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = open_source(tmp_path)
    assert known(source) == {"a": (None, 1)} and known(source, "validation") == {"held_out": (None, 0)}


def test_what_is_left_out_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path, "a.mp4", "b.gif", "c.webm", "notes.txt", ".hidden", rows=[{"file_name": "a.mp4"}])
    with caplog.at_level(logging.WARNING):
        assert list(episodes(tmp_path)) == ["a"]
    others, unlisted = (record.getMessage() for record in caplog.records)
    assert "metadata do not list" in unlisted and unlisted.endswith("b.gif, c.webm")
    assert "no videos" in others and others.endswith("notes.txt")
    (tmp_path / "train/metadata.jsonl").unlink()
    assert list(episodes(tmp_path)) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"file_name": "elsewhere.mp4"}, r"metadata name .*train/elsewhere\.mp4, which is no video"),
        ({"file_name": "../../secret.mp4"}, r"metadata name .*secret\.mp4, which is no video"),
        ({"actions": [1]}, "has a line without file_name"),
        (
            {"file_name": "a.mp4", "actions": [0, 0.5]},
            r"metadata\.jsonl: a\.mp4 has actions 0\.5 at frame 1; it takes integers of at least -1",
        ),
        ({"file_name": "a.mp4", "actions": ["left"]}, r"a\.mp4 has actions 'left' at frame 0"),
        ({"file_name": "a.mp4", "actions": [True]}, r"a\.mp4 has actions True at frame 0"),
        ({"file_name": "a.mp4", "actions": [-2]}, r"a\.mp4 has actions -2 at frame 0"),
        ({"file_name": "a.mp4", "actions": "012"}, r"a\.mp4 has actions '012'; it takes a list"),
        ({"file_name": "a.mp4", "label": 0.5}, r"a\.mp4 has class_label 0\.5"),
    ],
)
def test_metadata_that_do_not_fit_are_named(tmp_path: Path, row: dict, message: str) -> None:
    (tmp_path / "secret.mp4").touch()
    with pytest.raises(ValueError, match=message):
        open_source(touch(tmp_path / "data", "a.mp4", rows=[row]))


def test_labels_are_names_of_all_or_numbers(tmp_path: Path) -> None:
    rows = [{"file_name": "a.mp4", "label": "cat"}, {"file_name": "b.mp4", "label": 1}]
    with pytest.raises(ValueError, match=r"a\.mp4 has class_label 'cat'; it takes integers"):
        open_source(touch(tmp_path, "a.mp4", "b.mp4", rows=rows))


def test_bad_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no folder 'test'; it has train, validation"):
        open_source(touch(tmp_path / "data", "a.mp4")).split("test")
    rows = [{"file_name": "a.mp4"}, {"file_name": "./a.mp4"}]
    with pytest.raises(ValueError, match=r"metadata name .*a\.mp4, which is no video, or twice"):
        open_source(touch(tmp_path / "twice", "a.mp4", rows=rows))
    (tmp_path / "none").mkdir()
    (tmp_path / "none/notes.txt").touch()
    with pytest.raises(ValueError, match=r"none has no videos; .*\|mp4\|.*docs/data\.md"):
        open_source(tmp_path / "none")
    (tmp_path / "data/train/metadata.jsonl").write_text("{not json\n")
    with pytest.raises(ValueError, match=r"metadata\.jsonl has a line that is no JSON .*: \{not json"):
        open_source(tmp_path / "data")
    with pytest.raises(ValueError, match=r"data='.*gone' is not there; it takes a folder, or the id of a"):
        open_source(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"notes\.txt' is a file"):
        open_source(tmp_path / "none/notes.txt")
    write_video(tmp_path / "one/a.mp4", numbered_frames(3))
    assert len(open_source(tmp_path / "one").split("train")) == 1
    with pytest.raises(ValueError, match="has one video, whose end cannot be held out, as it is too short"):
        open_source(tmp_path / "one").split("validation")


# ----------------------------------------------------------------------------------------------------
# What is held out


def test_what_is_held_out() -> None:
    names = [f"video {number}" for number in range(2000)]
    held_out = hold_out(names)
    assert 70 < len(held_out) < 130  # 5 %, within three deviations
    # Whatever is added: nothing that was trained on is held out later, unless it had to be at least two.
    assert hold_out(names[:1000]) == held_out & set(names[:1000])
    assert [len(hold_out(names[:number])) for number in (1, 2, 3, 4, 5)] == [0, 1, 2, 2, 2]
    assert hold_out(list(reversed(names))) == held_out


def test_the_end_of_a_single_video_is_held_out(tmp_path: Path) -> None:
    """With its actions, and with `revisits` of what the part itself has shown."""
    write_video(tmp_path / "data/a.mp4", numbered_frames(30))
    actions, revisits = list(range(30)), [0] * 30
    revisits[14], revisits[20], revisits[21] = 14, 5, 6  # frames 0, 15 and 15
    row = {"file_name": "a.mp4", "actions": actions, "revisits": revisits, "label": 3}
    (tmp_path / "data/metadata.jsonl").write_text(json.dumps(row))
    source = open_source(tmp_path / "data")
    assert shown(source, "train") == {"a": list(range(15))}
    assert shown(source, "validation") == {"a": list(range(15, 30))}
    assert known(source) == {"a": (tuple(range(15)), 3)}
    assert known(source, "validation") == {"a": (tuple(range(15, 30)), 3)}
    (first,), (last,) = source.split("train"), source.split("validation")
    assert first.revisits == (*[0] * 14, 14)
    assert last.revisits == (*[0] * 5, 5, 6, *[0] * 8)
    assert first.video.stated().num_frames == last.video.stated().num_frames == 15
    assert first.video.digest().hexdigest() != last.video.digest().hexdigest()
    assert [number for number, _ in last.frames(FrameOptions(fps=2))] == [0, 5, 10]
    _, frames, split = source.describe().splitlines()
    assert frames.endswith("; 15 frames to train on; with actions and revisits and a class label")
    assert split == "its first 15 frames to train on, the rest held out for validation"
    decoded = [
        load_frames(source.split(split), tmp_path / "cache", FrameOptions())
        for split in ("train", "validation")
    ]
    assert [numbers(list(frames)) for frames in decoded] == [list(range(15)), list(range(15, 30))]

    (tmp_path / "data/metadata.jsonl").write_text(json.dumps(row | {"actions": actions[:-1]}))
    with pytest.raises(ValueError, match=r"a\.mp4: 15 frames, but 14 actions"):
        shown(open_source(tmp_path / "data"), "validation")


@pytest.mark.parametrize(("num_frames", "trained_on"), [(4, 2), (50, 25), (90, 58), (400, 360)])
def test_how_much_of_a_single_video_is_held_out(tmp_path: Path, num_frames: int, trained_on: int) -> None:
    np.savez(tmp_path / "a.npz", video=numbered_frames(num_frames, 4, 4))
    source = open_source(tmp_path)
    episodes = [*source.split("train"), *source.split("validation")]
    lengths = [len(list(episode.frames())) for episode in episodes]
    assert lengths == [trained_on, num_frames - trained_on]


def test_a_single_video_that_does_not_say_how_long_it_is(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mkv", numbered_frames(9))
    source = open_source(tmp_path)
    assert shown(source, "train") == {"a": [0, 1, 2, 3, 4]}
    assert shown(source, "validation") == {"a": [5, 6, 7, 8]}


# ----------------------------------------------------------------------------------------------------
# npz, and mp4 with npz


def test_npz_episodes(tmp_path: Path) -> None:
    for number in range(3):
        np.savez_compressed(
            tmp_path / f"{number}.npz", video=numbered_frames(5), actions=np.arange(5) + number
        )
    np.savez(tmp_path / "other.npz", weights=np.zeros(3))
    source = open_source(tmp_path)
    found = known(source) | known(source, "validation")
    assert found == {str(n): (tuple(range(n, n + 5)), None) for n in range(3)}
    assert set(map(tuple, shown(source, "validation").values())) == {(0, 1, 2, 3, 4)}
    assert "3 npz episodes" in source.describe() and "with actions" in source.describe()


@pytest.mark.skipif(not DATA.exists(), reason="the reference data are not beside the checkout")
def test_a_dmlab_episode_as_it_is(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.npz").symlink_to(DATA / "dmlab_episode.npz")
    source = open_source(tmp_path)
    (episode,) = source.split("train")
    content = np.load(DATA / "dmlab_episode.npz")
    assert np.array_equal([frame for _, frame in episode.frames()], content["video"])
    assert episode.actions == tuple(content["actions"])
    assert "64 x 64 pixels, no frame rate stated; 300 frames to train on" in source.describe()


def test_videos_with_an_npz_of_actions_of_the_same_stem(tmp_path: Path) -> None:
    """As Minecraft comes: train and test."""
    for part, number in (("train", 0), ("train", 1), ("test", 2)):
        write_video(tmp_path / part / "0" / f"{number}.mp4", numbered_frames(4))
        np.savez(tmp_path / part / "0" / f"{number}.npz", actions=np.array([number, 1, 2, 3]))
    source = open_source(tmp_path)
    assert known(source) == {f"0/{n}": ((n, 1, 2, 3), None) for n in (0, 1)}
    assert known(source, "validation") == {"0/2": ((2, 1, 2, 3), None)}
    assert "3 videos (mp4) with an npz of actions" in source.describe()
    assert shown(source, "train") == {"0/0": [0, 1, 2, 3], "0/1": [0, 1, 2, 3]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"actions": np.zeros((4, 7, 1), np.float32)},
            r"a\.npz: actions are float32 \[4, 7, 1\]; it takes integers \[T\], integers of groups \[T, G\]",
        ),
        ({"actions": np.zeros(4)}, r"a\.npz: actions are float64 \[4\]; it takes integers"),
        ({"actions": np.full((4, 2), np.inf)}, r"a\.npz: actions have vectors with infinite values"),
        ({"actions": np.full((4, 2), -2)}, r"a\.npz: actions have -2; it takes integers of at least -1"),
        ({"actions": np.array(["a"] * 4)}, r"a\.npz: actions are <U1 \[4\]"),
        (
            {"action_keys": np.zeros(4, int), "action_mouse": np.zeros(3, int)},
            r"a\.npz has action_keys, action_mouse that are not equally long",
        ),
        ({"keys": np.zeros(4)}, r"a\.npz has no actions; it has keys"),
    ],
)
def test_actions_that_do_not_fit_are_named(tmp_path: Path, content: dict, message: str) -> None:
    write_video(tmp_path / "a.mp4", numbered_frames(4))
    write_video(tmp_path / "validation/b.mp4", numbered_frames(4))
    np.savez(tmp_path / "a.npz", **content)
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path).describe()
    assert "no actions" in open_source(tmp_path, ignore_actions=True).describe()


def test_minecraft_with_groups_of_keys(tmp_path: Path) -> None:
    keyboard, mouse = np.array([0, 2, 1, 0]), np.array([1, 1, 0, -1], np.int8)
    for number, content in enumerate(({"action_mouse": mouse, "action_keyboard": keyboard},) * 3):
        write_video(tmp_path / f"{number}.mp4", numbered_frames(4))
        np.savez(tmp_path / f"{number}.npz", reward=np.zeros(4), **content)
    source = open_source(tmp_path)
    for episode in source.split("train"):
        assert episode.actions == ((0, 1), (2, 1), (1, 0), (0, -1))
        assert episode.action_names == ("keyboard", "mouse")
    assert "with actions (2 groups: keyboard, mouse)" in source.describe()


@pytest.mark.parametrize("form", ["mp4 and npz", "npz", "images and npy", "jsonl", "csv", "parquet"])
def test_vectors_of_each_kind_of_files(tmp_path: Path, form: str) -> None:
    """BAIR's and others': four numbers for each frame; of the first one nothing is known."""
    vectors = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
    vectors[0] = np.nan
    for number in range(3):
        place = tmp_path / str(number)
        if form == "npz":
            np.savez(place.with_suffix(".npz"), video=numbered_frames(4), actions=vectors)
        elif form == "images and npy":
            place.mkdir()
            for index, frame in enumerate(numbered_frames(4)):
                Image.fromarray(frame).save(place / f"{index}.png")
            np.save(place / "actions.npy", vectors)
        else:
            write_video(place.with_suffix(".mp4"), numbered_frames(4))
        if form == "mp4 and npz":
            np.savez(place.with_suffix(".npz"), actions=vectors)
    rows = [{"file_name": f"{number}.mp4", "actions": vectors.tolist()} for number in range(3)]
    if form == "jsonl":
        (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif form == "csv":
        lines = [f'{row["file_name"]},"{json.dumps(row["actions"])}"\n' for row in rows]
        (tmp_path / "metadata.csv").write_text("".join(["file_name,actions\n", *lines]))
    elif form == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "metadata.parquet")
    source = open_source(tmp_path)
    found = [episode.actions for episode in source.split("train")]
    assert len(found) == 1 and np.array_equal(np.array(found[0], np.float32), vectors, equal_nan=True)
    assert "with actions (vectors of 4 numbers)" in source.describe()
    assert list(shown(source, "train").values()) == [[0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        ([[0.5, 1], [0.5]], "a.mp4 has actions that are not equally long"),
        ({"keys": [0, 1], "mouse": [0]}, "a.mp4 has actions that are not equally long"),
        (
            {"keys": [0.5, 1.0], "mouse": [0, 0]},
            r"a.mp4 has actions of integers and of floats \(keys, mouse\)",
        ),
        ([["up"], ["down"]], "a.mp4 has actions are <U4"),
    ],
    ids=str,
)
def test_nested_actions_that_do_not_fit_are_named(tmp_path: Path, actions: Any, message: str) -> None:
    data = touch(tmp_path, "a.mp4", rows=[{"file_name": "a.mp4", "actions": actions}])
    with pytest.raises(ValueError, match=message):
        open_source(data)


def test_groups_in_metadata(tmp_path: Path) -> None:
    actions = {"mouse": [0, 1, 2], "keys": [1, 1, -1]}
    episode = episodes(touch(tmp_path, "a.mp4", rows=[{"file_name": "a.mp4", "actions": actions}]))["a"]
    assert episode.actions == ((1, 0), (1, 1), (-1, 2)) and episode.action_names == ("keys", "mouse")


# ----------------------------------------------------------------------------------------------------
# UCF-101 and BAIR


def ucf101(folder: Path) -> Path:
    for class_name, groups in (("Archery", (1, 8)), ("Biking", (2, 9))):
        for group in groups:
            file = folder / "UCF-101" / class_name / f"v_{class_name}_g{group:02d}_c01.avi"
            write_video(file, numbered_frames(3, 48, 64), rate=25)
    lists = folder / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_text("1 ApplyEyeMakeup\n2 Archery\n3 Biking\n")
    train = [
        "Archery/v_Archery_g08_c01.avi 2",
        "Biking/v_Biking_g09_c01.avi 3",
        "Biking/v_Biking_g10_c01.avi 3",
    ]
    (lists / "trainlist01.txt").write_text("\r\n".join(train) + "\r\n")
    (lists / "testlist01.txt").write_text("Archery/v_Archery_g01_c01.avi\nBiking/v_Biking_g02_c01.avi\n")
    return folder


def test_ucf101_with_its_official_lists(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = open_source(ucf101(tmp_path))
    assert known(source) == {
        "Archery/v_Archery_g08_c01": (None, 1),
        "Biking/v_Biking_g09_c01": (None, 2),
    }
    assert list(source.split("validation").names) == ["Archery/v_Archery_g01_c01", "Biking/v_Biking_g02_c01"]
    assert "listed, but not there (1 in Biking): v_Biking_g10_c01.avi" in caplog.text
    assert "UCF-101, 4 videos by the official lists of 3 classes" in source.describe()
    assert "2 held out for validation as the source says" in source.describe()
    assert shown(source, "train")["Biking/v_Biking_g09_c01"] == [0, 1, 2]
    (tmp_path / "ucfTrainTestlist/classInd.txt").unlink()
    with pytest.raises(ValueError, match=r"trainlist01\.txt is there, but classInd\.txt is not"):
        open_source(tmp_path)


@pytest.mark.skipif(not DATA.exists(), reason="the reference data are not beside the checkout")
def test_a_real_video_of_ucf101(tmp_path: Path) -> None:
    for name in ("CliffDiving/a.mp4", "Archery/b.mp4", "Archery/c.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(DATA / "ucf101_CliffDiving.mp4")
    source = open_source(tmp_path)
    (episode,) = source.split("train")
    half = list(episode.frames(FrameOptions(resolution="64", fps=episode.frame_rate / 2)))
    whole = list(episode.frames())
    assert len(half) == -(-len(whole) // 2)
    assert half[3][0] == 6 and half[3][1].shape == (64, 64, 3)


def test_bair_as_folders_of_images(tmp_path: Path) -> None:
    for part, trajectories in (("train", (0, 1)), ("test", (2,))):
        for trajectory in trajectories:
            folder = tmp_path / part / f"traj_{256 * trajectory}_to_{256 * trajectory + 255}" / "0"
            folder.mkdir(parents=True)
            for number, frame in enumerate(numbered_frames(12, 8, 8)):
                Image.fromarray(frame).save(folder / f"{number}.png")
    source = open_source(tmp_path)
    assert shown(source, "train") == {
        "traj_0_to_255/0": list(range(12)),
        "traj_256_to_511/0": list(range(12)),
    }
    assert list(source.split("validation").names) == ["traj_512_to_767/0"]
    assert known(source)["traj_0_to_255/0"] == (None, None)
    assert "3 folders of images" in source.describe() and "24 frames to train on" in source.describe()


# ----------------------------------------------------------------------------------------------------
# Shards


def video_bytes(folder: Path, num_frames: int) -> bytes:
    write_video(folder / "video.mp4", numbered_frames(num_frames))
    return (folder / "video.mp4").read_bytes()


def write_tar(file: Path, content: dict[str, bytes]) -> None:
    with tarfile.open(file, "w") as archive:
        for name, data in content.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def test_webdataset_shards(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for shard in range(2):
        content = {}
        for number in range(3):
            key = f"walk/{shard}.{number}" if shard else f"walk{number}"
            key = key.replace(".", "-")
            content[f"{key}.mp4"] = video_bytes(tmp_path, 3 + number)
            content[f"{key}.json"] = json.dumps({"actions": [shard] * (3 + number)}).encode()
            content[f"{key}.cls"] = str(number).encode()
        write_tar(data / f"shard-{shard:03d}.tar", content)
    source = open_source(data)
    found = known(source) | known(source, "validation")
    assert found["shard-000/walk2"] == ((0,) * 5, 2) and found["shard-001/walk/1-0"] == ((1,) * 3, 0)
    assert len(found) == len(source.split("train")) + len(source.split("validation")) == 6
    assert {name: len(frames) for name, frames in shown(source, "train").items()} == {
        name: 3 + found[name][1] for name in source.split("train").names
    }
    assert "6 videos in webdataset shards" in source.describe()
    assert "with actions and a class label" in source.describe()
    assert known(open_source(data, ignore_actions=True))[source.split("train").names[0]][0] is None


def test_webdataset_shards_of_two_splits_and_other_actions(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    actions = io.BytesIO()
    np.save(actions, np.array([4, 5, 6]))
    video = video_bytes(tmp_path, 3)
    write_tar(data / "train-0.tar", {"a.mp4": video, "a.actions.npy": actions.getvalue()})
    write_tar(data / "validation-0.tar", {"b.mp4": video, "b.actions.npy": actions.getvalue()})
    source = open_source(data)
    assert known(source) == {"train-0/a": ((4, 5, 6), None)}
    assert shown(source, "validation") == {"validation-0/b": [0, 1, 2]}


def test_parquet_with_the_bytes_of_videos(tmp_path: Path) -> None:
    import datasets

    data = tmp_path / "data"
    data.mkdir()
    rows = {
        "video": [{"bytes": video_bytes(tmp_path, 3 + number), "path": None} for number in range(4)],
        "label": [1, 0, 1, 0],
        "actions": [[number] * (3 + number) for number in range(4)],
    }
    features = datasets.Features(
        {
            "video": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "actions": datasets.List(datasets.Value("int64")),
        }
    )
    datasets.Dataset.from_dict(rows, features=features).to_parquet(data / "train-00000-of-00001.parquet")
    # Plain bytes, under another name, in small groups.
    plain = pyarrow.table({"number": [1, 2], "clip": [video_bytes(tmp_path, 7), video_bytes(tmp_path, 8)]})
    parquet.write_table(plain, data / "validation-00000-of-00001.parquet", row_group_size=1)
    parquet.write_table(pyarrow.table({"text": ["no video"]}), data / "train-notes.parquet")
    source = open_source(data)
    assert known(source) == {
        f"train-00000-of-00001/{n:06d}": ((n,) * (3 + n), (1, 0, 1, 0)[n]) for n in range(4)
    }
    assert source.class_names == ("cat", "dog")
    held_out = shown(source, "validation")
    assert held_out == {f"validation-00000-of-00001/{n:06d}": list(range(7 + n)) for n in range(2)}
    assert "6 videos in parquet of 2 classes (cat, dog)" in source.describe()


def test_parquet_with_the_paths_of_videos(tmp_path: Path) -> None:
    write_video(tmp_path / "files/a.mp4", numbered_frames(5))
    (tmp_path / "data").mkdir()
    rows = [{"bytes": None, "path": "../files/a.mp4"}] * 3
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    parquet.write_table(pyarrow.table({"video": pyarrow.array(rows, kind)}), tmp_path / "data/all.parquet")
    assert set(map(tuple, shown(open_source(tmp_path / "data"), "train").values())) == {(0, 1, 2, 3, 4)}


def test_damaged_shards_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"no tar" * 100)
    with pytest.raises(ValueError, match=r"a\.tar is no tar file, or damaged"):
        open_source(tmp_path)
    (tmp_path / "a.tar").rename(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet is no parquet file, or damaged"):
        open_source(tmp_path)
    (tmp_path / "a.parquet").rename(tmp_path / "a.npz")
    with pytest.raises(ValueError, match=r"a\.npz is not an npz file, or damaged"):
        open_source(tmp_path)


# ----------------------------------------------------------------------------------------------------
# LeRobot


TOP = "observation.images.top"


def lerobot(folder: Path, action: dict, values: list) -> Path:
    """A data set of version 3: three episodes of 4, 5 and 6 frames, in one mp4 and one parquet file."""
    info = {
        "codebase_version": "v3.0",
        "fps": 10,
        "total_episodes": 3,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
        "features": {
            "action": action,
            "observation.images.top": {"dtype": "video", "shape": [32, 48, 3]},
            "observation.images.wrist": {"dtype": "video", "shape": [32, 48, 3]},
        },
    }
    for part in ("meta/episodes/chunk-000", "data/chunk-000", "videos/observation.images.top/chunk-000"):
        (folder / part).mkdir(parents=True)
    (folder / "meta/info.json").write_text(json.dumps(info))
    write_video(folder / "videos/observation.images.top/chunk-000/file-000.mp4", numbered_frames(15))
    bounds, rows = [0, 4, 9, 15], []
    for number in range(3):
        camera = {"chunk_index": 0, "file_index": 0}
        camera |= {"from_timestamp": bounds[number] / 10, "to_timestamp": bounds[number + 1] / 10}
        row = {"episode_index": number, "data/chunk_index": 0, "data/file_index": 0}
        rows.append(row | {f"videos/observation.images.top/{name}": value for name, value in camera.items()})
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "meta/episodes/chunk-000/file-000.parquet")
    frames = [(number, t) for number in range(3) for t in range(bounds[number + 1] - bounds[number])]
    table = pyarrow.table(
        {
            "episode_index": [number for number, _ in frames],
            "frame_index": [t for _, t in frames],
            "action": values,
        }
    )
    parquet.write_table(table, folder / "data/chunk-000/file-000.parquet")
    return folder


def test_lerobot_with_one_integer_as_action(tmp_path: Path) -> None:
    source = open_source(lerobot(tmp_path, {"dtype": "int64", "shape": [1]}, list(range(15))), camera=TOP)
    frames = shown(source, "train") | shown(source, "validation")
    assert frames == {
        "episode-000000": [0, 1, 2, 3],
        "episode-000001": [4, 5, 6, 7, 8],
        "episode-000002": [9, 10, 11, 12, 13, 14],
    }
    found = known(source) | known(source, "validation")
    # An action of LeRobot follows its frame; ours leads to it.
    assert found == {name: ((-1, *numbers[:-1]), None) for name, numbers in frames.items()}
    first = source.describe().splitlines()[0]
    assert first.endswith("LeRobot v3.0, 3 episodes of the camera observation.images.top")
    everything = [*source.split("train"), *source.split("validation")]
    assert len({episode.video.digest().hexdigest() for episode in everything}) == 3


@pytest.mark.parametrize("names", [["x", "y"], {"motors": ["x"], "gripper": ["y"]}, ["x"], None])
def test_lerobot_with_continuous_actions(tmp_path: Path, names: Any) -> None:
    action = {"dtype": "float32", "shape": [2], "names": names}
    folder = lerobot(tmp_path, action, [[0.5, -number] for number in range(15)])
    source = open_source(folder, camera=TOP)
    found = {episode.name: episode for episode in [*source.split("train"), *source.split("validation")]}
    actions = np.array(found["episode-000001"].actions)
    assert np.isnan(actions[0]).all()
    assert actions[1:].tolist() == [[0.5, -4], [0.5, -5], [0.5, -6], [0.5, -7]]
    fits = names not in (["x"], None)
    assert found["episode-000001"].action_names == (("x", "y") if fits else ())
    assert f"actions (vectors of 2 numbers{': x, y' if fits else ''})" in source.describe()
    source = open_source(folder, ignore_actions=True, camera=TOP)
    assert known(source, "validation").popitem()[1] == (None, None)


def test_lerobot_of_another_version(tmp_path: Path) -> None:
    folder = lerobot(tmp_path, {"dtype": "float32", "shape": [1]}, [[0.5]] * 15)
    assert open_source(folder, camera=TOP).split("train").listed[0].actions[1] == (0.5,)
    info = json.loads((folder / "meta/info.json").read_text())
    (folder / "meta/info.json").write_text(json.dumps(info | {"codebase_version": "v2.1"}))
    with pytest.raises(ValueError, match=r"is a LeRobot data set of version v2\.1; it takes v3"):
        open_source(folder, camera=TOP)


def test_a_camera_of_several(tmp_path: Path) -> None:
    folder = lerobot(tmp_path, {"dtype": "int64", "shape": [1]}, list(range(15)))
    names = r"observation\.images\.top{}observation\.images\.wrist"
    with pytest.raises(ValueError, match=r"has 2 cameras: choose one by --camera " + names.format(" or ")):
        open_source(folder)
    with pytest.raises(ValueError, match=r"camera='top': .* has " + names.format(", ")):
        open_source(folder, camera="top")
    info = json.loads((folder / "meta/info.json").read_text())
    del info["features"]["observation.images.wrist"]
    (folder / "meta/info.json").write_text(json.dumps(info))
    assert "the camera observation.images.top" in open_source(folder).kind
    write_video(tmp_path / "videos/a.mp4", numbered_frames(2))
    with pytest.raises(ValueError, match=r"camera='top': .* is no LeRobot data set"):
        open_source(tmp_path / "videos", camera="top")
    # Options of the scripts reach it.
    command = [str(folder), "--camera", "wrist", "--output-dir", str(tmp_path / "run")]
    with pytest.raises(ValueError, match="camera='wrist': "):
        train_folder.main(command)
    with pytest.raises(ValueError, match="camera='wrist': "):
        options = AutoencoderOptions(data=str(folder), output_dir=str(tmp_path / "run"), camera="wrist")
        AutoencoderTrainer(options)
    (tmp_path / "config.json").touch()
    with pytest.raises(ValueError, match="camera='wrist': "):
        encode_latents.main([*command[:3], "--autoencoder", str(tmp_path), "--output", str(tmp_path / "out")])


# ----------------------------------------------------------------------------------------------------
# The Hub


def on_hub(hub: HubDouble, home: Path, code: str) -> subprocess.CompletedProcess[str]:
    settings = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
    }
    command = ["-c", "from diffusers_far.training.sources import open_source\n" + code]
    return run_python(command, cwd=REPOSITORY, env=os.environ | settings, imported="torch")


def test_a_repo_of_the_hub(tmp_path: Path) -> None:
    video = video_bytes(tmp_path, 4)
    write_tar(tmp_path / "shard.tar", {"a.mp4": video, "b.mp4": video})
    files = {"data/train-0.tar": (tmp_path / "shard.tar").read_bytes(), "README.md": b"# Walks"}
    write_tar(tmp_path / "shard.tar", {"c.mp4": video})
    files["data/test-0.tar"] = (tmp_path / "shard.tar").read_bytes()
    code = (
        "source = open_source('me/walks'); print(source.describe())\n"
        "for split in ('train', 'validation'):\n"
        "    for episode in source.split(split): print(episode.name, len(list(episode.frames())))"
    )
    with serve() as hub:
        hub.repositories["datasets/me/walks"] = Repository(branches={"main": files})
        done = on_hub(hub, tmp_path / "home", code)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert lines[0] == "me/walks: 3 videos in webdataset shards"
        assert lines[2] == "2 to train on, 1 held out for validation as the source says"
        assert lines[3:] == ["data/train-0/a 4", "data/train-0/b 4", "data/test-0/c 4"]
        gone = on_hub(hub, tmp_path / "home", "open_source('me/gone')")
    assert (
        "ValueError: data='me/gone' is no folder, and as a data set of the Hub it cannot be had"
        in gone.stderr
    )
