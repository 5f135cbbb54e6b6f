"""Put a trained transformer and its autoencoder together as a pipeline folder.

    python -m training.make_pipeline --transformer runs/far/ema --autoencoder runs/autoencoder/autoencoder \
        --output checkpoints/NAME --solver UniPC --num-inference-steps 5 --sample-size 64 --dtype bfloat16

The folder is what `FARVideoPipeline.from_pretrained` loads; it appears when it is complete.
"""

import json
import sys
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from ..inputs import ActionNames
from ..pipeline_far_video import FARVideoPipeline
from ..transformer_far import FARTransformer3DModel
from ..whole_files import written_whole
from .options import Count, NotNegative, check_ranges, option, parse, script


@dataclass(kw_only=True)
class PipelineOptions:
    """Parts of a pipeline, and what it does where a call does not say."""

    transformer: str = option(MISSING, "folder of a FARTransformer3DModel")
    autoencoder: str = option(MISSING, "folder of the AutoencoderDC that made its latents")
    output: str = option(MISSING, "new folder")
    solver: Literal["Euler", "UniPC"] = option("Euler", "UniPC gets by with fewer steps than Euler")
    num_inference_steps: Count = option(50, "default denoising steps")
    flex_rope_slope: NotNegative = option(0.0, "default of FlexRoPE's decay")
    num_training_frames: Count | None = option(None, "frames of the longest training clip")
    sample_size: list[int] | None = option(
        None, "default size of frames in pixels: one number, or height and width"
    )
    action_names: list[str] | None = option(
        None,
        "what the actions are called, in order; the numbers of a vector; or groups, with their actions as in "
        "keyboard=none,walk,jump mouse=none,left",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = option(
        "float32", "of the files; loading gives float32"
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        if Path(self.output).exists():
            raise ValueError(f"output={self.output!r} is there already; it takes a new folder")


def save_pipeline(pipeline: FARVideoPipeline, folder: Path) -> None:
    """Write a pipeline to a folder, with files that all may read: safetensors makes its files private."""
    pipeline.save_pretrained(folder)
    for file in folder.glob("*/config.json"):
        config = json.loads(file.read_text())
        config.pop("_name_or_path", None)  # where the weights were on this machine
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for file in folder.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)


def action_names(words: list[str] | None) -> ActionNames | None:
    """Names as a pipeline takes them; a word such as keyboard=none,walk is a group and its actions."""
    if words is None:
        return None
    pairs = [(word, *word.partition("=")) for word in words]
    return [{name: values.split(",")} if equals else word for word, name, equals, values in pairs]


def make_scheduler(solver: str) -> Any:
    if solver == "UniPC":
        return UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    return FlowMatchEulerDiscreteScheduler()


def main(command_line: list[str]) -> None:
    (options,) = parse(command_line, (PipelineOptions,), __doc__)
    transformer = FARTransformer3DModel.from_pretrained(options.transformer)
    vae = AutoencoderDC.from_pretrained(options.autoencoder)
    if transformer.config.in_channels != vae.config.latent_channels:
        raise ValueError(
            f"autoencoder={options.autoencoder!r} has latents of {vae.config.latent_channels} channels; the "
            f"transformer takes {transformer.config.in_channels}"
        )
    sample_size = options.sample_size
    if sample_size is not None and len(sample_size) == 1:
        (sample_size,) = sample_size
    pipeline = FARVideoPipeline(
        transformer,
        vae,
        make_scheduler(options.solver),
        flex_rope_slope=options.flex_rope_slope,
        num_inference_steps=options.num_inference_steps,
        sample_size=sample_size,
        num_training_frames=options.num_training_frames,
        action_names=action_names(options.action_names),
    ).to(getattr(torch, options.dtype))
    with written_whole(Path(options.output)) as unfinished:
        save_pipeline(pipeline, unfinished)


if __name__ == "__main__":
    with script():
        main(sys.argv[1:])
