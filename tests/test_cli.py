"""The command line, as a user types it."""

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from diffusers_far import ContextSchedule, FARVideoPipeline, cli
from diffusers_far.video_files import VideoFile, VideoWriter, read_video, save_video
from tests.python_process import run_python
from tests.tiny_models import long_transformer, pipeline, transformer

COMMANDS = ["continue", "convert", "demo", "export", "generate", "info", "play", "push"]


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


def test_frames_without_meaning_end_a_video_with_those_before(
    checkpoint: str, video: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers_far import Rollout

    step, steps = Rollout.step_latents, []

    def broken(self, action, noise=None, **others):
        steps.append(1)
        noise = torch.full((1, 1, *self._latent_shape), float("nan")) if len(steps) == 3 else noise
        return step(self, action, noise, **others)

    monkeypatch.setattr(Rollout, "step_latents", broken)
    output = tmp_path / "part.mp4"
    result = run("continue", video, "--checkpoint", checkpoint, "--num-frames", 20, "--output", output)
    assert result.exit_code == 1 and "Error: frame 8 came out with values that are NaN" in result.output
    assert f"{output}: 8 frames, 6 of them given" in result.output and len(read_video(output)) == 8


def test_continue_with_vectors(video: str, tmp_path: Path) -> None:
    """As a text, and from a file; the last one goes on."""
    model = transformer(action_dim=2, action_mean=[1.0, 2.0], action_std=[1.0, 1.0])
    pipeline(model, action_names=["x", "y"], num_inference_steps=1).save_pretrained(tmp_path / "model")
    np.save(tmp_path / "a.npy", np.array([[0.5, 2.0], [0.5, 2.0], [1.0, -3.0]]))
    np.save(tmp_path / "wrong.npy", np.zeros((3, 3)))
    made = []
    for index, actions in enumerate(("x=0.5*2 y=-3", tmp_path / "a.npy", "x=0.5")):
        output = tmp_path / f"{index}.mp4"
        done = run(
            "continue", video, "--checkpoint", tmp_path / "model", "--num-frames", 10, "--actions", actions,
            "--output", output,
        )  # fmt: skip
        assert done.exit_code == 0, done.output
        made.append(read_video(output))
    assert np.array_equal(made[0], made[1]) and not np.array_equal(made[0], made[2])
    for actions, message in (
        ("walk", "'walk' is not an action: it takes x=NUMBER+y=NUMBER"),
        (tmp_path / "wrong.npy", "wrong.npy has shape [3, 3]; it takes [T, 2]"),
        (tmp_path / "none.npy", "none.npy cannot be read as an .npy"),
    ):
        done = run("generate", "--checkpoint", tmp_path / "model", "--actions", actions)
        assert done.exit_code == 1 and message in done.output, done.output
    info = run("info", tmp_path / "model").output
    assert "x=NUMBER+y=NUMBER" in info


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "nowhere/at/all"], "--checkpoint: nowhere/at/all is neither a folder"),
        (["--actions", "up"], "'up' is not an action"),
        (["--num-frames", 6], "--num-frames 6 must be more than the 6 frames given"),
        (["--num-inference-steps", 0], "num_inference_steps=0"),
        (["--max-long-frames", -2], "max_long_frames=-2"),
        (["--output", "no/folder/here.mp4"], "--output: the folder of no/folder/here.mp4 does not exist"),
        (["--output", "far.txt"], "--output: far.txt must end with one of .mp4, .webm, .gif"),
        (["--device", "cuda:77"], "--device: cuda:77 cannot be used here"),
        (["--device", "gpu"], "--device: gpu cannot be used here"),
        (["--actions", "forward " * 20_000], "The actions have 160000 characters"),
    ],
)
def test_errors_are_one_line(checkpoint: str, video: str, arguments: list[object], message: str) -> None:
    result = run("continue", video, "--checkpoint", checkpoint, *arguments)
    assert result.exit_code == 1
    assert result.output.startswith("Error: ") and message in result.output
    assert len(result.output.splitlines()) == 1


def test_files_that_are_no_videos(checkpoint: str, tmp_path: Path) -> None:
    assert run("continue", tmp_path / "missing.mp4").exit_code == 2
    (tmp_path / "text.mp4").write_text("no video")
    result = run("continue", tmp_path / "text.mp4", "--checkpoint", checkpoint)
    assert result.exit_code == 1 and "cannot be read as a video" in result.output


def test_a_wrong_checkpoint(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "model_index.json", "PNG")
    result = run("info", tmp_path)
    assert result.exit_code == 1 and result.output.startswith("Error: ")


def test_a_full_disk(checkpoint: str, video: str, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk."""
    output = tmp_path / "longer.mp4"
    output.write_bytes(b"mine")
    code = (
        "import resource, sys; from diffusers_far.cli import main; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000)); main(sys.argv[1:])"
    )
    options = ["continue", video, "--checkpoint", checkpoint, "--output", str(output)]
    run = run_python(["-c", code, *options])
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert run.stderr.splitlines()[-1].startswith("Error: ")
    assert output.read_bytes() == b"mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["longer.mp4", "walk.mp4"]


@pytest.mark.parametrize("kind", ["mp4", "webm", "gif"])
def test_the_given_video_is_kept(checkpoint: str, kind: str, tmp_path: Path) -> None:
    """Its frames, size and frame rate; by default 32 new frames follow."""
    frames = np.zeros((40, 48, 96, 3), np.uint8)
    frames[:, :, :24, 0] = frames[:, :, 72:, 2] = 200  # red left, blue right, where the model does not see
    frames[:, ::2, 24:72] = 255  # lines that no autoencoder of our tests reconstructs
    save_video(frames, tmp_path / f"wide.{kind}", 25)
    output = tmp_path / f"longer.{kind}"
    result = run("continue", tmp_path / f"wide.{kind}", "--checkpoint", checkpoint, "--output", output)
    assert result.exit_code == 0, result.output
    assert "72 frames, 40 of them given" in result.output
    made = read_video(output)
    assert made.shape == (72, 48, 96, 3) and VideoFile(output).frame_rate == 25
    assert np.abs(made[:40].astype(float) - read_video(tmp_path / f"wide.{kind}")).mean() < 4
    assert made[40:, :, :22].max() < 24 and made[40:, :, 74:].max() < 24  # the model drew in the middle
    assert made[40:, :, 26:70].max() > 60


def test_a_size_that_is_asked_for(checkpoint: str, video: str, tmp_path: Path) -> None:
    options = ["--num-frames", 8, "--height", 32, "--width", 64, "--output", tmp_path / "other.gif"]
    result = run("continue", video, "--checkpoint", checkpoint, *options, "--fps", 20)
    assert result.exit_code == 0, result.output
    assert read_video(tmp_path / "other.gif").shape == (8, 32, 64, 3)
    assert VideoFile(tmp_path / "other.gif").frame_rate == 20


def test_the_video_itself_is_not_replaced(checkpoint: str, video: str, tmp_path: Path) -> None:
    before = Path(video).read_bytes()
    (tmp_path / "link.mp4").symlink_to(video)
    for output in (video, tmp_path / "link.mp4"):
        result = run("continue", video, "--checkpoint", checkpoint, "--output", output)
        assert result.exit_code == 1 and "is the video to continue" in result.output
    assert Path(video).read_bytes() == before


def test_devices_are_not_replaced(checkpoint: str, tmp_path: Path) -> None:
    (tmp_path / "null.mp4").symlink_to("/dev/null")
    for output in ("/dev/null", tmp_path / "null.mp4"):
        result = run("generate", "--checkpoint", checkpoint, "--output", output)
        assert result.exit_code == 1 and f"--output: {output}" in result.output
    assert Path("/dev/null").is_char_device()


def test_a_result_is_the_same_as_in_python(checkpoint: str, video: str, tmp_path: Path) -> None:
    """What the command makes of the frames and actions that it hands on."""
    output = tmp_path / "longer.mp4"
    options = ["--num-frames", 9, "--actions", "left*2 forward", "--seed", 3, "--output", output]
    assert run("continue", video, "--checkpoint", checkpoint, *options).exit_code == 0
    pipe = FARVideoPipeline.from_pretrained(checkpoint)
    made = pipe(
        video=video,
        num_frames=9,
        actions=[-1] * 6 + [2, 2, 1],
        generator=torch.Generator().manual_seed(3),
        output_type="np",
    ).frames[0]
    # Of squares of 8 pixels, as the model of this test draws noise, which mp4 does not keep.
    squares = [frames.reshape(3, 8, 8, 8, 8, 3).mean((2, 4)) for frames in (read_video(output)[6:], made[6:])]
    assert np.abs(squares[0] / 255 - squares[1]).mean() < 0.3 * squares[1].std()  # 1.1 for another seed


@pytest.mark.parametrize(
    ("options", "schedule"),
    [
        ([], ContextSchedule()),
        (["--max-short-frames", "all"], ContextSchedule(max_short_frames=None)),
        (["--max-short-frames", 3, "--max-long-frames", 0], ContextSchedule(3, 0)),
        (
            ["--num-sink-frames", 2, "--refresh-interval", 0],
            ContextSchedule(num_sink_frames=2, refresh_interval=None),
        ),
    ],
)
def test_the_context_is_that_of_python(
    options: list[object],
    schedule: ContextSchedule,
    checkpoint: str,
    video: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = []
    stream = FARVideoPipeline.stream

    def noted(self: FARVideoPipeline, **arguments: Any) -> Any:
        given.append(arguments["context_schedule"])
        return stream(self, **arguments)

    monkeypatch.setattr(FARVideoPipeline, "stream", noted)
    output = ["--num-frames", 7, "--output", tmp_path / "longer.mp4"]
    result = run("continue", video, "--checkpoint", checkpoint, *output, *options)
    assert result.exit_code == 0, result.output
    assert given == [schedule]
    assert run("continue", video, "--max-short-frames", "some").exit_code == 2


def test_the_newest_frames_are_those_that_the_model_sees(tmp_path: Path) -> None:
    """A model that was trained with 4 frames: the result is as if only the last 4 had been given."""
    pipe = pipeline(transformer(), num_inference_steps=1, num_training_frames=4)
    pipe.save_pretrained(tmp_path / "model")
    frames = np.random.default_rng(1).integers(0, 255, (11, 8, 8, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    save_video(frames, tmp_path / "walk.gif", 10)
    made = []
    for options in (["--num-frames", 12], ["--num-context", 4, "--num-frames", 5]):
        output = tmp_path / "longer.gif"
        paths = [tmp_path / "walk.gif", "--checkpoint", tmp_path / "model", "--output", output]
        assert run("continue", *paths, *options).exit_code == 0
        made.append(read_video(output)[-1])
    assert np.array_equal(made[0], made[1])


def test_progress_in_a_log_is_short(checkpoint: str, tmp_path: Path) -> None:
    options = ["--checkpoint", checkpoint, "--num-frames", "40", "--output", str(tmp_path / "far.mp4")]
    done = run_python(["-m", "diffusers_far.cli", "generate", *options])
    assert done.returncode == 0, done.stderr
    lines = [line for line in (done.stdout + done.stderr).replace("\r", "\n").splitlines() if line]
    assert lines[-1].startswith("40 of 40 new frames") and len(lines) <= 10


@pytest.mark.parametrize("num_context", [4, 300])
def test_a_long_video_takes_little_memory(num_context: int, checkpoint: str, tmp_path: Path) -> None:
    """Beyond what a short one takes: less than 30 of its 300 frames, be they seen by the model or not."""
    frame = np.zeros((480, 640, 3), np.uint8)
    peaks = []
    for number in (8, 300):
        with VideoWriter(tmp_path / f"{number}.mp4", 30) as video:
            for index in range(number):
                video.write(np.roll(frame + np.uint8(index % 256), index, axis=1))
        options = ["continue", str(tmp_path / f"{number}.mp4"), "--checkpoint", checkpoint]
        options += ["--num-context", str(num_context), "--output", str(tmp_path / "longer.mp4")]
        code = (
            "import resource, sys; from diffusers_far.cli import main\n"
            "try: main(sys.argv[1:])\n"
            "except SystemExit as error: assert not error.code\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        done = run_python(["-c", code, *options])
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.splitlines()[-1]) * 1024)
    assert peaks[1] - peaks[0] < 30 * frame.nbytes


@pytest.mark.parametrize("name", [None, *COMMANDS])
def test_help_comes_at_once(name: str | None) -> None:
    """Processor time of a process of its own: other programs do not count."""
    code = (
        "import sys, time; from diffusers_far.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: print(time.process_time(), 'torch' in sys.modules, 'numpy' in sys.modules)"
    )
    command = [sys.executable, "-c", code, *([name] if name else []), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    seconds, *imported = done.stdout.splitlines()[-1].split()
    assert float(seconds) < 1 and imported == ["False", "False"]


@pytest.mark.parametrize("command", cli.main.commands.values(), ids=lambda command: command.name)
def test_options_are_written_with_dashes_and_named_as_in_python(command: click.Command) -> None:
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.opts == ["--" + parameter.name.replace("_", "-")]
    arguments = inspect.signature(FARVideoPipeline.__call__).parameters.keys() | {"num_context", "seed"}
    for name in ("frames", "steps", "context", "labels"):
        assert name in arguments or all(parameter.name != name for parameter in command.params)
