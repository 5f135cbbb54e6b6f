"""How a world holds for a walker that looks where it goes: the looks of 1,000 frames, and a picture of them.

    python evaluation/wander.py CHECKPOINT EPISODES --output docs/wander.png

The actions of a recorded episode fit its own maze. In a maze that the model makes up they soon walk against a
wall and stay there, so that a rollout with them shows one wall, as the real game would in another maze. Here
the walker goes forward, and turns for some frames when the model's last frame shows a wall right before it.

EPISODES is a split of a videofolder with actions (such as data/samples/doom-maze-64/validation); each of its
episodes gives the first frames. Prints, by 100 frames: sharpness, colour spread and wall colours, as
evaluation/context_curve.py measures them, beside those of the real episodes, and how many of the frames were
turns.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout: this file is run as a script

from diffusers_far import FARVideoPipeline
from diffusers_far.evaluation.tables import table
from evaluation.context_curve import BLOCK, mean_appearance
from evaluation.rollout_picture import contact_sheet, read_frames

FORWARD, LEFT, RIGHT = 1, 2, 3
TURN = 6  # frames of a turn, a quarter of a circle
OTHER_WAY = 100  # frames after which it turns to the other side
NEAR = 0.06  # difference in colour of the wall ahead and the floor below it, from which on there is a floor


def sees_wall(frame: Tensor) -> bool:
    """Whether the middle of a frame `[3, H, W]` in [0, 1] has the colour of its bottom: no floor is seen."""
    height, width = frame.shape[-2:]
    columns = slice(3 * width // 8, 5 * width // 8)
    ahead = frame[:, 13 * height // 32 : 17 * height // 32, columns].mean(dim=(1, 2))
    below = frame[:, 13 * height // 16 : 15 * height // 16, columns].mean(dim=(1, 2))
    return bool((ahead - below).abs().max() < NEAR)


def wander(
    pipeline: FARVideoPipeline, video: Tensor, actions: list[int], num_frames: int, seed: int
) -> tuple[Tensor, list[int]]:
    """Frames `[num_frames, 3, H, W]` in [0, 1] that the model makes, and the actions that led to them.

    Args:
        video, actions: what is given to start from, `[T, 3, H, W]` in [0, 1].
    """
    generator = torch.Generator().manual_seed(seed)
    rollout = pipeline.rollout(video=video, context_actions=actions, generator=generator, output_type="pt")
    frames: list[Tensor] = []
    taken: list[int] = []
    turns_left = 0
    for index in range(num_frames):
        if turns_left == 0 and sees_wall(frames[-1] if frames else video[-1]):
            turns_left = TURN
        side = LEFT if index // OTHER_WAY % 2 == 0 else RIGHT
        taken.append(side if turns_left else FORWARD)
        turns_left = max(0, turns_left - 1)
        frames.append(rollout.step(taken[-1])[0])
    return torch.stack(frames), taken


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="folder or repo id of a pipeline with doom-maze's actions")
    parser.add_argument("episodes", type=Path, help="split of a videofolder with actions")
    parser.add_argument("--output", type=Path, required=True, help="PNG")
    parser.add_argument("--context", type=int, default=32, help="real frames to start from")
    parser.add_argument("--frames", type=int, default=1000)
    parser.add_argument("--columns", type=int, default=11)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    pipeline = FARVideoPipeline.from_pretrained(arguments.checkpoint)
    real, made, turns, groups = [], [], [], []
    for line in (arguments.episodes / "metadata.jsonl").read_text().splitlines():
        episode = json.loads(line)
        video = read_frames(arguments.episodes / episode["file_name"])
        start = episode["actions"][: arguments.context]
        frames, taken = wander(pipeline, video[: len(start)], start, arguments.frames, arguments.seed)
        real += [block for block in video.split(BLOCK) if len(block) == BLOCK]
        made.append(frames)
        turns.append(torch.tensor(taken) != FORWARD)
        groups.append([frames[torch.linspace(0, arguments.frames - 1, arguments.columns).long()]])
    truth = mean_appearance(real)
    rows: list[list[object]] = []
    for first in range(0, arguments.frames, BLOCK):
        looks = mean_appearance([frames[first : first + BLOCK] for frames in made])
        turned = torch.stack(turns)[:, first : first + BLOCK].float().mean().item()
        shares = [f"{value / truth[name]:.0%}" for name, value in looks.items()]
        rows.append([f"{first + 1} to {first + BLOCK}", *shares, looks["wall_colours"], f"{turned:.0%}"])
    print(table(["frames", *truth, "their number", "turns"], rows))
    print(f"\nreal: {', '.join(f'{name} {value:.4f}' for name, value in truth.items())}")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(groups).save(arguments.output)


if __name__ == "__main__":
    main()
