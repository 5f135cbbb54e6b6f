"""Continuations of held-out videos while a model trains."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderDC
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffusers_far import FARTransformer3DModel, FARVideoPipeline, read_video
from diffusers_far.training.clips import LatentVideos
from diffusers_far.training.make_pipeline import make_scheduler
from diffusers_far.training.options import FAROptions, ModelOptions, parse
from diffusers_far.training.train_far import FARTrainer
from diffusers_far.training.validation_samples import ValidationSamples
from tests.tiny_latents import LONG, averaged_weights, read_log, run_options, write_latents
from tests.tiny_models import AUTOENCODER
from tests.training.processes import finish, start

FRAMES = 10  # of a clip: five given, five predicted


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_latents(tmp_path_factory.mktemp("latents"))


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae")
    save_autoencoder(folder, 2)
    return folder


def save_autoencoder(folder: Path, channels: int) -> None:
    torch.manual_seed(0)
    AutoencoderDC(**{**AUTOENCODER, "latent_channels": channels}).save_pretrained(folder)


def options(latents: Path, output: Path, vae: Path, *more: str) -> list[str]:
    samples = ["--autoencoder", str(vae), "--validation_seconds", "60", "--validation_steps", "3"]
    return run_options(latents, output, *LONG, "--num_frames", str(FRAMES), *samples, *more)


def train(command: list[str]) -> FARTrainer:
    trainer = FARTrainer(*parse(command, (ModelOptions, FAROptions), None))
    assert trainer.train()
    return trainer


def test_files_numbers_and_tracker(latents: Path, tmp_path: Path, vae: Path) -> None:
    output = tmp_path / "run"
    train(options(latents, output, vae, "--report_to", "tensorboard"))
    files = sorted((output / "samples").iterdir())
    assert [file.name for file in files] == [
        f"step-{step:07d}-{name}.mp4" for step in (3, 6) for name in ("00000", "00001")
    ]
    video = read_video(files[-1])
    assert len(video) == FRAMES and video.shape[2] >= 2 * video.shape[1]

    measured = [line for line in read_log(output) if "validation_loss" in line]
    assert [line["validation_samples"] for line in measured] == [2, 2]
    # Once more, by a pipeline of the weights that the run left.
    model = FARTransformer3DModel.from_pretrained(output / "ema")
    pipe = FARVideoPipeline(model, AutoencoderDC.from_pretrained(vae), make_scheduler("Euler"))
    pipe.set_progress_bar_config(disable=True)
    videos = LatentVideos(latents / "validation")
    errors = []
    for index in range(2):
        whole, actions = videos.clip(index, 0, FRAMES)[None], videos.actions[index][None, :FRAMES]
        frames = pipe(
            video_latents=whole[:, :5],
            num_frames=FRAMES,
            actions=actions,
            num_inference_steps=25,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).frames
        truth = (pipe.decode_latents(whole[0]) / 2 + 0.5).clamp(0, 1)
        errors.append((frames[0] - truth).square().mean(dim=(1, 2, 3)))
    quality = (-10 * torch.stack(errors).log10()).mean(dim=0)
    assert measured[-1]["validation_psnr_1"] == pytest.approx(quality[5].item(), rel=1e-3)
    assert measured[-1]["validation_psnr_4"] == pytest.approx(quality[8].item(), rel=1e-3)
    assert "validation_psnr_16" not in measured[-1]

    events = EventAccumulator(str(next((output / "far").rglob("events.*")).parent)).Reload()
    assert "validation_psnr_4" in events.Tags()["scalars"]
    assert [event.step for event in events.Images("samples/00000")] == [3, 6]


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_videos_in_trackers(
    latents: Path, tmp_path: Path, vae: Path, monkeypatch: pytest.MonkeyPatch, tracker: str
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip(tracker, reason=f"needs {tracker}, which is not among the requirements")
    train(options(latents, tmp_path / "run", vae, "--report_to", tracker))
    kept = [file for file in tmp_path.rglob("*.mp4") if not file.is_relative_to(tmp_path / "run")]
    assert len(kept) == 4


def test_a_run_with_samples_resumes_to_the_same_weights(latents: Path, tmp_path: Path, vae: Path) -> None:
    unbroken, resumed, without = tmp_path / "unbroken", tmp_path / "resumed", tmp_path / "without"
    train(options(latents, unbroken, vae))
    train(options(latents, resumed, vae, "--max_train_steps", "6", "--save_steps", "3"))
    for folder in ("checkpoint-0000006", "ema"):
        (resumed / folder).rename(tmp_path / folder)
    train(options(latents, resumed, vae, "--resume_from", "latest"))
    train(options(latents, without, vae, "--validation_seconds", "0"))
    expected = averaged_weights(unbroken)
    for output in (resumed, without):
        assert all(torch.equal(value, expected[name]) for name, value in averaged_weights(output).items())
    assert not (without / "samples").exists()


def test_time_that_is_over_still_leaves_one_sample(latents: Path, tmp_path: Path, vae: Path) -> None:
    train(options(latents, tmp_path / "run", vae, "--validation_seconds", "1e-9"))
    measured = [line for line in read_log(tmp_path / "run") if "validation_loss" in line]
    assert [line["validation_samples"] for line in measured] == [1, 1]


@pytest.mark.parametrize("script", ["training.train_far", "tests.training.train_far_sharded"])
def test_two_processes_measure_what_one_does(
    latents: Path, tmp_path: Path, vae: Path, repository: Path, script: str
) -> None:
    train(options(latents, tmp_path / "one", vae))
    two = options(latents, tmp_path / "two", vae, "--batch_size", "1")
    processes = start(["-m", script, *two], 2, repository)
    said = finish(processes)
    assert [process.returncode for process in processes] == [0, 0], said
    one, other = (
        [line for line in read_log(tmp_path / name) if "validation_loss" in line] for name in ("one", "two")
    )
    for line, expected in zip(other, one, strict=True):
        assert line["validation_psnr_4"] == pytest.approx(expected["validation_psnr_4"], rel=1e-3)


def test_mistakes(latents: Path, tmp_path: Path, vae: Path) -> None:
    command = options(latents, tmp_path / "run", vae)
    at = command.index("--autoencoder")
    with pytest.raises(ValueError, match="autoencoder=None: validation_seconds=60 takes the folder of the"):
        train([*command[:at], *command[at + 2 :]])
    with pytest.raises(ValueError, match=r"validation_seconds=-1\.0 must be a number of at least 0"):
        train(options(latents, tmp_path / "run", vae, "--validation_seconds", "-1"))
    save_autoencoder(tmp_path / "other", 4)
    with pytest.raises(ValueError, match=r"autoencoder=.*other.*train was encoded by another autoencoder"):
        train(options(latents, tmp_path / "run", tmp_path / "other"))
    videos = LatentVideos(latents / "validation")
    with pytest.raises(ValueError, match="validation_seconds: clips of one frame"):
        ValidationSamples(videos, 1, 1.0, tmp_path, 0)
