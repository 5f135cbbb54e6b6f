"""The doom-maze recorder: reproducible, resumable, with the actions and the mazes it promises."""

import json
import random
import re
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
from doom_maze_files import (  # noqa: E402
    ACTIONS,
    CLIP_LENGTHS,
    Settings,
    check_disjoint,
    clips_with_revisit,
    copy_sample,
    prepare_folder,
    revisited_frames,
    settings_path,
    write_metadata,
)
from doom_maze_map import BLURRED, MEMORABLE, ORIGINAL, OTHER, build_maze, split_of_grid  # noqa: E402
from doom_maze_walks import FRAMES_AFTER_RETURN, MIN_SCRIPTED_FRAMES, SCRIPTS, TURN_AWAY  # noqa: E402

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
            expected = [turns.get(ACTIONS[action], 0) for action in actions]
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


def record(output: Path, split: str, episodes: list[int], settings: Settings) -> list[dict]:
    prepare_folder(output, settings)
    doom_maze.record_job(doom_maze.Job(output, split, episodes, settings))
    write_metadata(output)
    return records_of(output, split)


def test_explore_records_the_shipped_sample_again(tmp_path: Path) -> None:
    settings = Settings(seed=0, frames=300, textures=4)
    recorded = record(tmp_path, "validation", [4, 39], settings)
    for again, shipped in zip(recorded, records_of(SAMPLE, "validation"), strict=True):
        for name in ("episode", "maze", "actions", "poses"):
            assert again[name] == shipped[name], name
        frames, expected = (
            doom_maze.decode(folder / "validation" / shipped["file_name"]).astype(float)
            for folder in (tmp_path, SAMPLE)
        )
        assert np.abs(frames - expected).mean() < 0.1


def test_revisit_walk_comes_back(tmp_path: Path) -> None:
    settings = {"seed": 0, "frames": 256, "textures": 4, "maze_nodes": (3, 5)}
    shares = {}
    for walk in ("explore", "revisit"):
        output = tmp_path / walk
        recorded = record(output, "validation", list(range(5)), Settings(**settings, walk=walk))
        num, total = clips_with_revisit(recorded, 96)
        assert total == 5 * (256 - 96 + 1)
        shares[walk] = num / total
        assert (
            f"| clips of 96 frames with a revisit | {num / total:.1%} |" in (output / "README.md").read_text()
        )
        assert {len(episode["maze"]) for episode in recorded} <= {7, 9, 11}
    assert shares["revisit"] > max(0.4, shares["explore"])

    text = (tmp_path / "revisit" / "README.md").read_text()
    assert "--walk revisit --maze-nodes 3 5" in text
    assert "7 x 7 (only about 30 layouts), 9 x 9 or 11 x 11 cells" in text


def test_scripted_walk_regains_its_view(tmp_path: Path) -> None:
    settings = Settings(0, MIN_SCRIPTED_FRAMES, 4, "scripted", (3, 5))
    recorded = record(tmp_path, "validation", list(range(2 * len(SCRIPTS))), settings)
    assert [episode["script"] for episode in recorded] == [*SCRIPTS, *SCRIPTS]
    for episode in recorded:
        poses, start, end = np.array(episode["poses"]), episode["start_frame"], episode["return_frame"]
        distance = np.hypot(*(poses[:, :2] - poses[start, :2]).T)
        angle = np.abs((poses[:, 2] - poses[start, 2] + 180) % 360 - 180)
        is_same = (distance < 16) & (angle < 2)
        is_hidden = angle > 89  # nothing is left of a view of 90 degrees

        assert 100 <= start < end < MIN_SCRIPTED_FRAMES - FRAMES_AFTER_RETURN
        first_hidden = start + int(np.argmax(is_hidden[start:]))
        assert first_hidden + int(np.argmax(is_same[first_hidden:])) == end
        if episode["script"] in TURN_AWAY:
            assert is_hidden[start:end].sum() == TURN_AWAY[episode["script"]]
            assert distance[start:end].max() < 5
            assert angle[end] < 1
        else:
            assert distance[start:end].max() > 80
        # By the rule for revisits, too: from the last frames in which nothing of the view was seen.
        assert revisited_frames(poses)[end] > 8
        assert revisited_frames(poses, start=end - 4)[end] > 8
        # All that follows was seen before.
        after = slice(end + 1, end + 1 + FRAMES_AFTER_RETURN)
        for pose in poses[after]:
            turned = np.abs((poses[:end, 2] - pose[2] + 180) % 360 - 180)
            assert ((np.hypot(*(poses[:end, :2] - pose[:2]).T) < 48) & (turned < 25)).any()


def turning(*turns: int) -> np.ndarray:
    """Poses of a player who stands and turns left (1), right (-1) or not (0)."""
    angles = 15.0 * np.cumsum([0, *turns])
    return np.stack([np.full(len(angles), 100.0), np.full(len(angles), 50.0), angles % 360], axis=1)


def test_revisited_frames_by_hand() -> None:
    # Looks ahead at frames 0 to 9, turns away by 75 degrees, waits, and turns back.
    poses = turning(*[0] * 9, *[1] * 5, *[0] * 9, *[-1] * 5)
    ago = revisited_frames(poses)
    # An angle of 15 degrees is within 60 of 75, and so only the last view, at 0, was out of view. The latest
    # frame that showed it before was frame 10, at 15 degrees.
    expected = np.zeros(len(poses), int)
    expected[28] = 28 - 10
    np.testing.assert_array_equal(ago, expected)

    # With a wait of only 2 frames, the window of 8 still has the way there; a window of 3 has not.
    short = turning(*[0] * 9, *[1] * 5, *[0] * 2, *[-1] * 5)
    assert not revisited_frames(short).any()
    assert np.flatnonzero(revisited_frames(short, window=3)).tolist() == [21]
    # The view is back in the fifth frame after a window without it: with a horizon of 4 that is too late.
    assert np.flatnonzero(revisited_frames(poses, horizon=5)).tolist() == [28]
    assert not revisited_frames(poses, horizon=4).any()
    # Before frame 25 the angle is 60, and in the 8 frames before frame 20 it is still turning away.
    assert np.flatnonzero(revisited_frames(poses, start=24)).tolist() == [28]
    assert not revisited_frames(poses, start=25).any()
    assert not revisited_frames(poses, start=20).any()
    # Only what is in the clip counts.
    assert not revisited_frames(poses[12:]).any()


def test_revisited_frames_does_not_confuse_places() -> None:
    poses = turning(*[0] * 9, *[1] * 12, *[0] * 9, *[-1] * 12)
    assert revisited_frames(poses).any()
    moved = poses.copy()
    moved[20:, 0] += 300  # the same directions at another place
    assert not revisited_frames(moved).any()
    wrapped = poses.copy()
    wrapped[:, 2] = (wrapped[:, 2] + 350) % 360
    np.testing.assert_array_equal(revisited_frames(wrapped), revisited_frames(poses))
    with pytest.raises(ValueError, match=r"poses must have the shape \(num_frames, 3\), but has \(5,\)"):
        revisited_frames(np.zeros(5))
    with pytest.raises(ValueError, match="window must be at least 1, but is 0"):
        revisited_frames(poses, window=0)


def test_clips_with_revisit_are_counted_one_by_one() -> None:
    rng = np.random.default_rng(0)
    poses = turning(*np.repeat(rng.integers(-1, 2, 30), rng.integers(1, 12, 30)))
    for length in (20, 60, *CLIP_LENGTHS):
        clips = [poses[i : i + length] for i in range(len(poses) - length + 1)]
        expected = sum(bool(revisited_frames(clip).any()) for clip in clips)
        assert clips_with_revisit([{"poses": poses.tolist()}], length) == (expected, len(clips))


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


def test_memorable_mazes_have_clear_textures_and_more_landmarks() -> None:
    shares = []
    for style in (ORIGINAL, MEMORABLE):
        texts = [build_maze("train", random.Random(i), 4, (3, 5), style).map_text for i in range(40)]
        textures = [name for text in texts for name in re.findall('texturemiddle="(.*?)"', text)]
        assert set(textures) == {*style.walls, *style.landmarks}
        assert bool(set(BLURRED) & set(textures)) == (style is ORIGINAL)
        shares.append(sum(name in style.landmarks for name in textures) / len(textures))
    assert shares == pytest.approx([0.12, 0.24], rel=0.15)


def test_the_other_textures_are_none_of_the_standard_ones(tmp_path: Path) -> None:
    text = build_maze("train", random.Random(0), 4, style=OTHER).map_text
    used = set(re.findall('texture(?:middle|floor|ceiling)="(.*?)"', text))
    standard = {*ORIGINAL.walls, *ORIGINAL.landmarks, *ORIGINAL.floors, *ORIGINAL.ceilings}
    assert len(used) > 8 and not used & standard

    settings = {"seed": 0, "frames": 20, "textures": 4}
    frames = {}
    for name in ("standard", "other"):
        (recorded,) = record(tmp_path / name, "train", [3], Settings(**settings, texture_set=name))
        assert f"--texture-set {name}" in (tmp_path / name / "README.md").read_text()
        frames[name] = doom_maze.decode(tmp_path / name / "train" / recorded["file_name"]).astype(float)
    assert np.abs(frames["standard"] - frames["other"]).mean() > 10


@pytest.mark.parametrize("split", COUNTS)
@pytest.mark.parametrize("nodes", [3, 4, 7])
def test_maze_size(nodes: int, split: str) -> None:
    grids = {build_maze(split, random.Random(i), 4, (nodes, nodes)).grid for i in range(20)}
    assert {len(row) for grid in grids for row in (grid, *grid)} == {2 * nodes + 1}
    assert len(grids) > 5  # with 3 nodes, few layouts are of the validation split
    sizes = {len(build_maze(split, random.Random(i), 4, (nodes, nodes + 1)).grid) for i in range(20)}
    assert sizes == {2 * nodes + 1, 2 * nodes + 3}


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
        (["--walk", "scripted", "--frames", "200"], "--frames must be at least 280 with --walk scripted"),
        (
            ["--maze-nodes", "2", "5"],
            "--maze-nodes must be two numbers from 3 to 20, the smaller first, but is 2 5",
        ),
        (["--maze-nodes", "5", "4"], "--maze-nodes must be two numbers .*, but is 5 4"),
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


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("seed", 9, "--seed is 9, but .* was recorded with --seed 0"),
        ("frames", 9, f"--frames is 9, but .* was recorded with --frames {FRAMES}"),
        ("textures", 9, "--textures is 9, but .* was recorded with --textures 4"),
        ("walk", "revisit", "--walk is revisit, but .* was recorded with --walk explore"),
        ("texture_set", "other", "--texture-set is other, but .* was recorded with --texture-set standard"),
        ("maze_nodes", (3, 5), "--maze-nodes is 3 5, but .* was recorded with --maze-nodes 4 5"),
    ],
)
def test_changed_settings_are_refused(name: str, value: object, message: str, tmp_path: Path) -> None:
    settings = {"seed": 0, "frames": FRAMES, "textures": 4}
    prepare_folder(tmp_path, Settings(**settings))
    prepare_folder(tmp_path, Settings(**settings))
    changed = settings | {name: value}
    with pytest.raises(ValueError, match=message):
        prepare_folder(tmp_path, Settings(**changed))


def test_folder_from_before_there_were_walks(tmp_path: Path) -> None:
    prepare_folder(tmp_path, Settings(seed=0, frames=FRAMES, textures=4))
    settings_path(tmp_path).write_text(json.dumps({"seed": 0, "frames": FRAMES, "textures": 4}))
    with pytest.raises(ValueError, match=r"--walk is revisit, but .* was recorded with --walk explore"):
        prepare_folder(tmp_path, Settings(seed=0, frames=FRAMES, textures=4, walk="revisit"))
    prepare_folder(tmp_path, Settings(seed=0, frames=FRAMES, textures=4))
    assert json.loads(settings_path(tmp_path).read_text())["walk"] == "explore"


def test_foreign_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="neither empty nor a recording"):
        prepare_folder(tmp_path, Settings(seed=0, frames=FRAMES, textures=4))
