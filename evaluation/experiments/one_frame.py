"""How a video is best continued that begins with one picture.

    python evaluation/experiments/one_frame.py checkpoints/far-doom-maze-64 DATA

Continues held-out episodes for 12 frames from one observed frame: as it is, and as if it had stood still,
with the frame ten times, and null actions or the one called noop.
Then there are long-term frames. Prints a table.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout: this file is run as a script

from diffusers_far import FARVideoPipeline, read_video
from diffusers_far.lpips import LPIPS
from diffusers_far.metrics import psnr
from evaluation.world_model import perceptual_distance

OBSERVED, TARGETS, REPEATS = (
    100,
    12,
    9,
)  # number of the observed frame in its episode; frames after and before it


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="folder of a pipeline with actions")
    parser.add_argument("data", type=Path, help="recording of doom_maze.py")
    parser.add_argument("--episodes", type=int, default=16)
    arguments = parser.parse_args()
    pipeline = FARVideoPipeline.from_pretrained(arguments.checkpoint, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    folder = arguments.data / "validation"
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    span = slice(OBSERVED, OBSERVED + 1 + TARGETS)
    rows = rows[: arguments.episodes]
    videos = torch.stack([torch.from_numpy(read_video(folder / row["file_name"])[span]) for row in rows])
    videos = videos.permute(0, 1, 4, 2, 3).float() / 255
    actions = torch.tensor([row["actions"][span] for row in rows])
    noop = pipeline.config.action_names.index("noop")
    lpips = LPIPS()
    print("| before it | PSNR of frame 1 | mean | LPIPS |\n|---|---|---|---|")
    for name, repeats, action in (
        ("nothing", 0, noop),
        ("itself, null actions", REPEATS, -1),
        ("itself, noop", REPEATS, noop),
    ):
        predicted = pipeline(
            video=videos[:, :1].expand(-1, repeats + 1, -1, -1, -1),
            actions=torch.cat([torch.full((len(rows), repeats), action), actions], dim=1),
            num_frames=repeats + 1 + TARGETS,
            generator=[torch.Generator().manual_seed(seed) for seed in range(len(rows))],
            output_type="pt",
        ).frames[:, repeats + 1 :]
        quality = psnr(predicted, videos[:, 1:])
        distance = perceptual_distance(lpips, predicted, videos[:, 1:], 64)
        cells = [f"{quality[:, 0].mean():.2f}", f"{quality.mean():.2f}", f"{distance.mean():.4f}"]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
