"""The command line, as a user types it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from diffusers_far import cli
from diffusers_far.video_files import read_video, save_video
from tests.tiny_models import long_transformer, pipeline, transformer

COMMANDS = ["continue", "convert", "demo", "generate", "info", "play", "push"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("checkpoint")
    names = ["noop", "forward", "left", "right"]
    pipeline(long_transformer(num_actions=4), action_names=names, num_inference_steps=1).save_pretrained(
        folder
    )
    return str(folder)


@pytest.fixture
def video(tmp_path: Path) -> str:
    frames = np.random.default_rng(0).random((6, 8, 8, 3)).repeat(8, axis=1).repeat(8, axis=2)
    save_video(frames, tmp_path / "walk.mp4", 10)
    return str(tmp_path / "walk.mp4")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


def test_the_command_is_installed() -> None:
    command = str(Path(sys.executable).with_name("diffusers-far"))
    done = subprocess.run([command, "--help"], capture_output=True, text=True, check=True, timeout=60)
    assert all(name in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str) -> None:
    result = run(name, "--help")
    assert result.exit_code == 0 and ("diffusers-far" in result.output or "Usage" in result.output.title())


def test_continue(checkpoint: str, video: str, tmp_path: Path) -> None:
    output = tmp_path / "longer.mp4"
    result = run(
        "continue", video, "--checkpoint", checkpoint, "--num-context", 4, "--num-frames", 7,
        "--actions", "forward*2 left", "--output", output,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "7 frames, 4 of them given" in result.output
    made, given = read_video(output), read_video(video)
    assert made.shape == (7, 64, 64, 3) and len(given) == 6
    again = tmp_path / "again.mp4"
    same = ["continue", video, "--checkpoint", checkpoint, "--num-context", 4, "--num-frames", 7]
    run(*same, "--actions", "forward*2 left", "--output", again)
    assert np.array_equal(read_video(again), made)
    run(*same, "--actions", "right*3", "--output", again)
    assert not np.array_equal(read_video(again)[4:], made[4:])


def test_generate(tmp_path: Path) -> None:
    pipeline(transformer(num_classes=3), num_inference_steps=1).save_pretrained(tmp_path / "model")
    options = ["--checkpoint", tmp_path / "model", "--num-frames", 3, "--output", tmp_path / "made.mp4"]
    result = run(
        "generate", *options, "--class-labels", 1, "--guidance-scale", 2, "--height", 32, "--width", 32
    )
    assert result.exit_code == 0, result.output
    assert read_video(tmp_path / "made.mp4").shape == (3, 32, 32, 3)


def test_info(checkpoint: str) -> None:
    result = run("info", checkpoint)
    assert result.exit_code == 0, result.output
    assert "FAR Long, 2 layers" in result.output and "noop, forward, left, right" in result.output
    assert "64, long-term 4" in result.output


def test_an_interruption_keeps_the_frames_so_far(
    checkpoint: str, video: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers_far import Rollout

    step, steps = Rollout.step_latents, []

    def interrupted(self, *arguments):
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(Rollout, "step_latents", interrupted)
    result = run(
        "continue", video, "--checkpoint", checkpoint, "--num-frames", 20, "--output", tmp_path / "part.mp4"
    )
    assert result.exit_code == 130
    assert len(read_video(tmp_path / "part.mp4")) == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "nowhere/at/all"], "--checkpoint: nowhere/at/all is neither a folder"),
        (["--actions", "up"], "'up' is not an action"),
        (["--num-frames", 6], "num_frames=6 must be more than the 6 context frames"),
        (["--num-inference-steps", 0], "num_inference_steps=0"),
        (["--max-long-frames", -2], "max_long_frames=-2"),
        (["--output", "no/folder/here.mp4"], "folder of no/folder/here.mp4 does not exist"),
    ],
)
def test_errors_are_one_line(checkpoint: str, video: str, arguments: list[object], message: str) -> None:
    result = run("continue", video, "--checkpoint", checkpoint, *arguments)
    assert result.exit_code == 1
    assert result.output.splitlines()[-1].startswith("Error: ") and message in result.output


def test_files_that_are_no_videos(checkpoint: str, tmp_path: Path) -> None:
    assert run("continue", tmp_path / "missing.mp4").exit_code == 2
    (tmp_path / "text.mp4").write_text("no video")
    result = run("continue", tmp_path / "text.mp4", "--checkpoint", checkpoint)
    assert result.exit_code == 1 and "cannot be read as a video" in result.output


def test_a_wrong_checkpoint_and_a_full_disk(
    checkpoint: str, video: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "model_index.json", "PNG")
    result = run("info", tmp_path)
    assert result.exit_code == 1 and result.output.startswith("Error: ")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "far.mp4")

    monkeypatch.setattr("diffusers_far.video_files.save_video", full)
    result = run("continue", video, "--checkpoint", checkpoint, "--num-frames", 7)
    assert result.exit_code == 1 and "No space left on device: 'far.mp4'" in result.output
