"""Put a trained transformer and its autoencoder together as a pipeline folder.

    python training/make_pipeline.py --transformer runs/far/ema --autoencoder runs/autoencoder/autoencoder \
        --output checkpoints/NAME --solver UniPC --num_inference_steps 5 --sample_size 64 --dtype bfloat16

The folder is what `FARVideoPipeline.from_pretrained` loads; it appears when it is complete.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import (
    AutoencoderDC,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)

from diffusers_far import FARTransformer3DModel, FARVideoPipeline

SOLVERS: dict[str, Callable[[], SchedulerMixin]] = {
    "Euler": FlowMatchEulerDiscreteScheduler,
    "UniPC": lambda: UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
}
DTYPES = ("float32", "bfloat16", "float16")


def main(command_line: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--transformer", required=True, help="folder of a FARTransformer3DModel")
    parser.add_argument(
        "--autoencoder", required=True, help="folder of the AutoencoderDC that made its latents"
    )
    parser.add_argument("--output", type=Path, required=True, help="new folder")
    parser.add_argument(
        "--solver", choices=SOLVERS, default="Euler", help="UniPC gets by with fewer steps than Euler"
    )
    parser.add_argument("--num_inference_steps", type=int, default=50, help="default denoising steps")
    parser.add_argument("--flex_rope_slope", type=float, default=0.0, help="default of FlexRoPE's decay")
    parser.add_argument("--num_training_frames", type=int, help="frames of the longest training clip")
    parser.add_argument("--sample_size", type=int, help="default height and width of frames in pixels")
    parser.add_argument("--action_names", nargs="+", help="what the actions are called, in order")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of the files; loading gives float32"
    )
    arguments = parser.parse_args(command_line)
    if arguments.output.exists():
        raise SystemExit(f"--output: {arguments.output} is there already; it takes a new folder")

    transformer = FARTransformer3DModel.from_pretrained(arguments.transformer)
    vae = AutoencoderDC.from_pretrained(arguments.autoencoder)
    if transformer.config.in_channels != vae.config.latent_channels:
        raise SystemExit(
            f"--autoencoder: its latents have {vae.config.latent_channels} channels, the transformer takes "
            f"{transformer.config.in_channels}"
        )
    pipeline = FARVideoPipeline(
        transformer,
        vae,
        SOLVERS[arguments.solver](),
        flex_rope_slope=arguments.flex_rope_slope,
        num_inference_steps=arguments.num_inference_steps,
        sample_size=arguments.sample_size,
        num_training_frames=arguments.num_training_frames,
        action_names=arguments.action_names,
    ).to(getattr(torch, arguments.dtype))
    partial = arguments.output.with_name(arguments.output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.save_pretrained(partial)
    for file in partial.rglob("*"):  # safetensors makes its files private
        file.chmod(0o755 if file.is_dir() else 0o644)
    os.replace(partial, arguments.output)


if __name__ == "__main__":
    main(sys.argv[1:])
