"""`training/train_autoencoder.py` on videos of moving squares, with a model of a few thousand parameters."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC

from diffusers_far import read_video
from diffusers_far.metrics import sharpness
from diffusers_far.training import train_autoencoder as script
from diffusers_far.training.episodes import Episode, Episodes, RecordedVideo, load_frames
from diffusers_far.training.options import AutoencoderOptions, FrameOptions, parse
from diffusers_far.training.sources import open_source
from tests.python_process import run_python

CPU = torch.device("cpu")


def moving_square(seed: int) -> np.ndarray:
    """uint8 [12, 32, 32, 3]: a coloured square that crosses a coloured background."""
    generator = np.random.default_rng(seed)
    background, square = generator.integers(0, 256, size=(2, 3), dtype=np.uint8)
    frames = np.tile(background, (12, 32, 32, 1))
    for t, frame in enumerate(frames):
        frame[8:20, t : t + 12] = square
    return frames


def write_video(file: Path, frames: np.ndarray) -> None:
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=15, options={"crf": "4"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv444p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A videofolder of three training videos and one for validation."""
    folder = tmp_path_factory.mktemp("set") / "squares"
    for split, seeds in {"train": range(3), "validation": range(3, 4)}.items():
        (folder / split).mkdir(parents=True)
        lines = []
        for seed in seeds:
            write_video(folder / split / f"{seed:05d}.mp4", moving_square(seed))
            lines.append(json.dumps({"file_name": f"{seed:05d}.mp4", "actions": [seed] * 12}))
        (folder / split / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def tiny_run(data: Path, output: Path, **changes: object) -> AutoencoderOptions:
    values = {
        "latent_channels": 4,
        "block_out_channels": [8, 16],
        "layers_per_block": [0, 1],
        "max_train_steps": 4,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "ema_decay": 0.9,
        "latent_noise": 0.05,
        "equivariance_probability": 0.25,
    }
    return AutoencoderOptions(**{"data": str(data), "output_dir": str(output), **values, **changes})


def train(data: Path, output: Path, **changes: object) -> bool:
    return script.AutoencoderTrainer(tiny_run(data, output, **changes)).train()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoencoderDC.from_pretrained(folder / "autoencoder").state_dict()


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of a run that is long enough to learn something."""
    output = tmp_path_factory.mktemp("trained")
    train(data, output, max_train_steps=80)
    return output


def frames_of(data: Path, split: str) -> np.ndarray:
    return np.array(load_frames(open_source(data).split(split), f"{data}.cache", FrameOptions()))


def test_training_lowers_the_loss(data: Path, trained: Path, tmp_path: Path) -> None:
    inputs = script.to_input(frames_of(data, "train"), CPU)
    before = script.build_autoencoder(tiny_run(data, tmp_path))
    after = AutoencoderDC.from_pretrained(trained / "autoencoder")
    with torch.no_grad():
        loss_before, loss_after = (
            script.pixel_loss(script.Reconstruction(model, 0.0)(inputs), inputs, 0.5)
            for model in (before, after)
        )
    assert loss_after < 0.4 * loss_before


def test_transformed_latents_are_decoded_to_transformed_frames(data: Path, tmp_path: Path) -> None:
    """An autoencoder that only changes the size of smooth frames makes nearly the same of both."""

    class Resize(torch.nn.Module):
        def encode(self, frames: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(latent=torch.nn.functional.avg_pool2d(frames, 2))

        def decode(self, latents: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(sample=torch.nn.functional.interpolate(latents, scale_factor=2))

    frames = script.to_input(frames_of(data, "train")[:4], CPU)
    frames = torch.nn.functional.interpolate(frames, size=8)  # no details smaller than a latent
    frames = torch.nn.functional.interpolate(frames, size=32, mode="bilinear")
    model = script.Reconstruction(Resize(), 0.0)
    for mirrored in (False, True):
        transform = script.Transform(10, 12, mirrored)
        decoded = model(frames, None, transform)
        assert decoded.shape == transform(frames, 2).shape == (4, 3, 20, 24)
        error, error_of_the_other = (
            (decoded - expected).abs().mean()
            for expected in (transform(frames, 2), script.Transform(10, 12, not mirrored)(frames, 2))
        )
        assert error < 0.3 * error_of_the_other


def test_transforms_are_drawn_as_often_as_told(data: Path, tmp_path: Path) -> None:
    options = tiny_run(data, tmp_path, equivariance_probability=0.4)
    drawn = [script.draw_transform((16, 8), options, index, 0) for index in range(1000)]
    transforms = [transform for transform in drawn if transform is not None]
    assert 350 < len(transforms) < 450
    assert {transform.height for transform in transforms} == set(range(8, 17))
    assert {transform.width for transform in transforms} == {4, 5, 6, 7, 8}
    assert 150 < sum(transform.mirrored for transform in transforms) < 250
    assert drawn[:20] == [script.draw_transform((16, 8), options, index, 0) for index in range(20)]
    none = tiny_run(data, tmp_path, equivariance_probability=0)
    assert not any(script.draw_transform((16, 8), none, index, 0) for index in range(100))


def test_output_is_in_the_convention_of_the_pipeline(data: Path, trained: Path) -> None:
    autoencoder = AutoencoderDC.from_pretrained(trained / "autoencoder")
    frames = frames_of(data, "train")
    frame, scale = torch.tensor(frames / 255).movedim(-1, 1).float(), autoencoder.config.scaling_factor
    with torch.no_grad():
        latents = autoencoder.encode(2 * frame - 1).latent * scale
        decoded = (autoencoder.decode(latents / scale).sample / 2 + 0.5).clamp(0, 1)
    # All 36 training frames are in the sample that scaling_factor is measured on.
    assert latents.std().item() == pytest.approx(1, abs=1e-4)
    psnr = -10 * (decoded - frame).square().mean(dim=(1, 2, 3)).log10().mean().item()
    measured, sharp = script.measure(autoencoder, frames, CPU)
    assert measured == pytest.approx(psnr, abs=0.01)
    assert sharp == pytest.approx(sharpness(decoded) / sharpness(frame), abs=0.001)


def test_resumed_run_equals_an_unbroken_one(data: Path, tmp_path: Path) -> None:
    unbroken, resumed = tmp_path / "unbroken", tmp_path / "resumed"
    train(data, unbroken, max_train_steps=6, save_steps=3)
    # What an interruption after step 3 leaves behind, in the middle of writing another checkpoint.
    shutil.copytree(unbroken / "checkpoint-0000003", resumed / "checkpoint-0000003")
    (resumed / "checkpoint-0000006.old").mkdir()
    train(data, resumed, max_train_steps=6, save_steps=3, resume_from="latest")
    expected, got = weights(unbroken), weights(resumed)
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    kept = ["checkpoint-0000003", "checkpoint-0000006", "checkpoint-0000006.old"]
    assert sorted(path.name for path in resumed.glob("checkpoint-*")) == kept


def test_frozen_encoder_keeps_latents_valid(data: Path, trained: Path, tmp_path: Path) -> None:
    init_from = str(trained / "autoencoder")
    train(data, tmp_path, init_from=init_from, freeze_encoder=True)
    before = AutoencoderDC.from_pretrained(init_from)
    after = AutoencoderDC.from_pretrained(tmp_path / "autoencoder")
    assert after.config.scaling_factor == before.config.scaling_factor
    inputs = script.to_input(frames_of(data, "validation"), CPU)
    with torch.no_grad():
        assert torch.equal(after.encode(inputs).latent, before.encode(inputs).latent)
    assert not torch.equal(after.decoder.conv_in.weight, before.decoder.conv_in.weight)


ADVERSARIAL = {"perceptual_loss_weight": 1.0, "adversarial_loss_weight": 0.5, "discriminator_downsamples": 1}


def test_perceptual_loss_brings_reconstructions_nearer_in_lpips(
    data: Path, trained: Path, tmp_path: Path
) -> None:
    inputs = script.to_input(frames_of(data, "train"), CPU)
    stage = {"init_from": str(trained / "autoencoder"), "freeze_encoder": True, "max_train_steps": 40}
    distances = []
    for weight in (0.0, 5.0):
        output = tmp_path / str(weight)
        train(data, output, learning_rate=2e-3, perceptual_loss_weight=weight, **stage)
        autoencoder = AutoencoderDC.from_pretrained(output / "autoencoder")
        with torch.no_grad():
            decoded = script.Reconstruction(autoencoder, 0.0)(inputs)
            distances.append(script.LPIPS("vgg16")(decoded, inputs).mean())
    assert distances[1] < 0.9 * distances[0]


def test_adversarial_run_resumes_as_if_unbroken(data: Path, trained: Path, tmp_path: Path) -> None:
    """The discriminator and its optimizer belong to the state of a run."""
    stage = {
        "init_from": str(trained / "autoencoder"),
        "freeze_encoder": True,
        "max_train_steps": 4,
        "save_steps": 2,
    }
    unbroken, resumed = tmp_path / "unbroken", tmp_path / "resumed"
    train(data, unbroken, **stage, **ADVERSARIAL)
    shutil.copytree(unbroken / "checkpoint-0000002", resumed / "checkpoint-0000002")
    train(data, resumed, resume_from="latest", **stage, **ADVERSARIAL)
    expected, got = weights(unbroken), weights(resumed)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_discriminator_changes_what_is_learned(data: Path, trained: Path, tmp_path: Path) -> None:
    stage = {"init_from": str(trained / "autoencoder"), "freeze_encoder": True, "learning_rate": 1e-3}
    for name, adversary in (("without", {}), ("with", ADVERSARIAL | {"perceptual_loss_weight": 0.0})):
        train(data, tmp_path / name, **stage, **adversary)
    plain, adversarial = weights(tmp_path / "without"), weights(tmp_path / "with")
    assert all(torch.equal(plain[name], adversarial[name]) for name in plain if name.startswith("encoder"))
    assert not torch.equal(plain["decoder.conv_in.weight"], adversarial["decoder.conv_in.weight"])


def test_batches_depend_on_step_process_and_seed_only(data: Path, tmp_path: Path) -> None:
    frames, arguments = np.arange(10_000), tiny_run(data, tmp_path)
    draws = [script.draw_batch(frames, arguments, step, process) for step in (0, 1) for process in (0, 1)]
    assert np.array_equal(draws[0], script.draw_batch(frames, arguments, 0, 0))
    assert len({tuple(draw) for draw in draws}) == 4


def test_gradient_loss_is_that_of_the_finite_differences(data: Path, tmp_path: Path) -> None:
    inputs = script.to_input(frames_of(data, "train")[:4], CPU)
    with torch.no_grad():
        decoded = script.Reconstruction(script.build_autoencoder(tiny_run(data, tmp_path)), 0.0)(inputs)
        loss = script.pixel_loss(decoded, inputs, 0.3)
    expected = (decoded - inputs).abs().mean()
    for dim in (-1, -2):
        expected += 0.3 * (decoded.diff(dim=dim) - inputs.diff(dim=dim)).abs().mean()
    torch.testing.assert_close(loss, expected)


def test_loss_that_is_not_finite_stops_with_the_step(data: Path, tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"step \d: (loss|norm of the gradient) is (nan|inf)"):
        train(data, tmp_path, learning_rate=1e30, max_train_steps=9, warmup_steps=0)
    assert not (tmp_path / "autoencoder").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_noise": -0.1}, "latent_noise=-0.1 must be a number of at least 0"),
        ({"perceptual_loss_weight": math.nan}, "perceptual_loss_weight=nan must be a number of at least 0"),
        ({"discriminator_downsamples": 0}, "discriminator_downsamples=0 must be an integer of at least 1"),
        ({"ema_decay": 1.0}, r"ema_decay=1.0 must be a number in \[0, 1\)"),
        (
            {"layers_per_block": [1]},
            r"layers_per_block=\[1\] takes one number for each of block_out_channels",
        ),
        ({"freeze_encoder": True}, "init_from=None: freeze_encoder takes the folder of an autoencoder"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_run(Path("data"), Path("output"), **changes)


def test_frames_that_the_autoencoder_cannot_halve_are_named(data: Path, tmp_path: Path) -> None:
    sizes = {"block_out_channels": [8] * 7, "layers_per_block": [0] * 7}
    with pytest.raises(ValueError, match="squares has frames of 32 x 32 pixels; it takes multiples of 64"):
        script.AutoencoderTrainer(tiny_run(data, tmp_path, **sizes))


def test_a_run_goes_on_with_the_same_frames_only(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "run", max_train_steps=1)
    other = shutil.copytree(data, tmp_path / "other")
    write_video(other / "train/00000.mp4", moving_square(8))
    with pytest.raises(ValueError, match="was trained with other data"):
        train(other, tmp_path / "run", resume_from="latest")


def test_shipped_recipes_are_valid(repository: Path) -> None:
    names = ("autoencoder_doom_maze.yaml", "autoencoder_doom_maze_decoder.yaml")
    recipes = (str(repository / "training/recipes" / name) for name in names)
    first, second = (parse([recipe], (AutoencoderOptions,), None)[0] for recipe in recipes)
    assert script.build_autoencoder(first).spatial_compression_ratio == 8
    assert second.init_from == f"{first.output_dir}/autoencoder" and second.freeze_encoder


def test_script_runs_from_the_command_line(data: Path, repository: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "block_out_channels: [8, 16]\nlayers_per_block: [0, 1]\nlatent_channels: 4\nmax_train_steps: 9\n"
    )
    command = ["-m", "training.train_autoencoder", str(recipe), "--data", str(data)]
    command += ["--output-dir", str(tmp_path / "run"), "--max-train-steps", "2", "--num_threads", "1"]
    command += ["--validation_steps", "1", "--gradient_accumulation_steps", "2"]
    result = run_python(command, repository)
    assert result.returncode == 0, result.stderr
    assert "validation_psnr=" in result.stdout
    assert (tmp_path / "run/checkpoint-0000002").is_dir()
    assert AutoencoderDC.from_pretrained(tmp_path / "run/autoencoder").config.latent_channels == 4


def decode(videos: list[Path], cache: Path) -> np.ndarray:
    episodes = Episodes.of([Episode(video.stem, RecordedVideo(video)) for video in videos], [])
    return load_frames(episodes, cache, FrameOptions())


def test_frames_are_decoded_once_and_anew_when_a_video_changes(tmp_path: Path) -> None:
    videos = [tmp_path / "a.mp4", tmp_path / "b.mp4"]
    for seed, video in enumerate(videos):
        write_video(video, moving_square(seed))
    frames = decode(videos, tmp_path / "cache")
    assert isinstance(frames, np.memmap) and frames.shape == (24, 32, 32, 3)
    assert np.array_equal(frames[12:], read_video(videos[1]))
    assert np.abs(frames[:12].astype(int) - moving_square(0)).mean() < 4  # the codec is nearly lossless
    decode(videos, tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 1
    write_video(videos[1], moving_square(7)[:5])
    assert len(decode(videos, tmp_path / "cache")) == 17


def test_corrupt_video_is_named_and_leaves_no_cache(tmp_path: Path) -> None:
    write_video(tmp_path / "good.mp4", moving_square(0))
    (tmp_path / "broken.mp4").write_bytes((tmp_path / "good.mp4").read_bytes()[:300])
    with pytest.raises(ValueError, match=r"broken\.mp4.* cannot be read as a video"):
        decode([tmp_path / "good.mp4", tmp_path / "broken.mp4"], tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_videos_of_different_sizes_are_refused(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", moving_square(0))
    write_video(tmp_path / "b.mp4", moving_square(1)[:, :16])
    with pytest.raises(ValueError, match=r"b\.mp4: frames of \(16, 32, 3\).* has \(32, 32, 3\)"):
        decode([tmp_path / "a.mp4", tmp_path / "b.mp4"], tmp_path / "cache")
