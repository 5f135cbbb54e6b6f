"""training/recipes/published/: what the recipes say, and a step of each in a small copy."""

from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC
from safetensors.torch import save_file

from diffusers_far import FARTransformer3DModel
from diffusers_far.presets import PRESETS, AutoencoderConfig, autoencoder_config, preset
from diffusers_far.training import train_autoencoder
from diffusers_far.training.options import AutoencoderOptions, FAROptions, ModelOptions, parse
from diffusers_far.training.train_autoencoder import AutoencoderTrainer
from diffusers_far.training.train_far import FARTrainer
from tests.python_process import run_python
from tests.tiny_latents import read_log

SMALL = ["--num-layers", "1", "--num-attention-heads", "1", "--attention-head-dim", "16"]
SMALL += ["--axes-dims-rope", "4", "6", "6", "--short-window", "3", "--num-frames", "4", "--batch-size", "2"]
SMALL += ["--max-train-steps", "1", "--logging-steps", "1", "--num-threads", "1"]
# A process has one number format, which other tests share with these.
FLOAT32 = ["--mixed-precision", "no"]


@pytest.fixture
def published(repository: Path) -> Path:
    return repository / "training/recipes/published"


def parse_far(*words: str) -> tuple[ModelOptions, FAROptions]:
    return parse(words, (ModelOptions, FAROptions), None)


def parse_autoencoder(*words: str) -> AutoencoderOptions:
    return parse(words, (AutoencoderOptions,), None)[0]


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three short videos with all that may condition a model."""
    folder = tmp_path_factory.mktemp("latents")
    generator = torch.Generator().manual_seed(0)
    for split, number in (("train", 2), ("validation", 1)):
        (folder / split).mkdir()
        for index in range(number):
            content = {
                "latents": torch.randn(6, 4, 8, 8, generator=generator).half(),
                "actions": torch.randint(4, (6,), generator=generator),
                "class_label": torch.tensor(100 - index),
            }
            save_file(content, folder / split / f"{index}.safetensors")
    return folder


def small_copy(published: Path, name: str, latents: Path, output: Path) -> list[str]:
    """The recipe with the sizes of a test."""
    return [str(published / f"{name}.yaml"), *SMALL, "--latents", str(latents), "--output-dir", str(output)]


# ----------------------------------------------------------------------------------------------------
# FAR


def test_every_published_model_has_a_recipe_and_a_row(published: Path, repository: Path) -> None:
    assert {file.stem for file in published.glob("far-*.yaml")} == set(PRESETS)
    rows = (repository / "docs/published.md").read_text().splitlines()
    for name in PRESETS:
        _, options = parse_far(str(published / f"{name}.yaml"))
        assert (
            sum(
                line.startswith(f"| `{name}` |") and f" {options.max_train_steps:,} |" in line
                for line in rows
            )
            == 1
        )
        assert any(
            line.startswith(f"| `{options.latents}` | `--resolution {preset(name).resolution}")
            for line in rows
        )


@pytest.mark.parametrize("name", PRESETS)
def test_a_recipe_has_the_published_sizes_and_settings(published: Path, name: str) -> None:
    sizes, options = parse_far(str(published / f"{name}.yaml"))
    model = preset(name)
    expected = dict(model.transformer)
    del expected["in_channels"], expected["out_channels"]  # those of the latents
    assert vars(sizes) == expected | {"axes_dims_rope": [16, 24, 24], "action_dim": None}
    assert options.num_frames == model.num_frames and name in options.output_dir
    is_long = model.long_patch_size is not None
    steps = 1_000_000 if is_long else 200_000 if model.num_context_frames else 400_000
    assert options.max_train_steps == steps
    assert (options.batch_size, options.learning_rate, options.max_grad_norm) == (32, 1e-4, 1)
    assert (options.adam_beta1, options.adam_beta2, options.ema_decay) == (0.9, 0.999, 0.9999)
    assert (options.clean_context_probability, options.condition_dropout) == (0.1, 0.1)
    assert (options.mixed_precision, options.objective, options.muon_learning_rate) == (
        *("bf16", "flow_matching", None),
    )
    assert options.own_context_probability == options.noisy_window_probability == 0
    if is_long:
        assert (options.lr_scheduler, options.length_distribution) == ("constant_with_warmup", "uniform")
        assert options.warmup_ratio * steps == 10_000
    else:
        assert options.lr_scheduler == "constant"


@pytest.mark.parametrize("name", PRESETS)
def test_a_step_of_every_recipe(published: Path, latents: Path, tmp_path: Path, name: str) -> None:
    trainer = FARTrainer(*parse_far(*small_copy(published, name, latents, tmp_path / "run"), *FLOAT32))
    assert trainer.train()
    trained, validated = read_log(tmp_path / "run")
    assert trained["step"] == 1
    # A new model predicts 0 where noise - latents, of deviation 1 each, is right.
    assert 1 < trained["loss"] < 4 and 1 < validated["validation_loss"] < 4
    config = FARTransformer3DModel.from_pretrained(tmp_path / "run/ema").config
    model = preset(name)
    for option in ("patch_size", "long_patch_size", "num_classes", "num_actions"):
        assert config[option] == getattr(model, option, 1)
    assert config.num_layers == 1 and config.in_channels == 4


def test_a_recipe_from_the_command_line(
    published: Path, latents: Path, repository: Path, tmp_path: Path
) -> None:
    words = small_copy(published, "far-b-long-dmlab", latents, tmp_path / "run")
    run = run_python(["-m", "training.train_far", *words], repository)
    assert run.returncode == 0, run.stderr
    assert FARTransformer3DModel.from_pretrained(tmp_path / "run/ema").config.long_patch_size == 4


def test_a_preset_gives_defaults(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("latents: l\noutput_dir: o\nmax_train_steps: 1\n")
    sizes, options = parse_far(str(recipe), "--num-layers", "5", "--preset", "far-m-long-minecraft")
    assert (sizes.num_layers, sizes.num_attention_heads, sizes.num_actions) == (5, 16, 4)
    assert options.num_frames == 300
    recipe.write_text("num_frames: 20\npreset: far-b-bair-64\n" + recipe.read_text())
    sizes, options = parse_far(str(recipe))
    assert (sizes.short_window, options.num_frames) == (30, 20)
    assert parse_far(str(recipe), "--preset", "far-b-ucf101-64")[0].short_window == 16
    assert parse_far("--latents", "l", "--output-dir", "o", "--max-minutes", "1")[1].num_frames == 16


def test_a_preset_that_nobody_knows_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("preset: far-b\nlatents: l\noutput_dir: o\nmax_train_steps: 1\n")
    with pytest.raises(SystemExit):
        parse_far(str(recipe))
    said = capsys.readouterr().err
    assert "invalid choice: 'far-b'" in said and "far-b-bair-64" in said


# ----------------------------------------------------------------------------------------------------
# Autoencoders


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for split in ("train", "validation"):
        (folder / split).mkdir()
        with av.open(str(folder / split / "a.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=15)
            stream.height = stream.width = 32
            for frame in np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
    return folder


def narrow(config: Callable[[int], AutoencoderConfig]) -> Callable[[int], AutoencoderConfig]:
    """The published autoencoder with few channels and layers."""

    def narrowed(compression: int) -> AutoencoderConfig:
        stages = compression.bit_length()
        changes = {}
        for side in ("encoder", "decoder"):
            changes[f"{side}_block_out_channels"] = (32,) * stages
            changes[f"{side}_layers_per_block"] = (0,) + (1,) * (stages - 1)
        return {**config(compression), **changes}  # type: ignore[typeddict-item]

    return narrowed


def test_both_halves_of_an_autoencoder(
    published: Path, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_autoencoder, "autoencoder_config", narrow(autoencoder_config))
    common = ["--preset", "far-b-bair-64", "--data", str(videos), "--resolution", "32", "--batch-size", "2"]
    common += ["--max-train-steps", "2", "--logging-steps", "1", "--validation-steps", "2", *FLOAT32]
    common += ["--cache-dir", str(tmp_path / "cache"), "--num-threads", "1"]
    options = parse_autoencoder(str(published / "dcae.yaml"), *common, "--output-dir", str(tmp_path / "a"))
    assert (options.compression, options.adam_beta1, options.adam_beta2) == (8, 0.5, 0.9)
    assert (options.perceptual_loss_weight, options.gradient_loss_weight) == (1, 0)
    assert options.learning_rate == 1e-4
    trainer = AutoencoderTrainer(options)
    assert [group["betas"] for group in trainer.optimizers[0].param_groups] == [(0.5, 0.9)]
    norm = trainer.autoencoder.decoder.up_blocks[1][1].norm
    assert isinstance(norm, torch.nn.BatchNorm2d) and trainer.train()
    assert norm.num_batches_tracked == 2  # of training alone, not of validation

    more = ["--init-from", str(tmp_path / "a/autoencoder"), "--output-dir", str(tmp_path / "b")]
    options = parse_autoencoder(str(published / "dcae_decoder.yaml"), *common, *more)
    assert (options.adversarial_loss_weight, options.freeze_encoder) == (0.5, True)
    trainer = AutoencoderTrainer(options)
    assert trainer.autoencoder.decoder.up_blocks[1][1].norm.training and trainer.train()
    first, second = (AutoencoderDC.from_pretrained(tmp_path / run / "autoencoder") for run in "ab")
    assert tuple(first.config.encoder_block_types) == autoencoder_config(8)["encoder_block_types"]
    weights = second.state_dict()
    for name, weight in first.state_dict().items():
        if name.startswith("encoder"):
            assert torch.equal(weight, weights[name])
    assert not torch.equal(first.decoder.conv_in.weight, second.decoder.conv_in.weight)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_of_an_autoencoder_is_the_published_one(published: Path, name: str) -> None:
    words = ["--preset", name, "--data", "d", "--output-dir", "o"]
    options = parse_autoencoder(str(published / "dcae.yaml"), *words)
    assert options.frame_size == (preset(name).resolution,) * 2
    with torch.device("meta"):
        config = train_autoencoder.build_autoencoder(options).config
    assert preset(name).autoencoder.items() <= config.items()


def test_sizes_beside_a_published_autoencoder_are_refused() -> None:
    with pytest.raises(ValueError, match=r"latent_channels=8: compression=16 has its own"):
        parse_autoencoder("--data", "d", "--output-dir", "o", "--compression", "16", "--latent-channels", "8")
