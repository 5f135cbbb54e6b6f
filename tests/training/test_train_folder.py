"""`diffusers-far train`: from video files to a pipeline, what the plan says, and going on after Ctrl-C."""

import fcntl
import json
import os
import pty
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusers_far import FARTransformer3DModel, FARVideoPipeline, read_video
from diffusers_far.training import train_folder
from diffusers_far.training.clips import Clips
from diffusers_far.training.objectives import FlowMatching
from diffusers_far.training.options import FAROptions, FrameOptions
from diffusers_far.training.sources import open_source
from diffusers_far.training.train_folder import (
    Cost,
    Plan,
    TrainOptions,
    choose_sizes,
    clip_frames,
    count_parameters,
    find_batch,
    measure_cost,
    read_plan,
    write_plan,
)
from tests.python_process import PythonProcess, run_python
from tests.tiny_models import autoencoder, pipeline, transformer
from tests.video_writing import numbered_frames, write_video

TINY = ["--size", "tiny", "--num-threads", "1", "--logging-steps", "1", "--clip-seconds", "1"]
TINY += ["--validation-seconds", "0"]  # continuing videos takes longer than all the rest


def moving_square(seed: int, num_frames: int, height: int, width: int) -> tuple[np.ndarray, list[int]]:
    """A square that goes left, stays or goes right: frames, and the action that led to each."""
    rng = np.random.default_rng(seed)
    colours, actions, x = rng.integers(0, 256, (2, 3), dtype=np.uint8), [], width // 2
    frames = np.tile(colours[0], (num_frames, height, width, 1))
    for frame in frames:
        actions.append(int(rng.integers(3)))
        x = min(width - 20, max(0, x + 4 * (actions[-1] - 1)))
        frame[20:40, x : x + 20] = colours[1]
    return frames, actions


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine videos with actions, of three sizes and rates; one is shorter than a clip."""
    folder = tmp_path_factory.mktemp("data") / "squares"
    rows = []
    for number in range(9):
        size = ((64, 64), (72, 96), (128, 80))[number % 3]
        frames, actions = moving_square(number, 3 if number == 5 else 14 + number, *size)
        write_video(folder / f"{number}.mp4", frames, rate=10)
        rows.append({"file_name": f"{number}.mp4", "actions": actions})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def tiny_autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("autoencoder")
    torch.manual_seed(0)
    autoencoder().save_pretrained(folder)
    return folder


def command(videos: Path, output: Path, *more: str) -> list[str]:
    words = ["-m", "diffusers_far.cli", "train", str(videos), "--output-dir", str(output)]
    return [*words, *TINY, *more]


def run(videos: Path, output: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return run_python(command(videos, output, *more), timeout=600)


# ----------------------------------------------------------------------------------------------------
# The whole way


def test_from_a_folder_to_a_model_that_plays(videos: Path, tiny_autoencoder: Path, tmp_path: Path) -> None:
    output = tmp_path / "my model"
    more = ("--autoencoder", str(tiny_autoencoder), "--max-train-steps", "4", "--validation-steps", "2")
    done = run(videos, output, *more, "--save-steps", "2", "--validation-seconds", "0.01")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"{videos}: 9 videos (mp4)"
    assert "frames of 64 x 64 to 128 x 80 pixels, 10 a second" in lines[1] and "with actions" in lines[1]
    assert lines[2] == "7 to train on, 2 held out for validation by a hash of their names"
    assert lines[3].startswith("model: FAR base, 1.") and lines[3].endswith("64 pixels, clips of 10 frames")
    assert lines[4].startswith("training: 4 steps of 8 clips, 320 frames in all; about ")
    assert lines[5].startswith(f"autoencoder: {tiny_autoencoder}, ") and "dB on" in lines[5]
    assert any("loss=" in line and "frames_per_second=" in line for line in lines)
    assert "1 of 7 videos in" in done.stderr and "shorter than a clip of 10 frames: 5" in done.stderr

    pipeline = FARVideoPipeline.from_pretrained(output / "pipeline")
    assert pipeline.transformer.config.num_actions == 3 and pipeline.config.num_training_frames == 10
    made = pipeline(video=str(videos / "0.mp4"), num_frames=15, actions=[1] * 14 + [2], num_inference_steps=2)
    assert len(made.frames[0]) == 15
    weights = FARVideoPipeline.from_pretrained(output / "pipeline").transformer.state_dict()
    averaged = type(pipeline.transformer).from_pretrained(output / "ema").state_dict()
    assert all(torch.equal(weights[name], averaged[name]) for name in averaged)
    card = (output / "pipeline/README.md").read_text()
    assert "# my model" in card and "- 4 steps of 8 clips of up to 10 frames" in card
    assert "- validation psnr 4: " in card and len(list((output / "samples").iterdir())) == 2
    assert "- next frame loss: " in card and f'from_pretrained("{output}/pipeline")' in card

    sample = read_video(output / "sample.mp4")
    assert len(sample) == 10 and "right 5 frames of context and 5 that the model makes" in lines[-1]
    assert sample.shape[2] > 2 * sample.shape[1] * 0.95  # two pictures beside one another
    again = run(videos, output, *more)
    assert again.returncode == 1 and "was used" in again.stderr and "resume_from=latest" in again.stderr


def test_ctrl_c_saves_and_says_how_to_go_on(videos: Path, tiny_autoencoder: Path, tmp_path: Path) -> None:
    more = ("--autoencoder", str(tiny_autoencoder), "--max-train-steps", "400", "--validation-steps", "0")
    process = PythonProcess(command(videos, tmp_path / "run", *more))
    process.wait_for_line("step=3 ")
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate(timeout=300)
    assert process.returncode == 130, errors
    last = said.splitlines()[-1]
    assert "and saved; to go on: diffusers-far train " in last and last.endswith("--resume-from latest")
    step = int(last.split("at step ")[1].split(",")[0])
    assert (tmp_path / f"run/checkpoint-{step:07d}").is_dir() and (tmp_path / "run/pipeline").is_dir()

    words = last.partition("diffusers-far train ")[2]
    words = words.replace("--max-train-steps 400", f"--max-train-steps {step + 2}")
    resumed = run_python(["-m", "diffusers_far.cli", "train", *shlex.split(words)], timeout=600)
    assert resumed.returncode == 0, resumed.stderr
    assert f"step={step + 1} " in resumed.stdout and "step=1 " not in resumed.stdout
    assert (tmp_path / "run/sample.mp4").is_file()


def test_a_new_autoencoder_is_trained_and_measured(videos: Path, tmp_path: Path) -> None:
    more = ("--autoencoder", "new", "--autoencoder-steps", "2", "--max-train-steps", "1")
    done = run(
        videos, tmp_path / "run", *more, "--validation-steps", "0", "--batch-size", "2", "--stride", "2"
    )
    assert done.returncode == 0, done.stderr
    assert "autoencoder: training a new one for 2 steps" in done.stdout
    assert "autoencoder: the new one has " in done.stdout
    plan = json.loads((tmp_path / "run/plan.json").read_text())
    assert plan["autoencoder"] == "autoencoder/autoencoder" and plan["batch_size"] == 2
    assert not (tmp_path / "run/frames").exists()

    moved = tmp_path / "elsewhere/moved"
    moved.parent.mkdir()
    (tmp_path / "run").rename(moved)
    more = ("--autoencoder", "new", "--max-train-steps", "2", "--resume-from", "latest")
    done = run(videos, moved, *more, "--validation-steps", "0", "--stride", "2")
    assert done.returncode == 0, done.stderr
    assert "step=2 " in done.stdout and "step=1 " not in done.stdout and "training a new" not in done.stdout
    assert (moved / "pipeline/vae/config.json").is_file() and not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------------------------
# Fine-tuning


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base pipeline with three actions, of 64 x 64 pixels."""
    folder = tmp_path_factory.mktemp("trained")
    model = transformer(num_actions=3, patch_size=2)
    names = ["left", "stay", "right"]
    pipeline(model, action_names=names, num_training_frames=8, flex_rope_slope=0.25).save_pretrained(folder)
    return folder


def fine_tune(videos: Path, trained: Path, output: Path, *more: str) -> int:
    words = ["--pretrained", str(trained), "--output-dir", str(output), "--max-train-steps", "2"]
    words += ["--num-threads", "1", "--batch-size", "2", "--validation-steps", "0", "--logging-steps", "1"]
    return train_folder.main([str(videos), *words, *more])


def test_a_lora_of_a_pipeline(
    videos: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    assert fine_tune(videos, trained, output, "--lora-rank", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[3] == f"fine-tuning: {trained}, by a LoRA of rank 2; the model stays as it is"
    assert lines[4] == "  actions: taken for the 3 of the model: 0 left, 1 stay, 2 right"
    assert lines[5].startswith("model: FAR base, ") and lines[5].endswith("64 pixels, clips of 8 frames")
    assert lines[7].startswith(f"autoencoder: {trained}/vae, ")
    assert f"{output}/lora: a LoRA for {trained}, after 2 steps" in lines
    assert not (output / "pipeline").exists() and (output / "sample.mp4").is_file()
    pipe = FARVideoPipeline.from_pretrained(trained)
    pipe.load_lora_weights(output / "lora")
    assert len(pipe(num_frames=2, actions=[0, 2]).frames[0]) == 2
    card = (output / "lora/README.md").read_text()
    assert "9 videos (mp4)" in card and f'load_lora_weights("{output}/lora")' in card


def test_a_base_model_of_other_actions_becomes_a_long_one_of_another_size(
    videos: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of it at once: names of actions, long-term frames, frames of another size."""
    folder = tmp_path / "base"
    shutil.copytree(trained, folder)
    config = json.loads((folder / "transformer/config.json").read_text()) | {"short_window": 4}
    (folder / "transformer/config.json").write_text(json.dumps(config))
    more = ("--action-names", "right", "left", "jump", "--resolution", "96x64", "--clip-seconds", "1")
    assert fine_tune(videos, folder, tmp_path / "run", *more) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[3:7] == [
        f"fine-tuning: {folder}, all weights",
        "  actions: kept from the model: right, left; made anew: jump",
        "  long-term frames: new; their projections start as those of short-term frames",
        "  frames: of 96x64 pixels; the model was trained on 64",
    ]
    assert lines[7].startswith("model: FAR Long, window of 4 frames, ")
    pipe = FARVideoPipeline.from_pretrained(tmp_path / "run/pipeline")
    assert pipe.transformer.config.long_patch_size == 4 and pipe.default_size == (96, 64)
    assert pipe.config.action_names == ["right", "left", "jump"]
    # What else is known of the pipeline stays.
    assert (pipe.config.flex_rope_slope, pipe.config.num_inference_steps) == (0.25, 3)
    assert pipe.config.num_training_frames == 10
    card = (tmp_path / "run/pipeline/README.md").read_text()
    assert f"Fine-tuned from {folder} with `diffusers-far train`." in card


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--size", "tiny"], "size='tiny': pretrained='.*' has its own, which stays"),
        (["--autoencoder", "new"], "autoencoder='new': pretrained='.*' has its own, which stays"),
        (["--resolution", "72"], "takes multiples of 2 x 2 latents; the resolution gives 9 x 9"),
        (["--lora-rank", "0"], "lora_rank=0 must be an integer of at least 1"),
        (["--lora-rank", "2", "--clip-seconds", "1"], "lora_rank=2: .* would be changed: long-term frames"),
        (["--lora-rank", "2", "--ignore-actions"], "lora_rank=2: .* actions: none any more"),
        (["--ignore-actions", "--action-names", "a"], "action_names=.*: the videos have no actions"),
    ],
)
def test_what_does_not_go_with_a_pretrained_model_is_named(
    videos: Path, trained: Path, tmp_path: Path, more: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fine_tune(videos, trained, tmp_path / "run", *more)
    with pytest.raises(ValueError, match="is a transformer alone; it takes a pipeline"):
        fine_tune(videos, trained / "transformer", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_bar_on_a_terminal(videos: Path, tiny_autoencoder: Path, tmp_path: Path) -> None:
    """With the time that is left, the loss and frames a second; of a run in minutes, too."""
    more = ("--autoencoder", str(tiny_autoencoder), "--max-minutes", "0.05", "--validation-steps", "0")
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("4H", 40, 120, 0, 0))
    process = subprocess.Popen(
        [sys.executable, *command(videos, tmp_path / "run", *more)], stdout=end, stderr=end
    )
    os.close(end)
    shown = b""
    while True:
        try:
            chunk = os.read(terminal, 4096)
        except OSError:  # the end, on Linux
            break
        if not chunk:
            break
        shown += chunk
    assert process.wait(timeout=300) == 0, shown.decode()
    text = shown.decode()
    assert "100%|" in text and " left, loss " in text and " frames/s" in text and "step 2, " in text


def test_a_dry_run_prints_the_plan_within_seconds_and_leaves_nothing(videos: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    done = run(videos, tmp_path / "run", "--dry-run", "--max-minutes", "30")
    seconds = time.monotonic() - began
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 5
    assert done.stdout.splitlines()[-1].startswith("training: ") and "about 30 min" in done.stdout
    assert not (tmp_path / "run").exists()
    assert seconds < 60  # 6 s where nothing else runs


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--resolution", "60"], "resolution='60': the autoencoder takes multiples of 8 pixels"),
        (["--resolution", "72"], "size='tiny' has patches of 2 x 2 latents; the resolution gives 9 x 9"),
        (
            ["--autoencoder", "gone"],
            "autoencoder='gone' must be a folder with config.json, or auto, shipped or new",
        ),
        (["--batch-size", "-1"], "batch_size=-1 must be an integer of at least 0"),
        (["--action-names", "left", "right"], "['left', 'right'] are 2; the videos have actions up to 2"),
    ],
)
def test_mistakes_are_named_before_anything_is_done(
    videos: Path, tmp_path: Path, more: list[str], message: str
) -> None:
    with pytest.raises(ValueError) as error:
        train_folder.main([str(videos), "--output-dir", str(tmp_path / "run"), *TINY, *more])
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------------------------
# The plan


def options(**values: object) -> TrainOptions:
    return TrainOptions(**{"output_dir": "nowhere", **values})  # type: ignore[arg-type]


def test_the_length_of_clips(tmp_path: Path) -> None:
    for number, length in enumerate((6, 9, 12, 40, 50)):
        write_video(tmp_path / f"train/{number}.mp4", numbered_frames(length), rate=20)
    write_video(tmp_path / "validation/a.mp4", numbered_frames(4))
    source = open_source(tmp_path)
    assert clip_frames(source, options()) == 12  # as half of them have
    assert clip_frames(source, options(stride=2)) == 6
    assert clip_frames(source, options(fps=10.0)) == 6
    assert clip_frames(source, options(clip_seconds=0.4)) == 8
    assert clip_frames(source, options(clip_seconds=0.4, fps=10.0)) == 4
    np.savez(tmp_path / "x.npz", video=numbered_frames(100))
    (tmp_path / "other").mkdir()
    (tmp_path / "x.npz").rename(tmp_path / "other/x.npz")
    other = open_source(tmp_path / "other")
    assert clip_frames(other, options()) == train_folder.MOST_CLIP_FRAMES
    with pytest.raises(ValueError, match=r"clip_seconds=2: the videos do not state their frames per second"):
        clip_frames(other, options(clip_seconds=2.0))


def test_long_clips_take_a_long_model() -> None:
    assert "long_patch_size" not in choose_sizes("small", 16, (8, 8))
    long = choose_sizes("small", 17, (8, 8))
    assert (long["long_patch_size"], long["patch_size"], long["short_window"]) == (4, 2, 8)
    assert "long_patch_size" not in choose_sizes("small", 32, (6, 6))  # larger patches do not fit
    assert 120e6 < count_parameters(choose_sizes("base", 16, (8, 8)), 32) < 140e6  # FAR-B: 130 million


def test_the_batch_is_what_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_folder, "free_memory", lambda: 1_000_000_000)
    assert find_batch(Cost(20e6, 1.0), 1_000_000, 1000) == 16  # 480 MB are left: 24 clips
    assert find_batch(Cost(1e3, 1.0), 1_000_000, 1000) == 32
    assert find_batch(Cost(1e3, 1.0), 1_000_000, 5) == 4  # no more clips than there are
    with pytest.raises(ValueError, match=r"a batch of one clip takes 0\.6 GB of memory; 1\.0 GB are free"):
        find_batch(Cost(600e6, 1.0), 1_000_000, 1000)


def test_the_plan_finds_its_autoencoder_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("run/own", "other", "moved"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)

    def kept(autoencoder: str, output: str = "run") -> tuple[str, str]:
        plan = Plan(autoencoder, {"num_layers": 1}, 4, 2)
        write_plan(Path("run"), plan)
        (Path("run") / "plan.json").rename(Path(output) / "plan.json.moved")
        (Path(output) / "plan.json.moved").rename(Path(output) / "plan.json")
        written = json.loads((Path(output) / "plan.json").read_text())["autoencoder"]
        read = read_plan(Path(output))
        assert read is not None and (read.sizes, read.num_frames) == ({"num_layers": 1}, 4)
        return written, read.autoencoder

    assert kept("run/own") == kept(str(tmp_path / "run/own")) == ("own", "run/own")
    assert kept("other") == ("other", "other")  # as given
    assert kept(str(tmp_path / "other")) == (str(tmp_path / "other"), str(tmp_path / "other"))
    (tmp_path / "moved/own").mkdir()
    assert kept("run/own", "moved") == ("own", "moved/own")
    assert read_plan(tmp_path / "other") is None


def test_memory_is_measured_as_it_is_used() -> None:
    """What two blocks tell of six is what six take; and a clip twice as long takes twice as much or more."""
    sizes = choose_sizes("tiny", 8, (8, 8))
    costs = {layers: measure_cost({**sizes, "num_layers": layers}, 4, (8, 8), 8) for layers in (2, 6)}
    whole = measured_memory({**sizes, "num_layers": 6}, 8)
    assert costs[6].memory == pytest.approx(whole, rel=0.05)
    assert costs[2].memory < 0.5 * costs[6].memory
    assert measure_cost(sizes, 4, (8, 8), 16).memory > 1.9 * measure_cost(sizes, 4, (8, 8), 8).memory
    assert costs[2].seconds > 0


def test_memory_with_gradient_checkpointing() -> None:
    """Inputs of all blocks, and all that one block takes."""
    sizes = choose_sizes("tiny", 32, (8, 8)) | {"num_layers": 6}
    assert "long_patch_size" in sizes
    cost = measure_cost(sizes, 4, (8, 8), 32, gradient_checkpointing=True)
    plain = {layers: measure_cost({**sizes, "num_layers": layers}, 4, (8, 8), 32) for layers in (1, 6)}
    inputs: list[int] = []

    def keep(block: torch.nn.Module, arguments: tuple) -> None:
        inputs.append(sum(stream.numel() * stream.element_size() for stream in arguments[0]))

    model, clips = (
        FARTransformer3DModel(in_channels=4, **sizes),
        Clips(torch.zeros(1, 32, 4, 8, 8), 8, None, None, ("",)),
    )
    for block in model.transformer_blocks:
        block.register_forward_pre_hook(keep)
    FlowMatching(model).loss(clips, torch.Generator().manual_seed(0))
    assert len(inputs) == 6
    assert cost.memory == pytest.approx(plain[1].memory + sum(inputs[1:]), rel=0.02)
    assert cost.memory < 0.4 * plain[6].memory


def measured_memory(sizes: dict, num_frames: int) -> float:
    """Bytes that all blocks together keep for the backward pass."""
    model = FARTransformer3DModel(in_channels=4, **sizes)
    clips = Clips(torch.zeros(1, num_frames, 4, 8, 8), num_frames, None, None, ("",))
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = FlowMatching(model).loss(clips, torch.Generator().manual_seed(0))
    assert loss.requires_grad
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    return sum(size for address, size in kept.items() if address not in weights)


def test_options_are_those_of_the_scripts() -> None:
    given = options(fps=5.0, max_minutes=2.0, learning_rate=1e-3)
    assert given.max_train_steps is None
    assert FrameOptions(**given.shared(FrameOptions)).fps == 5
    shared = given.shared(FAROptions)
    assert shared["max_minutes"] == 2 and shared["learning_rate"] == 1e-3
    assert options().max_train_steps == 10_000
    with pytest.raises(ValueError, match="pretrained=None: lora_rank=8 takes the model to adapt"):
        options(lora_rank=8)
