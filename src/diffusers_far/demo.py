"""Continue a held-out episode of a real maze with the shipped model, and watch truth beside prediction.

    python -m diffusers_far.demo --output demo.mp4

Run from a checkout of the project, or with `--checkpoint` and `--episodes` pointing to a pipeline and a
videofolder.
"""

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from diffusers.utils import export_to_video

from .pipeline_far_video import FARVideoPipeline
from .pipeline_inputs import read_video

CHECKPOINT = "checkpoints/far-doom-maze-64"
EPISODES = "data/samples/doom-maze-64/validation"


def find(path: str, argument: str) -> Path:
    """A path from the current folder, or else from the checkout that this package was installed from."""
    candidates = [Path(path), Path(__file__).resolve().parents[2] / path]
    for candidate in candidates:
        if candidate.exists():
            return candidate
    raise SystemExit(
        f"--{argument}: {path} is not there; run from a checkout of diffusers-far, or give a path"
    )


def load_episode(folder: Path, index: int) -> tuple[np.ndarray, list[int]]:
    """Frames `[T, H, W, 3]` uint8 and actions `[T]` of an episode of a videofolder split."""
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    if not 0 <= index < len(lines):
        raise SystemExit(f"--episode: got {index}; {folder} has episodes 0 to {len(lines) - 1}")
    episode = json.loads(lines[index])
    return read_video(folder / episode["file_name"]), episode["actions"]


def side_by_side(truth: np.ndarray, prediction: np.ndarray, num_context: int, zoom: int = 4) -> np.ndarray:
    """Truth left, prediction right, both `[T, H, W, 3]` in [0, 1]; a green frame marks context, a red
    one prediction.
    """
    panels = []
    for video in (truth, prediction):
        large = video.repeat(zoom, axis=1).repeat(zoom, axis=2)
        panels.append(np.pad(large, ((0, 0), (zoom, zoom), (zoom, zoom), (0, 0))))
    border = np.ones(panels[1].shape[1:3], bool)
    border[zoom:-zoom, zoom:-zoom] = False
    panels[1][:num_context, border] = (0.2, 0.8, 0.3)
    panels[1][num_context:, border] = (0.9, 0.2, 0.2)
    joined = np.concatenate(panels, axis=2)
    even = [(0, size % 2) for size in joined.shape[1:3]]  # H.264 takes even sizes only
    return np.pad(joined, ((0, 0), *even, (0, 0)))


def check_output(path: Path) -> None:
    """Raise a ValueError for a name that is taken by something else than a file, such as a device."""
    if path.exists() and not path.is_file():
        raise ValueError(f"--output: {path} is no regular file; it takes such a file, or a new name")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--output: the folder of {path} does not exist")


def save_video(frames: np.ndarray, path: Path, frames_per_second: int) -> None:
    """Write an mp4, complete or not at all; errors as of [`check_output`]."""
    check_output(path)
    path = path.resolve()  # a link stays a link
    partial = path.with_name(f".{path.stem}.partial.mp4")
    try:
        export_to_video(list(frames), str(partial), fps=frames_per_second, quality=8.0, macro_block_size=2)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m diffusers_far.demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", default=CHECKPOINT, help="folder of an action-conditioned pipeline")
    parser.add_argument("--episodes", default=EPISODES, help="split of a videofolder with actions")
    parser.add_argument("--episode", type=int, default=0, help="which of its episodes")
    parser.add_argument("--start", type=int, default=0, help="first frame of the context")
    parser.add_argument("--context", type=int, default=32, help="frames the model sees")
    parser.add_argument("--frames", type=int, default=32, help="frames it predicts")
    parser.add_argument("--steps", type=int, default=None, help="denoising steps; default: the checkpoint's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("demo.mp4"))
    options = parser.parse_args(arguments)
    check_output(options.output)

    folder = find(options.episodes, "episodes")
    video, actions = load_episode(folder, options.episode)
    end = options.start + options.context + options.frames
    if options.start < 0 or options.context < 1 or options.frames < 1 or end > len(video):
        raise SystemExit(
            f"--start {options.start} --context {options.context} --frames {options.frames} must lie within "
            f"the {len(video)} frames of the episode"
        )
    pipeline = FARVideoPipeline.from_pretrained(find(options.checkpoint, "checkpoint"))
    clip, clip_actions = video[options.start : end], actions[options.start : end]
    started = time.perf_counter()
    prediction = pipeline(
        video=clip[: options.context],
        actions=clip_actions,
        num_frames=len(clip),
        num_inference_steps=options.steps,
        generator=torch.Generator().manual_seed(options.seed),
        output_type="np",
    ).frames[0]
    seconds = time.perf_counter() - started
    save_video(side_by_side(clip / 255.0, prediction, options.context), options.output, frames_per_second=10)
    print(
        f"{options.output}: {options.context} frames of context, then {options.frames} predicted from their "
        f"actions (left: truth) in {seconds:.1f} s, {options.frames / seconds:.1f} frames/s with decoding"
    )


if __name__ == "__main__":
    main()
