"""A picture of a long rollout: real frames above the model's, at moments spread over it.

    python evaluation/rollout_picture.py CHECKPOINT EPISODES --output docs/rollout.png

EPISODES is a split of a videofolder with actions (such as data/samples/doom-maze-64/validation). Prints, for
each fifth of the rollout, how sharp the model's frames are beside the real ones (mean absolute difference of
neighbouring pixels) and their mean brightness.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout: this file is run as a script

from diffusers_far import ContextSchedule, FARVideoPipeline
from diffusers_far.metrics import sharpness
from diffusers_far.video_files import read_video


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


def read_frames(path: Path) -> Tensor:
    """`[T, 3, H, W]` in [0, 1]."""
    return torch.from_numpy(read_video(path)).movedim(-1, 1).float() / 255


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="folder or repo id of a pipeline")
    parser.add_argument("episodes", type=Path, help="split of a videofolder with actions")
    parser.add_argument("--output", type=Path, required=True, help="PNG")
    parser.add_argument("--context", type=int, default=32)
    parser.add_argument("--frames", type=int, default=200, help="frames to roll out")
    parser.add_argument("--columns", type=int, default=11)
    parser.add_argument("--walks", type=int, help="first episodes that are shown; default: all")
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--refresh-interval", type=int, default=1, help="of ContextSchedule; 0: never")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    pipeline = FARVideoPipeline.from_pretrained(arguments.checkpoint)
    groups = []
    for line in (arguments.episodes / "metadata.jsonl").read_text().splitlines()[: arguments.walks]:
        episode = json.loads(line)
        end = arguments.context + arguments.frames
        video = read_frames(arguments.episodes / episode["file_name"])[:end]
        frames = pipeline(
            video=video[: arguments.context],
            actions=episode["actions"][:end],
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
                f"{episode['file_name']} frames {part[0] + 1:3d} to {part[-1] + 1:3d}: sharpness {sharp:.4f} "
                f"(real {sharp_real:.4f}), brightness {light:.3f} (real {light_real:.3f})"
            )
        shown = torch.linspace(0, arguments.frames - 1, arguments.columns).long()
        groups.append([real[shown], made[shown]])
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(groups).save(arguments.output)


if __name__ == "__main__":
    main()
