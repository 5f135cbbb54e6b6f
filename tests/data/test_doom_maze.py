"""The doom-maze recorder: reproducible, resumable, with the actions and the mazes it promises."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("vizdoom", reason="the recorder needs vizdoom (the extra 'doom')")
DATA = Path(__file__).parents[2] / "data"
sys.path.insert(0, str(DATA))  # data/ is a folder of scripts that import one another

import doom_maze  # noqa: E402
from doom_maze_files import Settings, check_disjoint, copy_sample, prepare_folder  # noqa: E402
from doom_maze_map import build_maze, split_of_grid  # noqa: E402

COUNTS = {"train": 4, "validation": 2}
FRAMES = 40
SAMPLE = DATA / "samples" / "doom-maze-64"


def recorder(output: Path, train: int, workers: int) -> list[str]:
    options = {"train": train, "validation": COUNTS["validation"], "frames": FRAMES, "workers": workers}
    command = [sys.executable, str(DATA / "doom_maze.py"), str(output)]
    return command + [text for name, value in options.items() for text in (f"--{name}", str(value))]


def records_of(recording: Path, split: str) -> list[dict]:
    return [json.loads(line) for line in (recording / split / "metadata.jsonl").read_text().splitlines()]


def content_of(recording: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(recording)): p.read_bytes() for p in sorted(recording.rglob("*")) if p.is_file()
    }


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("doom") / "recording"
    subprocess.run(recorder(output, COUNTS["train"], workers=2), check=True)
    return output


def test_killed_and_resumed_recording_equals_one_made_in_one_go(recording: Path, tmp_path: Path) -> None:
    output = tmp_path / "resumed"
    process = subprocess.Popen(recorder(output, train=COUNTS["train"] - 1, workers=1))
    while not list(output.glob("train/*.mp4")):
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (output / "train" / "metadata.jsonl").exists()
    time.sleep(0.5)  # the worker notices and ends
    finished = {path: path.stat().st_mtime_ns for path in output.glob("*/*.mp4")}

    # One worker in place of two, and one more episode than was asked for at first.
    subprocess.run(recorder(output, COUNTS["train"], workers=1), check=True)
    assert content_of(output) == content_of(recording)
    assert all(path.stat().st_mtime_ns == modified for path, modified in finished.items())


def test_action_led_to_its_frame(recording: Path) -> None:
    turns = {"left": 15, "forward_left": 15, "right": -15, "forward_right": -15}  # counter-clockwise
    for split in COUNTS:
        for record in records_of(recording, split):
            actions, poses = record["actions"], np.array(record["poses"])
            assert len(actions) == len(poses) == FRAMES
            assert actions[0] == doom_maze.NOOP
            turned = (np.diff(poses[:, 2]) + 180) % 360 - 180  # [t - 1] is from frame t - 1 to t
            expected = [turns.get(doom_maze.ACTIONS[action], 0) for action in actions]
            np.testing.assert_allclose(turned, expected[1:], atol=0.05)


def test_frames_follow_the_pose(recording: Path) -> None:
    """A frame is seen from its own pose: it stays the same exactly where the pose does."""
    for split in COUNTS:
        for record in records_of(recording, split):
            frames = doom_maze.decode(recording / split / record["file_name"]).astype(float)
            poses = np.array(record["poses"])
            change = np.abs(np.diff(frames, axis=0)).mean(axis=(1, 2, 3))
            turned = np.abs(np.diff(poses[:, 2])) > 1
            rested = (np.abs(np.diff(poses, axis=0)) < 0.01).all(axis=1)
            assert change[turned].min() > 1.5
            assert not rested.any() or change[rested].max() < 1


def test_walks_stay_in_open_cells(recording: Path) -> None:
    for split in COUNTS:
        for record in records_of(recording, split):
            cells = {doom_maze.cell_at(x, y) for x, y, _ in record["poses"]}
            assert all(record["maze"][row][column] == "." for column, row in cells)
            num_open = sum(row.count(".") for row in record["maze"])
            assert record["visited_fraction"] == pytest.approx(len(cells) / num_open, abs=1e-4)


def test_videos_are_near_lossless(recording: Path) -> None:
    assert all(record["psnr"] >= 42 for split in COUNTS for record in records_of(recording, split))


def test_splits_share_no_maze() -> None:
    grids = {}
    for split in COUNTS:
        grids[split] = [
            build_maze(split, random.Random(f"{split}-{i}"), num_textures=2).grid for i in range(50)
        ]
    for split, own in grids.items():
        for grid in own:
            upside_down, transposed = grid[::-1], tuple(zip(*grid, strict=True))
            assert split_of_grid(grid) == split_of_grid(upside_down) == split_of_grid(transposed) == split
    assert not set(grids["train"]) & set(grids["validation"])
    with pytest.raises(RuntimeError, match="1 mazes are in both splits"):
        check_disjoint({split: [{"maze": ["###", "#.#", "###"]}] for split in COUNTS})


def test_load_dataset(recording: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset(str(recording), cache_dir=str(tmp_path))
    assert {split: len(loaded[split]) for split in loaded} == COUNTS
    for split in COUNTS:
        rows = loaded[split].cast_column("video", datasets.Video(decode=False))
        for row, record in zip(rows, records_of(recording, split), strict=True):
            video = Path(row.pop("video")["path"])
            assert video.name == record.pop("file_name")
            assert doom_maze.decode(video).shape == (FRAMES, 64, 64, 3)
            assert row == record


def test_copied_sample(recording: Path, tmp_path: Path) -> None:
    copy_sample(recording, tmp_path / "sample", [1])
    names = {"README.md", "validation/00001.mp4", "validation/metadata.jsonl"}
    copied = content_of(tmp_path / "sample")
    assert set(copied) == names
    assert copied["validation/00001.mp4"] == content_of(recording)["validation/00001.mp4"]
    assert records_of(tmp_path / "sample", "validation") == records_of(recording, "validation")[1:]
    with pytest.raises(ValueError, match="--episodes has 7"):
        copy_sample(recording, tmp_path / "other", [7])
    with pytest.raises(ValueError, match="is not a recording"):
        copy_sample(tmp_path, tmp_path / "other", [1])
    with pytest.raises(ValueError, match="is not empty"):
        copy_sample(recording, tmp_path / "sample", [1])


def test_shipped_sample(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset(str(SAMPLE), cache_dir=str(tmp_path))
    assert list(loaded) == ["validation"]
    for row in loaded["validation"].cast_column("video", datasets.Video(decode=False)):
        assert len(doom_maze.decode(Path(row["video"]["path"]))) == len(row["actions"]) == len(row["poses"])
    assert sum(len(content) for content in content_of(SAMPLE).values()) < 2_000_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train", "-1"], "--train must be between 0 and 100000, but is -1"),
        (["--validation", "100001"], "--validation must be between 0 and 100000, but is 100001"),
        (["--frames", "0"], "--frames must be at least 1, but is 0"),
        (["--textures", "13"], "--textures must be between 1 and 12, but is 13"),
        (["--workers", "0"], "--workers must be at least 1, but is 0"),
        (["--train", "0", "--validation", "0"], "--train and --validation are both 0"),
        (["--episodes", "3"], "--sample-of and --episodes must be given together"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["doom_maze.py", str(tmp_path / "output"), *arguments])
    with pytest.raises(ValueError, match=message):
        doom_maze.main()
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("name", ["seed", "frames", "textures"])
def test_changed_settings_are_refused(name: str, tmp_path: Path) -> None:
    settings = {"seed": 0, "frames": FRAMES, "textures": 4}
    prepare_folder(tmp_path, Settings(**settings))
    prepare_folder(tmp_path, Settings(**settings))
    changed = settings | {name: 9}
    with pytest.raises(
        ValueError, match=rf"--{name} is 9, but .* was recorded with --{name} {settings[name]}"
    ):
        prepare_folder(tmp_path, Settings(**changed))


def test_foreign_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="neither empty nor a recording"):
        prepare_folder(tmp_path, Settings(seed=0, frames=FRAMES, textures=4))
