"""A picture of a long rollout: real frames above the model's, at moments spread over it.

    python evaluation/rollout_picture.py CHECKPOINT DATA --output docs/rollout.png

DATA is of any kind in docs/data.md, with the actions that the model takes: its held-out videos where it has
some as a split, else all. Prints, for each fifth of the rollout, how sharp the model's frames are beside the
real ones (mean absolute difference of neighbouring pixels) and their mean brightness.
"""

import argparse
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout: this file is run as a script

from diffusers_far import ContextSchedule, FARVideoPipeline
from diffusers_far.metrics import sharpness
from diffusers_far.training.options import FrameOptions
from diffusers_far.training.sources import open_source


def contact_sheet(groups: list[list[Tensor]], zoom: int = 2, gap: int = 2) -> Image.Image:
    """One row of the picture per `[F, 3, H, W]` in [0, 1]; a wider gap follows each group of rows."""
    lines = []
    for group in groups:
        for frames in group:
            large = frames.repeat_interleave(zoom, -1).repeat_interleave(zoom, -2)
            below = 5 * gap if frames is group[-1] else gap
            lines.append(torch.cat(list(functional.pad(large, (0, gap, 0, below), value=1.0)), dim=-1))
    sheet = torch.cat(lines, dim=-2)
    return Image.fromarray((sheet.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="folder or repo id of a pipeline")
    parser.add_argument("data", help="folder or repo id of videos with actions")
    parser.add_argument("--output", type=Path, required=True, help="PNG")
    parser.add_argument("--context", type=int, default=32)
    parser.add_argument("--frames", type=int, default=200, help="frames to roll out")
    parser.add_argument("--columns", type=int, default=11)
    parser.add_argument("--walks", type=int, help="first videos that are shown; default: all")
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--refresh-interval", type=int, default=1, help="of ContextSchedule; 0: never")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    pipeline = FARVideoPipeline.from_pretrained(arguments.checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    end = arguments.context + arguments.frames
    size = FrameOptions(resolution="x".join(map(str, pipeline.default_size)))
    splits = open_source(arguments.data).splits
    groups = []
    for episode in islice(splits["validation" if "validation" in splits else "train"], arguments.walks):
        numbers, pictures = zip(*islice(episode.frames(size), end), strict=True)
        if len(pictures) < end:
            parser.error(f"DATA {arguments.data}: {episode.name} has {len(pictures)} frames; it takes {end}")
        video = torch.from_numpy(np.stack(pictures)).movedim(-1, 1).float() / 255
        actions = None if episode.actions is None else [episode.actions[number] for number in numbers]
        frames = pipeline(
            video=video[: arguments.context],
            actions=actions,
            num_frames=end,
            num_inference_steps=arguments.steps,
            context_schedule=ContextSchedule(refresh_interval=arguments.refresh_interval or None),
            generator=torch.Generator().manual_seed(arguments.seed),
            output_type="pt",
        ).frames[0]
        real, made = video[arguments.context :], frames[arguments.context :]
        for part in torch.arange(arguments.frames).chunk(5):
            sharp, sharp_real = sharpness(made[part]), sharpness(real[part])
            light, light_real = made[part].mean().item(), real[part].mean().item()
            print(
                f"{episode.name} frames {part[0] + 1:3d} to {part[-1] + 1:3d}: sharpness {sharp:.4f} "
                f"(real {sharp_real:.4f}), brightness {light:.3f} (real {light_real:.3f})"
            )
        shown = torch.linspace(0, arguments.frames - 1, arguments.columns).long()
        groups.append([real[shown], made[shown]])
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(groups).save(arguments.output)


if __name__ == "__main__":
    main()
