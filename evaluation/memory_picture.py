"""A picture of what is remembered: views that come back, real, and as drawn with memory and without.

    python evaluation/memory_picture.py CHECKPOINT WALKS --output docs/memory.png

WALKS is the validation split of a recording of walks that look away and come back (`data/doom_maze.py --walk
scripted`). For the first walk of each script: the frame before it looks away, then the frames from its return
on; below them the model's after all frames before the return (with memory), and after the frames of its
window alone (without). Prints the PSNR of the drawn frames.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout: this file is run as a script

from diffusers_far import ContextSchedule, FARVideoPipeline
from diffusers_far.metrics import psnr
from evaluation.rollout_picture import contact_sheet, read_frames

SCHEDULES = {"with memory": ContextSchedule.unbounded(), "without": ContextSchedule(max_long_frames=0)}


def rows_of_walk(
    pipeline: FARVideoPipeline, walk: dict[str, Any], video: Tensor, num_frames: int, seed: int
) -> list[Tensor]:
    """Rows `[1 + num_frames, 3, H, W]` of one walk: real, with memory, without.

    Args:
        walk: its line of the metadata.
        video: `[T, 3, H, W]` in [0, 1].
    """
    left, back = int(walk["start_frame"]), int(walk["return_frame"])
    before, truth = video[left : left + 1], video[back : back + num_frames]
    rows = [torch.cat([before, truth])]
    for name, schedule in SCHEDULES.items():
        made = pipeline(
            video=video[:back],
            actions=walk["actions"][: back + num_frames],
            num_frames=back + num_frames,
            context_schedule=schedule,
            generator=torch.Generator().manual_seed(seed),
            output_type="pt",
        ).frames[0][back:]
        print(f"{walk['file_name']} {walk['script']}, {name}: {psnr(made, truth).mean():.2f} dB")
        rows.append(torch.cat([before, made]))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="folder or repo id of a pipeline")
    parser.add_argument("walks", type=Path, help="split of a recording of scripted walks")
    parser.add_argument("--output", type=Path, required=True, help="PNG")
    parser.add_argument("--scripts", nargs="+", default=["turn-away-16", "turn-away-32"])
    parser.add_argument("--frames", type=int, default=8, help="frames from the return on")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    pipeline = FARVideoPipeline.from_pretrained(arguments.checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    lines = (arguments.walks / "metadata.jsonl").read_text().splitlines()
    walks = [json.loads(line) for line in lines]
    groups = []
    for script in arguments.scripts:
        walk = next((walk for walk in walks if walk.get("script") == script), None)
        if walk is None:
            known = ", ".join(sorted({str(walk.get("script")) for walk in walks}))
            raise ValueError(f"scripts={script!r}: {arguments.walks} has walks of {known}")
        video = read_frames(arguments.walks / walk["file_name"])
        groups.append(rows_of_walk(pipeline, walk, video, arguments.frames, arguments.seed))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(groups).save(arguments.output)


if __name__ == "__main__":
    main()
