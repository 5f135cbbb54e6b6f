"""Encoded videos small enough for tests of training, and the options of a run on them."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests import tiny_models

SIZE = ["--num-layers", "1", "--num_attention_heads", "2", "--attention_head_dim", "16"]
SIZE += ["--axes_dims_rope", "4", "6", "6", "--num_actions", "3"]
WALK_FRAMES = 14  # of `write_walks`
LONG = ["--long_patch_size", "2", "--short_window", "3"]


def write_latents(folder: Path) -> Path:
    """Videos of 12 frames whose action shifts one pattern: 4 to train on, 2 held out."""
    generator = torch.Generator().manual_seed(0)
    pattern = torch.randn(2, 4, 4, generator=generator)
    for split, number in (("train", 4), ("validation", 2)):
        (folder / split).mkdir()
        for index in range(number):
            actions = torch.randint(3, (12,), generator=generator)
            shifts = (actions - 1).cumsum(0).tolist()
            frames = torch.stack([pattern.roll(shift, dims=-1) for shift in shifts])
            content = {"latents": frames.half(), "actions": actions}
            save_file(content, folder / split / f"{index:05d}.safetensors")
    return folder


def write_walks(folder: Path) -> Path:
    """Latents of the tiny autoencoder, of walks whose last two frames were seen 9 frames before: 3 and 3."""
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "validation"):
        (folder / split).mkdir(parents=True)
        for index in range(3):
            revisits = torch.zeros(WALK_FRAMES, dtype=torch.int64)
            revisits[-2:] = 9
            shape = (WALK_FRAMES, tiny_models.CHANNELS, tiny_models.GRID, tiny_models.GRID)
            content = {
                "latents": torch.randn(shape, generator=generator).half(),
                "actions": torch.randint(3, (WALK_FRAMES,), generator=generator),
                "revisits": revisits,
            }
            save_file(content, folder / split / f"{index}.safetensors")
    return folder


def run_options(latents: Path, output: Path, *more: str) -> list[str]:
    run = ["--latents", str(latents), "--output_dir", str(output), "--num_frames", "6", "--batch_size", "2"]
    return [*SIZE, *run, "--max_train_steps", "6", "--learning_rate", "3e-3", "--logging_steps", "1", *more]


def read_log(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def averaged_weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "ema" / "diffusion_pytorch_model.safetensors")
